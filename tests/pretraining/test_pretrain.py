"""Stage 2 on a tiny store: it learns, repeats to the bit, and refuses what does not fit."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.images.views import encode_jpeg
from milan_pipe.loader.stream import Batch
from milan_pipe.pretraining.objective import Objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.student.model import build_student
from milan_pipe.targets.schema import (
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
)
from milan_pipe.targets.store import TargetStoreWriter
from milan_pipe.teacher import clip
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.task import RunReport

module = import_module("milan_pipe.pretraining.objective")
SIZE, GRID, WIDTH, VIEWS, SHARDS = 32, 4, 8, 2, (14, 10)
STUDENT = StudentSettings(image_size=SIZE, patch_size=8, width=16, depth=1, heads=2)
DECODER = DecoderSettings(width=16, depth=2, heads=2)


def header() -> StoreHeader:
    return StoreHeader(
        package_version="0",
        teacher=TeacherInfo(
            model="demo",
            pretrained=None,
            weights_sha256="0",
            normalization="clip",
            precision="float32",
            image_size=SIZE,
            grid=(GRID, GRID),
            width=WIDTH,
        ),
        views=ViewInfo(count=VIEWS, size=SIZE, scale=(0.2, 1), ratio=(1, 1), flip=0, seed=0, jpeg_quality=95),
        codec=CodecInfo(name="int8"),
        source=SourceInfo(shards=len(SHARDS), fingerprint="0"),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noise images; their features share a direction, which is soon learnt."""
    root = tmp_path_factory.mktemp("store") / "targets"
    writer = TargetStoreWriter(root, header())
    rng = np.random.default_rng(0)
    for number, count in enumerate(SHARDS):
        attention = rng.random((VIEWS, count, GRID**2)) + 0.01
        shard = writer.open_shard(f"{number:06d}")
        shard.append(
            TargetBlock(
                keys=[f"{number}-{row}" for row in range(count)],
                label_N=np.ones(count, np.int64),
                code_KNST=(rng.integers(-30, 31, (VIEWS, count, 1 + GRID**2, WIDTH)) + 60).astype(np.int8),
                scale_KNS=np.full((VIEWS, count, 1 + GRID**2), 0.1, np.float16),
                attention_KNL=(attention / attention.sum(-1, keepdims=True)).astype(np.float16),
                crop_KN4=np.ones((VIEWS, count, 4), np.int32),
                flip_KN=np.ones((VIEWS, count), np.bool_),
                jpegs=[
                    [encode_jpeg(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), 95) for _ in range(count)]
                    for _ in range(VIEWS)
                ],
            )
        )
        shard.commit(SourceShard(name=f"{number}.tar", bytes=1, sha256="0", samples=count, bad=()))
    writer.finish()
    return root


def go(store: Path, run: Path, **change: Any) -> RunReport:
    recipe = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "log_every": 1, "device": "cpu", "lr": 0.1}
    on_progress = change.pop("on_progress", lambda _: None)
    settings = {name: value for name, value in change.items() if name in PretrainSettings.model_fields}
    given = {name: value for name, value in change.items() if name not in PretrainSettings.model_fields}
    sections = {"student": STUDENT, "decoder": DECODER, **given, "pretrain": PretrainSettings(**{**recipe, **settings})}
    return pretrain(store, run, Params(**sections), on_progress=on_progress)


def test_the_loss_falls_and_the_report_adds_up(store: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    report = go(store, tmp_path / "run", epochs=8, on_progress=seen.append)
    assert report.steps == 24 == len(seen)
    assert [p.step for p in seen] == list(range(1, 25))
    assert [p.epoch for p in seen] == [e for e in range(8) for _ in range(3)]
    assert np.mean([p.loss for p in seen[-3:]]) < 0.5 * np.mean([p.loss for p in seen[:3]])
    assert report.loss == pytest.approx(np.mean([p.loss for p in seen[-3:]]), rel=1e-5)
    assert 0 <= report.data_wait <= 1
    assert report.images_per_second == pytest.approx(24 * 8 / report.seconds)


def test_two_runs_are_the_same_to_the_bit_and_a_seed_changes_them(store: Path, tmp_path: Path) -> None:
    weights = []
    for name, change in (("a", {}), ("b", {"threads": 3}), ("c", {"seed": 1})):
        torch.manual_seed(len(weights))
        go(store, tmp_path / name, **change)
        opened = open_checkpoint(tmp_path / name)
        weights.append({**opened.weights("student"), **opened.weights("decoder")})
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["cls_token"], other["cls_token"])


