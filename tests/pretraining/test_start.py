"""Runs that begin with given weights: the same from wherever they come, with their own positions, and to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.checkpoints import change_record
from support.messages import Case, require_message
from support.targets import header, write_store
from support.training import StopAtError, same_run, stop_at, weights_of
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import save_for_hf

from milan_pipe.api import export
from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import DataError, MismatchError, MissingError
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Loader
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.student.model import build_student
from milan_pipe.targets.schema import BLOCK_SAMPLES
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import open_checkpoint, save_checkpoint
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.task import RunReport

HEAD = header(format="zarr", size=32, grid=(4, 4), width=8)
SIZES = {"model": "vit_tiny_patch16_224", "patch_size": 8, "width": 16, "depth": 2, "heads": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "targets"
    write_store(root, HEAD, [24])
    return root


def go(store: Path, run: Path, init: object = None, decoder: object = None, **recipe: Any) -> RunReport:
    fixed = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0, "log_every": 1, "device": "cpu", "shuffle_blocks": 1}
    on_progress = recipe.pop("on_progress", lambda _: None)
    student = StudentSettings(image_size=32, **SIZES, init=None if init is None else str(init))
    params = Params(
        student=student,
        decoder=DecoderSettings(width=16, depth=1, heads=2, init=None if decoder is None else str(decoder)),
        pretrain=PretrainSettings(**{**fixed, **recipe}),
    )
    return pretrain(store, run, params, on_progress=on_progress)


@pytest.fixture(scope="module")
def first(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and beside it its student as `export` writes it."""
    folder = tmp_path_factory.mktemp("first")
    go(store, folder / "run")
    export(folder / "run", folder / "vit")
    return folder


def test_an_exported_student_goes_on_as_if_never_exported(store: Path, first: Path, tmp_path: Path) -> None:
    go(store, tmp_path / "run", first / "run")
    (checkpoint,) = (first / "run" / "checkpoints").iterdir()
    file = first / "vit" / "model.safetensors"
    vit = first / "vit"
    for number, init in enumerate((checkpoint, vit, f"local-dir:{vit}", f"timm:local-dir:{vit}", file)):
        go(store, tmp_path / str(number), init)
        assert same_run(tmp_path / str(number), tmp_path / "run"), init
    # A rate of nothing shows what it began with.
    go(store, tmp_path / "still", vit, lr=1e-30)
    began, exported = weights_of(tmp_path / "still"), open_checkpoint(first / "run").weights("student")
    assert all(torch.equal(began[name], value) for name, value in exported.items())
    kept = json.loads((tmp_path / "0" / "init.json").read_text())
    assert kept["trains_positions"] is False
    assert open_checkpoint(tmp_path / "0").record["init"] == kept
    assert kept["sha256"] == json.loads((tmp_path / "1" / "init.json").read_text())["sha256"]


def test_with_its_decoder_an_exported_student_has_the_loss_that_it_had(
    store: Path, first: Path, tmp_path: Path
) -> None:
    seen: list[float] = []
    go(store, tmp_path / "run", first / "vit", first / "run", on_progress=lambda now: seen.append(now.loss))
    params = Params(
        student=StudentSettings(image_size=32, **SIZES), decoder=DecoderSettings(width=16, depth=1, heads=2)
    )
    objective = build_objective(HEAD, params, torch.device("cpu"))
    opened, reader = open_checkpoint(first / "run"), open_targets(store)
    objective.student.encoder.load_state_dict(opened.weights("student"))
    objective.student.decoder.load_state_dict(opened.weights("decoder"))
    order = EpochOrder(samples=(24,), views=HEAD.views.count, block=BLOCK_SAMPLES, shuffle_blocks=1, seed=0)
    with Loader(reader, BatchPlan(order=order, batch_size=8), threads=1, with_targets=True) as loader:
        batch = next(loader.batches(0))
    assert seen[0] == pytest.approx(float(objective(batch, 0).detach()), abs=1e-5)
    fresh: list[float] = []
    go(store, tmp_path / "fresh", first / "vit", on_progress=lambda now: fresh.append(now.loss))
    assert fresh[0] != pytest.approx(seen[0], abs=1e-3)


