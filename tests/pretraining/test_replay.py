"""A batch that stopped a run is kept with the weights that met it, and computed again."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import processes
from support.targets import header, random_blocks, write_blocks

from milan_pipe.api import replay
from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import DataError, MissingError, SettingError
from milan_pipe.pretraining.run import pretrain
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint

HEAD = header(format="zarr", shards=1)
COUNT, BATCH = 60, 10
STUDENT = StudentSettings(
    image_size=HEAD.views.size, patch_size=HEAD.views.size // HEAD.teacher.grid[0], width=16, depth=2, heads=2
)


def write(root: Path, broken_row: int | None = None) -> Path:
    blocks = random_blocks(HEAD, COUNT)
    if broken_row is not None:
        scale = blocks[0].scale_KNS
        assert scale is not None
        scale[:, broken_row, 1] = float("inf")
    write_blocks(root, HEAD, [blocks])
    return root


def go(store: Path, run: Path, **change: Any) -> None:
    recipe: dict[str, Any] = {"epochs": 3, "batch_size": BATCH, "device": "cpu", "checkpoint_minutes": None}
    pretrain(
        store,
        run,
        Params(
            student=STUDENT,
            decoder=DecoderSettings(width=16, depth=1, heads=2),
            pretrain=PretrainSettings(**{**recipe, **change}),
        ),
    )


def the_file(run: Path) -> Path:
    files = list((run / "not-finite").iterdir())
    assert len(files) == 1
    return files[0]


def test_a_value_that_is_not_finite_is_found_and_named(tmp_path: Path) -> None:
    store, run = write(tmp_path / "targets", broken_row=23), tmp_path / "run"
    with pytest.raises(DataError, match=r"nan at step [1-6] ") as caught:
        go(store, run)
    file = the_file(run)
    assert str(file) in str(caught.value)
    assert file.stat().st_mode == (run / "metrics" / "metrics.json").stat().st_mode
    report = replay(file)
    assert f"at step {report.step} " in str(caught.value)
    key = next(iter(report.loss_by_key))
    assert key.endswith("-0-23")
    assert math.isnan(report.loss_by_key.pop(key))
    assert all(math.isfinite(loss) for loss in report.loss_by_key.values())
    assert len(report.loss_by_key) == BATCH - 1
    assert math.isnan(report.loss)
    assert report.gradient
    assert report.stored == {"pixels_BHWC": 0, "code_BST": 0, "scale_BS": 1, "attention_BL": 0, "weights": 0}


@pytest.mark.parametrize("log_every", [1, 1000])
def test_the_weights_are_those_that_met_the_batch(tmp_path: Path, log_every: int) -> None:
    store = write(tmp_path / "targets")
    change: dict[str, Any] = {"lr": 1e36, "warmup_epochs": 0}
    with pytest.raises(DataError, match="last good checkpoint"):
        go(store, tmp_path / "saved", checkpoint_every=1, **change)
    with pytest.raises(DataError, match=r"lower pretrain\.lr"):
        go(store, tmp_path / "late", log_every=log_every, **change)
    file = the_file(tmp_path / "late")
    report = replay(file)
    before = open_checkpoint(checkpoints_of(tmp_path / "saved")[-1])
    assert before.record["step"] == report.step - 1
    kept = load_file(file)
    for part in ("student", "decoder"):
        for name, value in before.weights(part).items():
            assert torch.equal(kept[f"{part}/{name}"], value), name
    assert not math.isfinite(report.grad_norm) or not math.isfinite(report.loss)
    assert report.stored["weights"] == 0


def test_the_command_says_it_and_a_wrong_file_is_one_error(tmp_path: Path) -> None:
    store, run = write(tmp_path / "targets", broken_row=5), tmp_path / "run"
    with pytest.raises(DataError):
        go(store, run, precision="bfloat16")
    file = the_file(run)
    words = [sys.executable, "-m", "milan_pipe", "replay", str(file), "--precision", "float32", "--json"]
    done = processes.run(words, capture_output=True, text=True, check=True)
    assert "1 in scale_BS" in done.stderr
    report = json.loads(done.stdout)
    assert report["precision"] == "float32"
    with pytest.raises(MissingError, match="is not there"):
        replay(tmp_path / "none")
    for wrong in (b"", file.read_bytes()[:400]):
        (tmp_path / "cut").write_bytes(wrong)
        with pytest.raises(DataError, match="damaged"):
            replay(tmp_path / "cut")
    with pytest.raises(SettingError, match="cannot be used"):
        replay(file, device="cuda:77")
    with safe_open(file, "pt") as opened:
        assert "milan_pipe" in opened.metadata()


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    with pytest.raises(DataError):
        go(write(root / "targets", broken_row=23), root / "run")
    return the_file(root / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", 5),
        ("step", None),
        ("epoch", "x"),
        ("header", {}),
        ("header", HEAD.model_dump(mode="json") | {"format": "a"}),
        ("header", header(width=7).model_dump(mode="json")),
        ("header", header(grid=(2**30, 2**30)).model_dump(mode="json")),
        ("others", [5]),
        ("keys", ["a"]),
    ],
)
def test_a_file_whose_words_do_not_fit_is_one_error(batch_file: Path, tmp_path: Path, name: str, value: object) -> None:
    with safe_open(batch_file, "pt") as opened:
        metadata = json.loads(opened.metadata()["milan_pipe"])
    save_file(load_file(batch_file), tmp_path / "b", {"milan_pipe": json.dumps(metadata | {name: value})})
    with pytest.raises(DataError, match="holds no batch of"):
        replay(tmp_path / "b")


def test_no_file_has_a_compiler_started(batch_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(batch_file, "pt") as opened:
        metadata = json.loads(opened.metadata()["milan_pipe"])
    metadata["pretrain"]["compile"] = True
    save_file(load_file(batch_file), tmp_path / "b", {"milan_pipe": json.dumps(metadata)})
    compiled: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *given, **_: compiled.append(given))
    replay(tmp_path / "b")
    assert compiled == []
