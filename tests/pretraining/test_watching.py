"""Images of masks and predictions, and the places that metrics go to."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.targets import header, write_store

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.drawing.patches import heat
from milan_pipe.drawing.sheet import draw_sheet, mask_sheet
from milan_pipe.errors import MissingError, StoreError
from milan_pipe.evaluation.features import LabelledFeatures, kept_features
from milan_pipe.interop.timm_layout import export_student
from milan_pipe.pretraining.run import pretrain
from milan_pipe.storage.local import write_file

HEAD = header(format="zarr", shards=1)
STUDENT = StudentSettings(
    image_size=HEAD.views.size, patch_size=HEAD.views.size // HEAD.teacher.grid[0], width=16, depth=1, heads=2
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "targets"
    write_store(root, HEAD, [40])
    return root


def go(store: Path, run: Path, target: str = "clip", **change: Any) -> None:
    recipe: dict[str, Any] = {"epochs": 4, "batch_size": 10, "device": "cpu", "log_every": 2}
    pretrain(
        store,
        run,
        Params(
            student=STUDENT,
            decoder=DecoderSettings(width=16, depth=1, heads=2),
            target=target,
            pretrain=PretrainSettings(**{**recipe, **change}),
        ),
    )


def loss_curve(run: Path) -> str:
    return (run / "metrics" / "plots" / "metrics" / "train" / "loss.tsv").read_text()


def losses(run: Path) -> list[str]:
    return [line.split("\t")[-1] for line in loss_curve(run).splitlines()]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_and_folders_follow_the_umask(store: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        go(store, tmp_path / "run", plot_every=2, checkpoint_every=3)
        export_student(tmp_path / "run", tmp_path / "out")
        features = LabelledFeatures(features_NF=torch.ones(2, 3), label_N=torch.zeros(2, dtype=torch.int64))
        kept_features(tmp_path / "features", {}, lambda: features)
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    weights = {path.name for path in found if path.suffix == ".safetensors"}
    assert weights >= {"student.safetensors", "optimizer.safetensors", "model.safetensors"}
    assert list((tmp_path / "features").iterdir())
    assert {path: mode for path, mode in found.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask} == {}


@pytest.mark.parametrize("target", ["clip", "pixels", "hog"])
def test_images_come_when_they_are_due_and_change_nothing(store: Path, tmp_path: Path, target: str) -> None:
    go(store, tmp_path / "with", target, plot_every=2)
    go(store, tmp_path / "without", target)
    files = sorted(path.name for path in (tmp_path / "with" / "predictions").iterdir())
    assert files == ["epoch-0002.png", "epoch-0004.png"]
    assert not (tmp_path / "without" / "predictions").exists()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    first, second = (np.asarray(Image.open(tmp_path / "with" / "predictions" / name)) for name in files)
    assert first.shape == second.shape
    assert (first != second).any()


def test_a_image_shows_view_mask_and_cosine_where_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    visible = np.array([[True, False, False, True]])
    cosine = np.array([[0.0, 1.0, 0.5, float("nan")]])
    write_file(tmp_path / "x.png", draw_sheet(mask_sheet("title", ("k",), pixels, visible, cosine, (2, 2))))
    sheet = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    top, lefts, side = 8 + 3 * 14, (8, 208, 408), 192

    def panel(number: int) -> np.ndarray:
        return sheet[top : top + side : 12, lefts[number] : lefts[number] + side : 12]

    assert (panel(0) == pixels[0]).all()
    assert (panel(1)[:8, :8] == pixels[0, :8, :8]).all()
    assert (panel(1)[8:, 8:] == pixels[0, 8:, 8:]).all()
    assert (panel(1)[:8, 8:] == 112).all()
    colours = heat(np.array([0.0, 1.0, 0.5]))
    assert (panel(2)[:8, :8] == colours[0]).all()
    assert (panel(2)[:8, 8:] == colours[1]).all()
    assert (panel(2)[8:, :8] == colours[2]).all()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_file(tmp_path / "file" / "x.png", b"")


def test_tensorboard_has_the_same_points(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(store, tmp_path / "run", sinks=("tensorboard",), plot_every=4)
    events = EventAccumulator(str(tmp_path / "run" / "metrics" / "tensorboard"))
    events.Reload()
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("train/loss")]
    lines = loss_curve(tmp_path / "run").splitlines()
    at = [lines[0].split("\t").index(name) for name in ("step", "loss")]
    points = [tuple(line.split("\t")[column] for column in at) for line in lines[1:]]
    assert [(int(step), float(value)) for step, value in points] == found
    assert [image.step for image in events.Images("images")] == [16]


def test_wandb_takes_a_run_offline(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed; timm imports it into every process where it is")
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    monkeypatch.setitem(os.environ, "WANDB_SILENT", "true")
    go(store, tmp_path / "run", sinks=("wandb",))
    files = list((tmp_path / "run" / "metrics" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"train/loss" in files[0].read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_that_is_not_installed_is_one_error(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=r"milan-pipe\[sinks\]"):
        go(store, tmp_path / "run", sinks=(name,))