def timm_folder(folder: Path, side: int) -> Any:
    """A timm model with position embeddings of its own, and a classifier."""
    torch.manual_seed(3)
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": side}
    model: Any = timm.create_model(SIZES["model"], pretrained=False, num_classes=5, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return model


@pytest.mark.parametrize("side", [32, 48])
def test_weights_with_positions_of_their_own_keep_and_train_them(store: Path, tmp_path: Path, side: int) -> None:
    model = timm_folder(tmp_path / "vit", side)
    go(store, tmp_path / "still", tmp_path / "vit", lr=1e-30)
    began = weights_of(tmp_path / "still")
    position = resample_abs_pos_embed(model.pos_embed.detach(), [4, 4], num_prefix_tokens=1)
    assert torch.equal(began["pos_embed"], position)
    assert torch.equal(began["blocks.1.mlp.fc1.weight"], model.blocks[1].mlp.fc1.weight)
    go(store, tmp_path / "whole", tmp_path / "vit", lr=0.1, epochs=2)
    assert not torch.equal(weights_of(tmp_path / "whole")["pos_embed"], position)
    with pytest.raises(StopAtError):
        go(store, tmp_path / "run", tmp_path / "vit", lr=0.1, epochs=2, checkpoint_every=2, on_progress=stop_at(4))
    # What it began with is no longer needed.
    shutil.rmtree(tmp_path / "vit")
    go(store, tmp_path / "run", tmp_path / "vit", lr=0.1, epochs=2, checkpoint_every=2)
    assert same_run(tmp_path / "whole", tmp_path / "run")


def test_layer_decay_goes_through_the_encoder_alone() -> None:
    model = build_student(StudentSettings(image_size=32, **SIZES), DecoderSettings(width=16, depth=1, heads=2), 8)
    optimiser = build_adamw(model, lr=1, betas=(0.9, 0.95), weight_decay=0.05, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale = {names[p]: group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.cls_token"] == 0.125
    assert scale["encoder.blocks.0.mlp.fc1.weight"] == 0.25
    assert scale["encoder.blocks.1.attn.qkv.bias"] == 0.5
    below = ("encoder.blocks", "encoder.patch", "encoder.cls")
    assert {value for name, value in scale.items() if not name.startswith(below)} == {1}


def begin(init: Callable[[], object], **recipe: Any) -> Callable[[], RunReport]:
    def run() -> RunReport:
        write_store("t", HEAD, [24])
        return go(Path("t"), Path("run"), init(), **recipe)

    return run


def other_weights() -> str:
    save_file({"blocks.0.x": torch.ones(1)}, "w.safetensors")
    return "w.safetensors"


def tuned() -> str:
    save_checkpoint(Path("tuned"), 1, {"student": {"a": torch.ones(1)}}, {"task": "finetune", "student": {}})
    return "tuned"


def smaller() -> str:
    torch.manual_seed(0)
    model: Any = timm.create_model(SIZES["model"], pretrained=False, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    save_for_hf(model, "small", model_args={"embed_dim": 8, "depth": 1, "num_heads": 2}, safe_serialization=True)
    return "small"


def with_decoder_of(run: str, width: int = 8) -> Callable[[], RunReport]:
    def begin_with() -> RunReport:
        write_store("t", HEAD.model_copy(update={"teacher": HEAD.teacher.model_copy(update={"width": width})}), [24])
        write_store("other", HEAD, [24])
        go(Path("other"), Path("first"))
        return go(Path("t"), Path("run"), decoder=run)

    return begin_with


def lost_start() -> RunReport:
    write_store("t", HEAD, [24])
    timm_folder(Path("vit"), 32)
    with pytest.raises(StopAtError):
        go(Path("t"), Path("run"), "vit", checkpoint_every=1, on_progress=stop_at(2))
    Path("run/init.json").unlink()
    return go(Path("t"), Path("run"), "vit", checkpoint_every=1)


def other_heads(part: str) -> Callable[[], RunReport]:
    def begin_with() -> RunReport:
        write_store("t", HEAD, [24])
        go(Path("t"), Path("first"))
        (file,) = Path("first/checkpoints").glob("*/checkpoint.json")

        def change(record: dict[str, Any]) -> None:
            (record["settings"][part] if part == "decoder" else record[part])["heads"] = 4

        change_record(file.parent, change)
        if part == "decoder":
            return go(Path("t"), Path("run"), decoder="first")
        export("first", "exported")
        with pytest.raises(MismatchError, match=r"exported was trained with 4 heads"):
            go(Path("t"), Path("run"), "exported")
        return go(Path("t"), Path("run"), "first")

    return begin_with


SIZES_OF = "Set student.model and its sizes to the weights'"
CASES: dict[str, Case] = {
    "nothing there": (
        begin(lambda: "gone"),
        MissingError,
        "student.init: gone is not there; expected a run, a checkpoint, a folder or file of weights in timm's layout, "
        "timm:NAME or hf-hub:ORG/NAME",
    ),
    "weights of another model": (
        begin(other_weights),
        MismatchError,
        "student.init: w.safetensors does not fit 'vit_tiny_patch16_224': it lacks cls_token, ...; it "
        f"also has blocks.0.x. {SIZES_OF}",
    ),
    "weights of another size": (
        begin(smaller),
        MismatchError,
        "student.init: small does not fit 'vit_tiny_patch16_224': it lacks blocks.1...; ... is ..., "
        f"expected .... {SIZES_OF}",
    ),
    "a fine-tuned student": (
        begin(tuned),
        DataError,
        "student.init: tuned/checkpoints/step-00000001 holds what `milan-pipe finetune` trained; name a run of "
        "pretrain",
    ),
    "no run of a decoder": (
        with_decoder_of("gone"),
        MissingError,
        "decoder.init: gone is not there; expected a run or a checkpoint of pretrain",
    ),
    "a decoder of another teacher": (
        with_decoder_of("first", 12),
        MismatchError,
        "decoder.init: first does not fit this decoder and target: decoder_pred.weight is (8, 16), expected (12, 16), "
        "decoder_pred.bias is (8,), expected (12,)",
    ),
    "a student of other heads": (
        other_heads("student"),
        MismatchError,
        "student.init: first was trained with 4 heads, 'vit_tiny_patch16_224' has 2: the same weights would compute "
        "something else. Set student.heads=4",
    ),
    "a decoder of other heads": (
        other_heads("decoder"),
        MismatchError,
        "decoder.init: first was trained with 4 heads, this decoder has 2: the same weights would compute something "
        "else. Set decoder.heads=4",
    ),
    "a start that is lost": (
        lost_start,
        DataError,
        "run/init.json, which says what the run began with, cannot be read (FileNotFoundError); name another folder "
        "for a new run",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
