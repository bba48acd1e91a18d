"""Links within a run lead no writing and no page elsewhere; what is no regular file is not waited for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.images import png
from support.targets import header, write_store

from milan_pipe.cli.reports import _extraction
from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError, StoreError
from milan_pipe.evaluation.batches import BadImages
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.images.prepare import prepare
from milan_pipe.interop.push import push
from milan_pipe.pretraining.start import kept_start
from milan_pipe.reports.report import _segment_images
from milan_pipe.storage import local
from milan_pipe.targets.convert import convert_targets
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.lock import only_writer
from milan_pipe.training.metrics import CURVES, MetricWriter
from milan_pipe.training.sinks import open_sinks
from milan_pipe.weights_file import load_tensors, write_weights


@pytest.fixture
def other(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "file"
    file.parent.mkdir()
    file.write_text("as it was")
    return file


def test_a_link_leads_no_writing_elsewhere(tmp_path: Path, other: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    curve = run / CURVES / "train" / "loss.tsv"
    bad = run / "bad_samples.jsonl"
    for link in (run / ".lock", curve, bad, out / ".prepare-is-running"):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(other)
    with (
        pytest.raises(StoreError, match=r"\.lock cannot be opened"),
        only_writer(run, Ranks(0, 1, torch.device("cpu"))),
    ):
        pass
    with pytest.raises(StoreError, match="Too many levels of symbolic links"):
        MetricWriter(run, resume=True).point(1, {"train/loss": 0.5})
    other.write_text('{"key": "a", "reason": "b"}\n{"key": ')
    before = other.read_text()
    with pytest.raises(StoreError, match=r"bad_samples\.jsonl cannot be read: Too many levels of symbolic links"):
        BadImages(bad)
    prepare("demo", out, PrepareSettings(train_scenes=1, test_scenes=0), workers=1)
    assert other.read_text() == before


def test_a_link_brings_no_other_file_into_a_report(tmp_path: Path, other: Path) -> None:
    images = tmp_path / "run" / "images"
    images.mkdir(parents=True)
    (images / "step-1.png").write_bytes(png(np.zeros((2, 3, 3), np.uint8)))
    run: Any = SimpleNamespace(name="r", task="segment", folder=tmp_path / "run")
    drawn = _segment_images([run])
    assert len(drawn) == 1
    (images / "step-2.png").symlink_to(other)
    (images / "step-3.png").symlink_to(tmp_path / "gone")
    os.mkfifo(images / "step-4.png")
    assert _segment_images([run]) == drawn


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    names = (
        "kept/knn-1.json",
        "run/checkpoints/step-00000001/checkpoint.json",
        "run/bad_samples.jsonl",
        "run/init.json",
        "run/.lock",
        "images/.prepare-is-running",
        "extraction.json",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        read_evaluations(tmp_path / "kept")
    with pytest.raises((DataError, StoreError), match=r"checkpoint\.json"):
        open_checkpoint(tmp_path / "run")
    with pytest.raises(StoreError, match=r"bad_samples\.jsonl cannot be read: not a regular file"):
        BadImages(tmp_path / "run" / "bad_samples.jsonl")
    with pytest.raises(DataError, match=r"init\.json, which says what the run began with, cannot be read"):
        kept_start(tmp_path / "run")
    with pytest.raises(DataError, match=r"--extraction .* cannot be read: .*not a regular file"):
        _extraction(tmp_path / "extraction.json")
    with (
        pytest.raises(StoreError, match=r"\.lock cannot be opened: not a regular file"),
        only_writer(tmp_path / "run", Ranks(0, 1, torch.device("cpu"))),
    ):
        pass
    assert prepare("demo", tmp_path / "images", PrepareSettings(train_scenes=1, test_scenes=0), workers=1).shards


def test_a_file_that_says_that_it_is_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MOST_READ_WHOLE", 9)
    for name in ("knn-1.json", "bad_samples.jsonl", "header.json"):
        (tmp_path / name).write_text('{"version": 1}')
    with pytest.raises(DataError, match="larger than 9 bytes"):
        read_evaluations(tmp_path)
    with pytest.raises(StoreError, match="larger than 9 bytes"):
        BadImages(tmp_path / "bad_samples.jsonl")
    with pytest.raises(StoreError, match="larger than 9 bytes"):
        open_targets(tmp_path)


def test_a_list_of_skipped_images_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    """As of a finished run of somebody else."""
    file = tmp_path / "bad_samples.jsonl"
    file.write_text('{"key": "a", "reason": "b"}\n')
    opened: list[int] = []

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and given[0] == str(file):
            opened.append(given[2])

    sys.addaudithook(audit)
    BadImages(file)
    assert opened
    assert not any(flags & (os.O_WRONLY | os.O_RDWR) for flags in opened)


@pytest.mark.parametrize("name", ["checkpoints", "metrics/plots"])
def test_a_link_to_a_folder_leads_no_run_elsewhere(tmp_path: Path, name: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (other / "step-00000001").mkdir(parents=True)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(other)
    ranks = Ranks(0, 1, torch.device("cpu"))
    with (
        pytest.raises(StoreError, match=rf"{name} is a link to {other}, where nothing is written"),
        only_writer(run, ranks),
    ):
        pass
    # One that stays in the run is none of a stranger, and a run may be a link as a whole.
    (run / name).unlink()
    (run / "real").mkdir()
    (run / name).symlink_to(run / "real")
    (tmp_path / "elsewhere").symlink_to(run)
    with only_writer(tmp_path / "elsewhere", ranks):
        pass


@pytest.mark.parametrize("name", ["manifest", "shards"])
def test_a_link_to_a_folder_leads_no_store_elsewhere(tmp_path: Path, name: str) -> None:
    write_store(tmp_path / "source", header(format="webdataset"), [5])
    write_store(tmp_path / "t", header(), [5])
    (tmp_path / "t" / name).rename(tmp_path / "other")
    (tmp_path / "t" / name).symlink_to(tmp_path / "other")
    with pytest.raises(StoreError, match=f"{name} is a link to {tmp_path}/other, where nothing is written"):
        convert_targets(tmp_path / "source", tmp_path / "t", format="zarr")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["metrics.json", "plots/metrics/train/loss.tsv"])
def test_dvclive_follows_no_link_and_waits_for_no_pipe(tmp_path: Path, other: Path, name: str, kind: str) -> None:
    pytest.importorskip("dvclive")
    file = tmp_path / "metrics" / name
    file.parent.mkdir(parents=True)
    if kind == "link":
        file.symlink_to(other)
    else:
        os.mkfifo(file)
    with pytest.raises(StoreError, match=r"metrics.* cannot be written"), open_sinks(tmp_path / "metrics", (), 4, {}):
        pass
    assert other.read_text() == "as it was"


def test_a_link_publishes_no_other_weights(tmp_path: Path, other: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "student.safetensors").symlink_to(other)
    with pytest.raises(DataError, match=f"is a link to {other}, out of its folder"):
        push(tmp_path / "run", "me/mine", dry_run=True)


def test_weights_at_a_path_that_is_no_utf8_are_not_called_damaged(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights({"a": torch.ones(2)}, file)
    moved = file.rename(tmp_path / os.fsdecode(b"\xff.safetensors"))
    with pytest.raises(StoreError, match="its path is no UTF-8, which safetensors does not open; rename it"):
        load_tensors(moved)
