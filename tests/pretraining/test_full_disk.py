"""A disk that is full at any write of a run: one line, and with more room the same command ends as if unbroken."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import pytest
from support.counts import Counted
from support.disks import small_disk
from support.targets import header, write_store
from support.training import same_run, small_params

from milan_pipe.errors import StoreError
from milan_pipe.pretraining.run import pretrain

PAGE = 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "targets"
    write_store(root, header(), [40])
    return root


def go(store: Path, run: Path) -> None:
    params = small_params(header(), epochs=3, batch_size=10, log_every=1, checkpoint_every=3)
    pretrain(store, run, params)


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    go(store, run)
    return run


def goes_on(store: Path, whole: Path, disk: Path, size: int) -> bool:
    """Whether the disk was too small."""
    with small_disk(disk, size):
        try:
            go(store, disk / "run")
        except StoreError as error:
            message: str | None = str(error)
        else:
            message = None
        if message is not None:
            assert "No space left" in message
            assert "\n" not in message
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        with warnings.catch_warnings():
            # Of a line that was cut.
            warnings.filterwarnings("ignore", message=".*is damaged.*", category=RuntimeWarning)
            go(store, disk / "run")
        assert same_run(disk / "run", whole)
        assert not [path for path in (disk / "run").rglob(".*") if path.name != ".dvc"]
    return message is not None


def sizes(whole: Path, count: int) -> list[int]:
    """From one page to more than a run takes, with a checkpoint in the making."""
    needed = 3 * sum(-(-path.stat().st_size // PAGE) * PAGE for path in whole.rglob("*") if path.is_file())
    return [PAGE + number * needed // (count - 1) for number in range(count)]


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_full_disk_is_one_line_and_goes_on(store: Path, whole: Path, tmp_path: Path, number: int) -> None:
    assert goes_on(store, whole, tmp_path / "disk", sizes(whole, 20)[number])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_sizes_of_a_full_disk(store: Path, whole: Path, tmp_path: Path, counted: Counted) -> None:
    full = [goes_on(store, whole, tmp_path / str(number), size) for number, size in enumerate(sizes(whole, 50))]
    assert full[0]
    assert not full[-1]
    counted("disk full during `pretrain`, 50 sizes", sum(full), "one line; with room, the end of an unbroken run")
