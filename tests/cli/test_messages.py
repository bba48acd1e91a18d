"""What the command line says of its own, word for word; the rest is what the functions behind it raise."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.messages import Case, require_message

from milan_pipe import cli
from milan_pipe.cli.console import progress
from milan_pipe.errors import MissingError, SettingError

CASES: dict[str, Case] = {
    "probe of the teacher": (
        lambda: cli.linear_probe("teacher", "train", "test"), SettingError,
        "the teacher has no linear probe by protocol; add --quick",
    ),
    "format": (
        lambda: cli.convert_targets("a", "b", store_format="tar"), SettingError,
        "--format, format: should be 'zarr' or 'webdataset', found 'tar'",
    ),
    "settings": (
        lambda: cli.pretrain("targets", "run", overrides=["pretrain.epoch=3"]), SettingError,
        "unknown key 'epoch' in the settings, pretrain; did you mean 'epochs'?",
    ),
    "flag as a setting": (
        lambda: cli.extract_targets(["images"], "targets", workers="0"), SettingError,
        "the settings, extract.workers: expected auto, or a number of at least 1, found 0",
    ),
    "params file": (
        lambda: cli.knn("run", "a", "b", params=Path("none.yaml")), MissingError, "params file none.yaml is not there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_messages(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(case)


def test_progress_in_a_log_is_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("milan_pipe.cli.console._LOG_SECONDS", 0.0)
    with progress("images_per_second", "loss", what="shards") as update:
        for done in (100, 103):
            update(done, 113, images_per_second=0.1, loss=2.34567)
        monkeypatch.setattr("milan_pipe.cli.console._LOG_SECONDS", 1000.0)
        update(104, 113, images_per_second=0.1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "100 of 113, 0.1/s, loss 2.346, shards"
    assert re.fullmatch(r"103 of 113, 0\.1/s, loss 2\.346, shards, 0:00:0\d left", second)


def test_time_left_leaves_preparation_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 100.0, 200.0, 201.0])
    monkeypatch.setattr("milan_pipe.cli.console._LOG_SECONDS", 0.0)
    monkeypatch.setattr("milan_pipe.cli.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress("what") as update:
        for done, what in ((0, "reading"), (0, "reading"), (1, "")):
            update(done, 10, what=what)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "1 of 10, 1/s, 0:00:09 left"
