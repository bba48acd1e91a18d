"""Several teachers: stores of the same views side by side, each against targets that are simply held in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.messages import Case, require_message
from support.targets import blocks_with_views_of, header, tree, write_blocks
from support.training import StopAtError, same_run, stop_at, weights_of
from torch.nn import functional as F
from torch.testing import assert_close

from milan_pipe.api import inspect_student, replay, report
from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.config.teachers import TeachersSettings
from milan_pipe.digests import with_digest
from milan_pipe.errors import DataError, MismatchError, SettingError, StoreError
from milan_pipe.loader.order import Block
from milan_pipe.loader.stream import read_batch
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.pretraining.statistics import keep_statistics, kept_standardise, statistics_of
from milan_pipe.reports.inspect_student import number_of
from milan_pipe.student.pixels import normalise
from milan_pipe.student.standardise import Standardise, fit_statistics, hadamard, standardise_of
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.targets.several import open_several
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.training.task import RunReport

A = header(format="zarr", shards=2, width=8)
B = header("float16", format="webdataset", shards=2, width=12, model="other", weights_sha256="cd" * 32)
SIDE = A.views.size // A.teacher.grid[0]
STUDENT = StudentSettings(image_size=A.views.size, patch_size=SIDE, width=16, depth=1, heads=2)
SIZES = (20, 12)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stores")
    first = [blocks_with_views_of(A, None, count, number) for number, count in enumerate(SIZES)]
    write_blocks(root / "a", A, first)
    write_blocks(root / "b", B, [blocks_with_views_of(B, like, SIZES[n], 9 + n) for n, like in enumerate(first)])
    return root / "a", root / "b"


def params_of(teachers: dict[str, Any] | None = None, **sections: Any) -> Params:
    fixed = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "log_every": 1, "device": "cpu", "shuffle_blocks": 1}
    recipe = {**fixed, **sections.pop("pretrain", {})}
    kept = {"student": STUDENT, "decoder": DecoderSettings(width=16, depth=1, heads=2), **sections}
    return Params(teachers=TeachersSettings(**teachers or {}), pretrain=PretrainSettings(**recipe), **kept)


@pytest.mark.parametrize("kind", ["none", "scale", "phi-s"])
@pytest.mark.parametrize("chosen", ["equal", "balanced", (1.0, 3.0)])
def test_loss_and_gradient_are_those_of_targets_held_in_memory(
    stores: tuple[Path, Path], kind: Any, chosen: Any
) -> None:
    params = params_of({"standardise": kind, "weights": chosen})
    reader = open_several(stores)
    found = [statistics_of(store, Path("nowhere"), n) for n, store in enumerate(reader.stores)]
    standardise = [standardise_of(kind, one, head.teacher.width) for one, head in zip(found, (A, B), strict=True)]
    objective = build_objective(A, params, torch.device("cpu"), others=[B], standardise=standardise)
    batch = read_batch(reader, Block(0, 1, 0, 6))
    objective(batch, 0).backward()
    gradients = [p.grad.clone() for p in objective.student.parameters() if p.grad is not None]
    objective.zero_grad()

    split = objective.predict(batch, 0).split
    prediction_BST = objective.student(normalise(batch.pixels_BHWC), split)
    losses, spreads = [], []
    for number, (where, part_BST) in enumerate(zip(stores, prediction_BST.split([8, 12], dim=-1), strict=True)):
        run = open_targets(where).read("000000", 1, 0, 6)
        head = (A, B)[number]
        scale = None if run.scale_NS is None else torch.from_numpy(run.scale_NS)
        features = codec_of(head.codec).decode(torch.from_numpy(run.code_NST), scale).double()
        if kind != "none":
            features = features - found[number]["mean_T"].double()
        if kind == "scale":
            features = features * found[number]["scale_T"].double()
        if kind == "phi-s":
            features = features @ found[number]["matrix_TT"].double()
        losses.append((2 - 2 * F.cosine_similarity(part_BST.double(), features, dim=-1)).mean())
        spreads.append(float(found[number][f"spread.{kind}"]))
    shares = {"equal": (1.0, 1.0), "balanced": (1 / spreads[0], 1 / spreads[1])}.get(str(chosen), chosen)
    plain = (shares[0] * losses[0] + shares[1] * losses[1]) / sum(shares)
    assert float(objective(batch, 0).detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    plain.backward()
    for left, p in zip(gradients, (p for p in objective.student.parameters() if p.grad is not None), strict=True):
        assert p.grad is not None
        # Of a whole tensor: where large parts cancel, a value has their noise.
        assert (left - p.grad).norm() <= 5e-6 * p.grad.norm()


def test_one_store_alone_is_as_it_was_and_two_resume_to_the_bit(stores: tuple[Path, Path], tmp_path: Path) -> None:
    pretrain(stores[0], tmp_path / "one", params_of())
    pretrain([stores[0]], tmp_path / "list", params_of())
    assert same_run(tmp_path / "one", tmp_path / "list")
    before = [tree(store) for store in stores]
    params = params_of({"standardise": "phi-s", "weights": "balanced", "importance": "mean"})
    pretrain(stores, tmp_path / "two", params)
    every = params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"checkpoint_every": 1})})
    with pytest.raises(StopAtError):
        pretrain(stores, tmp_path / "broken", every, on_progress=stop_at(5))
    beside = [store.with_name(f"{store.name}.statistics.safetensors") for store in stores]
    for file in beside:
        # The run goes on by its own, whatever lies beside the store.
        file.unlink()
    assert pretrain(stores, tmp_path / "broken", every).resumed_from == 4
    assert same_run(tmp_path / "two", tmp_path / "broken")
    assert [tree(store) for store in stores] == before
    with pytest.raises(MismatchError, match=r"targets_2\.teacher"):
        pretrain(stores[0], tmp_path / "two", params)
    assert weights_of(tmp_path / "two")["decoder_pred.weight"].shape == (8 + 12, 16)


def test_each_store_is_shown_with_the_output_that_learned_it(stores: tuple[Path, Path], tmp_path: Path) -> None:
    params, run = params_of({"standardise": "scale"}, masking=MaskSettings(kind="random")), tmp_path / "run"
    pretrain(stores, run, params)
    digests = open_checkpoint(run).record["configuration"]["statistics"]
    kept = kept_standardise(run, (A, B), params, digests)
    # One in the place of the other fits its own digest.
    first, second = run / "statistics" / "0.safetensors", run / "statistics" / "1.safetensors"
    first.rename(whole := tmp_path / "whole")
    shutil.copy(second, first)
    with pytest.raises(DataError, match=r"0\.safetensors is not what the run was begun with.*copy it there"):
        inspect_student(run, stores[0], tmp_path / "swapped")
    whole.rename(first)
    objective = build_objective(A, params, torch.device("cpu"), others=[B], standardise=kept).eval()
    opened = open_checkpoint(run)
    objective.student.encoder.load_state_dict(opened.weights("student"))
    objective.student.decoder.load_state_dict(opened.weights("decoder"))
    batch = read_batch(open_several(stores), Block(0, 0, 0, 4))
    with torch.no_grad():
        parts = objective.predict(batch, 0).parts
    for number, (store, part) in enumerate(zip(stores, parts, strict=True)):
        page = inspect_student(run, store, tmp_path / str(number), keys=batch.keys)
        assert page.cosine == pytest.approx(F.cosine_similarity(*part.patches, dim=-1).mean(dim=1).tolist(), abs=1e-5)
    text = Path(report([run], tmp_path / "report.html").page).read_text()
    assert all(f"teacher {head.teacher.model}, target clip" in text for head in (A, B))


def test_statistics_are_fitted_once(stores: tuple[Path, Path], tmp_path: Path) -> None:
    write_blocks(
        tmp_path / "a", A, [blocks_with_views_of(A, None, count, number) for number, count in enumerate(SIZES)]
    )
    pretrain(tmp_path / "a", tmp_path / "run", params_of({"standardise": "scale"}))
    beside = tmp_path / "a.statistics.safetensors"
    kept = beside.read_bytes()
    assert kept == (tmp_path / "run" / "statistics" / "0.safetensors").read_bytes()
    found = load_file(beside)
    assert found.keys() == {"mean_T", "scale_T", "matrix_TT", "spread.none", "spread.scale", "spread.phi-s"}
    pretrain(tmp_path / "a", tmp_path / "again", params_of({"standardise": "phi-s"}))
    assert beside.read_bytes() == kept
    # Of another store in the same place.
    other = open_targets(stores[1])
    beside.rename(stores[1].with_name("b.statistics.safetensors"))
    assert statistics_of(other, Path("nowhere"), 0)["mean_T"].shape == (12,)
    stores[1].with_name("b.statistics.safetensors").unlink()


@pytest.mark.parametrize("damage", [b"broken", None])
def test_damaged_statistics_are_computed_again(tmp_path: Path, damage: bytes | None) -> None:
    write_blocks(
        tmp_path / "a", A, [blocks_with_views_of(A, None, count, number) for number, count in enumerate(SIZES)]
    )
    store, run, beside = open_targets(tmp_path / "a"), tmp_path / "run", tmp_path / "a.statistics.safetensors"
    found = statistics_of(store, run, 0)
    keep_statistics(found, store, run, 0)
    whole = beside.read_bytes()
    for file in (beside, run / "statistics" / "0.safetensors"):
        changed = bytearray(whole)
        changed[-3] ^= 1
        file.write_bytes(damage or bytes(changed))
    with pytest.raises(DataError, match=r"is damaged.*TARGETS\.statistics\.safetensors.*copy it there"):
        kept_standardise(run, [A], params_of({"standardise": "scale"}), {})
    with pytest.warns(RuntimeWarning, match="damaged.*; statistics are computed again"):
        again = statistics_of(store, run, 0)
    assert_close(again, found, atol=0, rtol=0)
    with pytest.warns(RuntimeWarning, match="computed again"):
        keep_statistics(again, store, run, 0)
    assert whole == beside.read_bytes() == (run / "statistics" / "0.safetensors").read_bytes()
    (run / "statistics" / "0.safetensors").unlink()
    with pytest.raises(StoreError, match=r"No such file.*copy it there"):
        kept_standardise(run, [A], params_of({"standardise": "scale"}), {})


def test_a_store_is_found_by_all_that_its_targets_depend_on() -> None:
    other = A.teacher.model_copy(update={"normalization": "imagenet", "license": "mit"})
    records = [one.model_dump(mode="json") for one in (A.teacher, other)]
    assert number_of(A.teacher, records) == 0
    assert number_of(other.model_copy(update={"license": None}), records) == 1
    # Of the same weights, where none is the same in all.
    assert number_of(A.teacher.model_copy(update={"precision": "bfloat16"}), [None, *records]) == 1
    assert number_of(B.teacher, records) is None


def test_standardised_features_have_one_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator)
    features = torch.randn(4000, 24, generator=generator) @ mixing + 5
    found = fit_statistics([features[:1000], features[1000:]], 24)
    for kind in ("scale", "phi-s"):
        values = standardise_of(kind, found, 24)(features)  # type: ignore[arg-type]
        assert_close(values.mean(dim=0), torch.zeros(24), atol=1e-4, rtol=0)
        assert_close(values.std(dim=0, correction=0), torch.ones(24), atol=1e-3, rtol=0)
        unit = F.normalize(values, dim=-1).mean(dim=0)
        assert float(found[f"spread.{kind}"]) == pytest.approx(float(2 - 2 * unit.norm()), abs=1e-5)
    # A rotation and one factor: angles between centred features stay.
    centred = features - features.mean(dim=0)
    rotated = standardise_of("phi-s", found, 24)(features)
    pairs = [F.cosine_similarity(v[:-1], v[1:], dim=-1) for v in (centred, rotated)]
    assert_close(*pairs, atol=1e-4, rtol=0)
    assert torch.equal(standardise_of("none", found, 24)(features), features)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 64, 192, 384, 512, 768, 1024, 1152, 1280, 1536])
def test_hadamard_matrices(size: int) -> None:
    signs = hadamard(size)
    assert signs is not None
    assert {*np.unique(np.abs(signs))} == {1}
    assert np.array_equal(signs @ signs.T, size * np.eye(size))


def test_where_no_hadamard_matrix_is_known() -> None:
    assert [size for size in (3, 6, 10, 14, 92, 100) if hadamard(size) is not None] == []


def test_a_batch_of_two_stores_is_computed_again(
    stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Standardise.forward
    monkeypatch.setattr(Standardise, "forward", lambda self, features: forward(self, features) * float("inf"))
    with pytest.raises(DataError, match="not-finite"):
        pretrain(stores, tmp_path / "run", params_of({"standardise": "phi-s"}))
    monkeypatch.undo()
    report = replay(tmp_path / "run" / "not-finite" / "step-00000001.safetensors", device="cpu")
    assert np.isfinite(report.loss)


def written(folder: str, head: StoreHeader, *, like: bool = True, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> str:
    first = [blocks_with_views_of(A, None, count, number + seed) for number, count in enumerate(sizes)]
    write_blocks(folder, head, [blocks_with_views_of(head, of if like else None, len(of[0].keys), 7) for of in first])
    return folder


def together(change: Callable[[], str], **sections: Any) -> Callable[[], RunReport]:
    return lambda: pretrain([written("a", A), change()], "run", params_of(**sections))


def without_digests() -> str:
    where = Path(written("b", B))
    file = where / "manifest.json"
    values = {name: value for name, value in json.loads(file.read_text()).items() if name != "sha256"}
    for entry in values["shards"].values():
        entry.pop("views_sha256")
    file.write_bytes(json.dumps(with_digest(values), sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n")
    return str(where)


ADVICE = "Extract the second with `milan-pipe extract-targets --views-from a ...`"
NOT_SAME = "b and a are not of the same images and views:"
OTHER_SEED = B.model_copy(update={"views": B.views.model_copy(update={"seed": 4})})
ONE_SHARD = B.model_copy(update={"source": B.source.model_copy(update={"shards": 1})})
ODD = A.model_copy(update={"teacher": A.teacher.model_copy(update={"width": 6})})
OTHER_GRID = B.model_copy(update={"teacher": B.teacher.model_copy(update={"grid": (4, 4)})})
CASES: dict[str, Case] = {
    "other views": (
        together(lambda: written("b", OTHER_SEED)),
        MismatchError,
        f"{NOT_SAME} views.seed is 4, and 3. {ADVICE}",
    ),
    "another grid": (
        together(lambda: written("b", OTHER_GRID)),
        MismatchError,
        f"{NOT_SAME} the grid of patches is (4, 4), and (2, 2). {ADVICE}",
    ),
    "other images": (
        together(lambda: written("b", B, seed=5)),
        MismatchError,
        f"{NOT_SAME} the digest of the views of shard 000000 is ..., and .... {ADVICE}",
    ),
    "fewer images": (
        together(lambda: written("b", B, sizes=(20, 11))),
        MismatchError,
        f"{NOT_SAME} the number of samples of shard 000001 is 11, and 12. {ADVICE}",
    ),
    "fewer shards": (
        together(lambda: written("b", ONE_SHARD, sizes=(20,))),
        MismatchError,
        f"{NOT_SAME} the number of shards (one of them alone has 000001) is 1, and 2. {ADVICE}",
    ),
    "one store twice": (
        together(lambda: "a"),
        MismatchError,
        "a is named twice; name the stores of different teachers",
    ),
    "a store from before digests": (
        together(without_digests),
        MismatchError,
        "b was written before stores had digests of their views, so that it cannot be read beside another; `milan-pipe "
        "convert-targets` writes it anew with them",
    ),
    "weights of three": (
        together(lambda: written("b", B), teachers={"weights": (1, 2, 3)}),
        SettingError,
        "teachers.weights has [1.0, 2.0, 3.0] for 2 stores; expected a number for each, above 0 in sum",
    ),
    "a target without a teacher": (
        together(lambda: written("b", B), target="pixels"),
        SettingError,
        "target 'pixels' needs no features, and 2 stores are named; name one",
    ),
    "no rotation of that width": (
        lambda: pretrain(written("a", ODD), "run", params_of({"standardise": "phi-s"})),
        SettingError,
        "teachers.standardise is 'phi-s', and no Hadamard matrix of 6 rows is known; use 'scale'",
    ),
    "online": (
        together(lambda: written("b", B), pretrain={"targets": "online"}),
        SettingError,
        "pretrain.targets is 'online' with target 'clip'; it needs one of features, as 'clip', one store as it is, "
        "and, from Python, teacher_for",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])


@pytest.mark.parametrize("change", ["lost", "of another width"])
@pytest.mark.parametrize("name", ["mean_T", "scale_T", "matrix_TT", "spread.phi-s", "spread.scale"])
def test_kept_statistics_of_other_features_are_one_error(name: str, change: str) -> None:
    found = fit_statistics([torch.randn(40, 4, generator=torch.Generator().manual_seed(0))], 4)
    kind = "phi-s" if name in ("matrix_TT", "spread.phi-s") else "scale"
    value = found.pop(name)
    if change == "of another width":
        found[name] = value[None]
    with pytest.raises((MismatchError, SettingError), match=f"{name} is|'phi-s'"):
        standardise_of(kind, found, 4)  # type: ignore[arg-type]
