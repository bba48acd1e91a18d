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

from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError, StoreError
from milan_pipe.evaluation.batches import BadImages
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.images.prepare import prepare
from milan_pipe.pretraining.start import kept_start
from milan_pipe.reports.report import _segment_images
from milan_pipe.storage import local
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.lock import only_writer
from milan_pipe.training.metrics import CURVES, MetricWriter


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