def batch_of(count: int) -> Batch:
    rng = np.random.default_rng(1)
    return Batch(
        keys=tuple(f"k{row}" for row in range(count)),
        pixels_BHWC=torch.from_numpy(rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)),
        code_BST=torch.from_numpy(rng.integers(-9, 99, (count, 1 + GRID**2, WIDTH)).astype(np.int8)),
        scale_BS=torch.ones(count, 1 + GRID**2, dtype=torch.float16),
        attention_BL=torch.from_numpy(rng.random((count, GRID**2)).astype(np.float16)),
    )


def rows(batch: Batch, chosen: list[int]) -> Batch:
    assert batch.scale_BS is not None
    return Batch(
        keys=tuple(batch.keys[row] for row in chosen),
        pixels_BHWC=batch.pixels_BHWC[chosen],
        code_BST=batch.code_BST[chosen],
        scale_BS=batch.scale_BS[chosen],
        attention_BL=batch.attention_BL[chosen],
    )


def params_of(masking: Any, target: Any = "clip") -> Params:
    return Params(student=STUDENT, decoder=DECODER, masking=MaskSettings(kind=masking), target=target)


@pytest.mark.parametrize("masking", ["semantic", "random"])
def test_a_sample_has_one_mask_in_any_batch_and_a_new_one_each_epoch(
    masking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Objective(build_student(STUDENT, DECODER, WIDTH), header(), params_of(masking))
    kept: list[list[list[int]]] = []
    draw = module.draw_split

    def spy(*given: Any) -> Any:
        split = draw(*given)
        kept.append(split.keep_BV.tolist())
        return split

    monkeypatch.setattr(module, "draw_split", spy)
    batch = batch_of(6)
    for part, epoch in ((list(range(6)), 3), ([4, 1], 3), ([4], 3), ([4], 4)):
        objective(rows(batch, part), epoch)
    assert [kept[0][4], kept[0][1]] == kept[1]
    assert kept[2][0] == kept[0][4] != kept[3][0]
    assert len(kept[0][0]) == 4


def test_the_mask_follows_the_attention_only_when_it_is_semantic() -> None:
    model = build_student(STUDENT, DECODER, WIDTH).eval()
    flat = batch_of(4)
    peaked = Batch(**{**vars(flat), "attention_BL": torch.linspace(0, 1, GRID**2).half().expand(4, -1)})
    for kind, same in (("random", True), ("semantic", False)):
        objective = Objective(model, header(), params_of(kind))
        assert (objective(flat, 0).item() == objective(peaked, 0).item()) == same


@pytest.mark.parametrize(
    ("target", "decoder", "masking"),
    list(product(["clip", "pixels", "hog"], ["prompting", "plain"], ["semantic", "random"])),
)
def test_every_combination_trains_every_parameter(target: Any, decoder: Any, masking: Any) -> None:
    width = {"clip": WIDTH, "pixels": 3 * 8**2, "hog": 3 * 9}[target]
    model = build_student(STUDENT, DECODER.model_copy(update={"kind": decoder}), width)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros at the start hide what hangs together
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    objective = Objective(model, header(), params_of(masking, target))
    objective(batch_of(4), 0).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("target", "decoder"), [("pixels", "plain"), ("hog", "prompting"), ("clip", "plain")])
