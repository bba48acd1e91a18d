"""Shares of a batch queue, sources that change, a full disk, and memory that does not grow."""

from __future__ import annotations

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from support import processes
from support.disks import small_disk
from support.extraction import command, every_file

from milan_pipe.config.images import PrepareSettings, ViewSettings
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.extraction.run import ExtractProgress
from milan_pipe.images.prepare import prepare
from milan_pipe.targets.store import open_targets

DEADLINE = 120.0


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight shards of six scenes, and their targets from an unbroken run."""
    folder = tmp_path_factory.mktemp("many")
    prepare("demo", folder / "images", PrepareSettings(train_scenes=48, test_scenes=0, samples_per_shard=6), workers=1)
    processes.run(command(folder / "images", folder / "whole"), check=True, capture_output=True, cwd=folder)
    return folder / "images", folder / "whole"


# --- a batch queue ------------------------------------------------------------------------------------------------


def test_shares_of_a_batch_queue_at_once(many: tuple[Path, Path], tmp_path: Path) -> None:
    images, whole = many
    targets = tmp_path / "t"
    runs = [
        processes.Popen(command(images, targets, "--shards", f"{share}/3"), cwd=tmp_path, stderr=subprocess.PIPE)
        for share in range(3)
    ]
    for run in runs:
        stderr = run.communicate(timeout=DEADLINE)[1]
        assert run.returncode == 0, stderr
    assert every_file(targets) == every_file(whole)


def test_one_share_after_another(images: Path, whole, extract, tree, tmp_path: Path) -> None:
    targets = tmp_path / "t"
    reports = [extract(images, targets, shards=f"{share}/2") for share in range(2)]
    assert [(report.shards, report.complete) for report in reports] == [(2, False), (3, True)]
    assert tree(targets) == tree(whole[0])


def test_with_nothing_left_to_do_what_a_killed_run_left_is_cleared(
    images: Path, whole, extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"milan-pipe-dask-{platform.node()}-{gone.pid}-x").mkdir()
    assert extract(images, whole[0], workers=2).skipped == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", ["2/2", "-1/2", "1", "1/0", "a/b", "0/2 "])
def test_no_such_share(images: Path, extract, tmp_path: Path, share: str) -> None:
    with pytest.raises(SettingError, match="i/n"):
        extract(images, tmp_path / "t", shards=share)


# --- sources that change ------------------------------------------------------------------------------------------


def other_images(images: Path, number: int) -> None:
    """Exchange two images of a shard: the same size, other bytes."""
    path = sorted(images.glob("*.tar"))[number]
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]

    def is_image(name: str) -> bool:
        return name.endswith(".png") and not name.endswith(".mask.png")

    contents = [data for member, data in members if is_image(member.name)]
    contents = [*contents[1:], contents[0]]
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            content = contents.pop(0) if is_image(member.name) else data
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert path.stat().st_size == size


def test_a_changed_source_is_found_and_done_again(images: Path, extract, tree, tmp_path: Path) -> None:
    own, targets = tmp_path / "images", tmp_path / "t"
    shutil.copytree(images, own)
    extract(own, targets)
    before = tree(targets)
    other_images(own, 1)
    assert extract(own, targets).skipped == 3
    with pytest.raises(MismatchError, match="another sha256"):
        extract(own, targets, verify_sources=True)
    assert tree(targets) == before
    report = extract(own, targets, redo=["000001"], verify_sources=True)
    assert (report.skipped, report.views) == (2, 20)
    extract(own, tmp_path / "fresh")
    assert tree(targets) == tree(tmp_path / "fresh") != before
    path = sorted(own.glob("*.tar"))[2]
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(MismatchError, match=r"bytes, \d+ when it was"):
        extract(own, targets)
    with pytest.raises(DataError, match="no shard '000009'"):
        extract(own, targets, redo=["000009"])


# --- progress, disk, memory ---------------------------------------------------------------------------------------


def test_progress_over_two_workers_adds_up(images: Path, extract, tmp_path: Path) -> None:
    reported: list[ExtractProgress] = []
    extract(images, tmp_path / "t", workers=2, teacher_threads=1, on_progress=reported.append)
    assert reported[-1].shards_done == reported[-1].shards == 3
    assert reported[-1].views == 48
    assert max(now.views for now in reported) == 48
    assert {now.workers for now in reported} >= {2}
    assert all(a.shards_done <= b.shards_done for a, b in pairwise(reported))


def test_a_full_disk_under_two_workers(many: tuple[Path, Path], tmp_path: Path) -> None:
    images, whole = many
    expected = every_file(whole)
    needed = sum(-(-len(data) // 4096) * 4096 for data in expected.values())
    disk = tmp_path / "disk"
    with small_disk(disk, needed // 2):
        done = processes.run(
            command(images, disk / "t", "--workers", "2"), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "No space left" in errors[0]
        assert "the same command goes on" in errors[0]
        assert "Traceback" not in done.stderr
        committed = sorted(path.stem for path in (disk / "t" / "manifest").glob("*.json"))
        assert 0 < len(committed) < 8
        for name in committed:
            for path, data in expected.items():
                if path.startswith((f"{name}/", f"manifest/{name}")):
                    assert (disk / "t" / path).read_bytes() == data
        subprocess.run(["mount", "-o", f"remount,size={4 * needed}", str(disk)], check=True)
        processes.run(command(images, disk / "t", "--workers", "2"), cwd=tmp_path, check=True, capture_output=True)
        assert every_file(disk / "t") == expected


PEAK = """
import resource, sys
from milan_pipe.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def peak_bytes(images: object, folder: Path, name: str, store_format: str) -> int:
    words = command(images, folder / name, "--format", store_format)[3:]
    done = processes.run([sys.executable, "-c", PEAK, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, store_format: str) -> None:
    """Two hundred shards need what ten need, and a shard of 4,000 images what one of 500 needs."""
    for few, many in (((200, 20), (4000, 20)), ((500, 500), (4000, 4000))):
        peaks = []
        for scenes, per_shard in (few, many):
            folder = tmp_path / f"{scenes}-{per_shard}"
            sizes = PrepareSettings(train_scenes=scenes, test_scenes=0, samples_per_shard=per_shard)
            prepare("demo", folder / "images", sizes, workers=1)
            peaks.append(peak_bytes(folder / "images", folder, "t", store_format))
        print([f"{peak / 1e6:.0f} MB" for peak in peaks])
        assert peaks[1] < peaks[0] + 64e6


def test_views_are_the_same_whatever_the_views_of_others(images: Path, whole, extract, tmp_path: Path) -> None:
    """A run with more views begins with those of a run with fewer."""
    extract(images, tmp_path / "three", views=ViewSettings(count=3, seed=5))
    two, three = open_targets(whole[0]), open_targets(tmp_path / "three")
    for view in range(2):
        left, right = (store.read("000001", view, 0, 10) for store in (two, three))
        assert left.crop_N4.tolist() == right.crop_N4.tolist()
        assert [bytes(jpeg) for jpeg in left.jpegs] == [bytes(jpeg) for jpeg in right.jpegs]


def test_nothing_that_dask_logs_is_shown() -> None:
    words = """
import logging, distributed
from milan_pipe.extraction.cluster import _silence_dask
_silence_dask()
logging.getLogger("distributed.scheduler").critical("a client left while its tasks report")
"""
    done = processes.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