def test_the_ablations_run_to_their_end(store: Path, tmp_path: Path, target: str, decoder: str) -> None:
    kind = DECODER.model_copy(update={"kind": decoder})
    report = go(store, tmp_path / "run", target=target, decoder=kind, masking=MaskSettings(kind="random"))
    width = {"clip": WIDTH, "pixels": 3 * 8**2, "hog": 3 * 9}[target]
    assert open_checkpoint(tmp_path / "run").weights("decoder")["decoder_pred.bias"].shape == (width,)
    assert np.isfinite(report.loss)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (STUDENT.model_copy(update={"image_size": 64}), "pixels"),
        (STUDENT.model_copy(update={"patch_size": 16}), "grid"),
    ],
    ids=["size", "grid"],
)
def test_targets_that_do_not_fit_are_refused_before_anything_is_written(
    store: Path, tmp_path: Path, student: StudentSettings, message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        go(store, tmp_path / "run", student=student)
    assert not (tmp_path / "run").exists()


def test_another_schema_is_refused_with_both_versions(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    found = json.loads((store / "shards" / "zarr.json").read_text())
    found["attributes"]["milan_pipe"]["schema_version"] = 99
    (other / "shards").mkdir(exist_ok=True)
    (other / "shards" / "zarr.json").write_text(json.dumps(found))
    with pytest.raises(MismatchError, match=r"schema version 99.*reads 2 and 3"):
        go(other, tmp_path / "run")


def test_a_batch_above_the_data_and_a_store_that_is_not_there(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"24 samples.*batch of 25"):
        go(store, tmp_path / "run", batch_size=25)
    with pytest.raises(MissingError, match="nowhere"):
        go(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert go(store, tmp_path / "run", batch_size=24, epochs=1).steps == 1


@pytest.mark.parametrize("log_every", [1, 4, 1000])
def test_a_loss_that_is_not_finite_names_step_and_batch_and_saves_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    true_loss, calls = module.Part.loss, 0
    keys: list[tuple[str, ...]] = []

    def poisoned(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return true_loss(*given) * (float("nan") if calls == 3 else 1.0)

    noise = module.noise_for

    def noted(masking: MaskSettings, epoch: int, of: tuple[str, ...], grid: tuple[int, int]) -> Any:
        keys.append(of)
        return noise(masking, epoch, of, grid)

    monkeypatch.setattr(module.Part, "loss", poisoned)
    monkeypatch.setattr(module, "noise_for", noted)
    with pytest.raises(DataError, match="nan at step 3 ") as caught:
        go(store, tmp_path / "run", log_every=log_every, epochs=3)
    assert f"{keys[2][0]} ... {keys[2][-1]}" in str(caught.value)
    assert checkpoints_of(tmp_path / "run") == []
    if log_every == 1:  # what was measured before is on disk, the fault is not
        assert json.loads((tmp_path / "run" / "metrics" / "metrics.json").read_text())["step"] == 2
    monkeypatch.undo()
    assert go(store, tmp_path / "run").steps == 6  # a run that failed may be begun again


def test_a_huge_rate_stops_the_run(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lower pretrain\.lr"):
        go(store, tmp_path / "run", lr=1e38, epochs=8)
    assert checkpoints_of(tmp_path / "run") == []


def test_a_run_folder_that_cannot_be_made_is_one_error(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StoreError, match="cannot be made"):
            go(store, place)


def test_metrics_hold_what_was_reported_at_its_own_step(store: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    go(store, tmp_path / "run", epochs=3, log_every=4, on_progress=seen.append)
    assert [p.step for p in seen] == [4, 8, 9]
    folder = tmp_path / "run" / "metrics"
    for name in ("loss", "lr", "images_per_second", "data_wait", "memory"):
        lines = (folder / "plots" / "metrics" / "train" / f"{name}.tsv").read_text().split("\n")[1:-1]
        points = [(int(step), float(value)) for step, value in (line.split("\t")[-2:] for line in lines)]
        assert points == [(p.step, pytest.approx(getattr(p, name))) for p in seen]
    last = json.loads((folder / "metrics.json").read_text())
    assert last["step"] == 9
    assert last["train"]["loss"] == pytest.approx(seen[-1].loss)


def test_neither_images_nor_teacher_are_touched(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("stage 2 asked for the teacher or for images")

    for name in ("load_teacher", "Teacher"):
        monkeypatch.setattr(clip, name, refuse)
    monkeypatch.setattr("milan_pipe.images.tar.read_shard", refuse)
    assert go(store, tmp_path / "run").steps == 6


def test_the_student_loads_into_timm_by_what_the_checkpoint_says(store: Path, tmp_path: Path) -> None:
    go(store, tmp_path / "run")
    opened = open_checkpoint(tmp_path / "run")
    sizes = StudentSettings(**opened.record["student"])
    assert sizes == STUDENT
    model = timm.create_model(
        sizes.model,
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        num_classes=0,
    )
    model.load_state_dict(opened.weights("student"), strict=True)
    assert opened.record["teacher"]["weights_sha256"] == "0"
    assert opened.record["step"] == 6


@pytest.mark.parametrize("bad", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"seed": 2**63}, {"lr": 0}], ids=str)
def test_recipes_that_the_optimiser_would_choke_on_are_refused_at_the_door(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        PretrainSettings.parse(bad, "here")


def test_settings_that_were_stated_must_be_the_stores(store: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"teacher\.model") as caught:
        go(store, tmp_path / "run", teacher={"model": "ViT-B-16"}, views={"count": VIEWS + 1})
    assert "views.count" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_was_left_to_defaults_is_notstated_of() -> None:
    from milan_pipe.config.params import load_params, stated_of

    assert stated_of(Params()) == {"teacher": {}, "views": {}}
    params = load_params(overrides=["teacher=ViT-B-16", "teacher.pretrained=/weights/b16.pt", "views.scale=[0.2, 1]"])
    stated = stated_of(params)
    assert stated["teacher"]["model"] == "ViT-B-16"
    assert stated["teacher"]["pretrained"] == "b16.pt"
    assert stated["views"]["scale"] == [0.2, 1.0]
