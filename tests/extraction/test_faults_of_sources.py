"""A source that cannot be read fails alone, under its own name; bad images are judged by the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import processes
from support.disks import small_disk
from support.targets import tree as store_tree

from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError, StoreError
from milan_pipe.images.prepare import prepare
from milan_pipe.storage import location_of
from milan_pipe.targets.store import open_targets
from milan_pipe.targets.verify import verify_store

# The kernel answers a read of it with an input/output error, as a disk does that fails.
UNREADABLE = Path("/proc/self/mem")


def linked(images: Path, folder: Path, unreadable: set[int], count: int = 3) -> Path:
    folder.mkdir()
    shards = sorted(images.glob("*.tar"))
    for number in range(count):
        source = UNREADABLE if number in unreadable else shards[number % len(shards)]
        (folder / f"{number}.tar").symlink_to(source)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_read_error_names_the_shard_and_the_others_go_on(images, extract, tmp_path, workers):
    folder = linked(images, tmp_path / "images", {1})
    with pytest.raises(DataError, match=r"000001: .*1\.tar"):
        extract(folder, tmp_path / "t", workers=workers)
    assert open_targets(tmp_path / "t").shards == ("000000", "000002")
    assert not list((tmp_path / "t").glob(".*"))


def test_sources_that_are_all_out_of_reach_end_the_run(images, extract, tmp_path):
    folder = linked(images, tmp_path / "images", set(range(7)), count=8)
    with pytest.raises(DataError, match="5 of 8 shards failed"):
        extract(folder, tmp_path / "t")


def test_a_full_temporary_folder_is_named(images, extract, bucket, tmp_path, monkeypatch):
    for shard in images.glob("*.tar"):
        location_of(f"{bucket}/images").write(shard.name, shard.read_bytes())
    with small_disk(tmp_path / "tmp", 32 * 1024):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        with pytest.raises(StoreError, match="set TMPDIR"):
            extract(f"{bucket}/images", tmp_path / "t")


# --- bad images -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight shards of five scenes; the first image of the first one is cut."""
    folder = tmp_path_factory.mktemp("eight") / "images"
    prepare("demo", folder, PrepareSettings(train_scenes=40, test_scenes=0, samples_per_shard=5), workers=1)
    data = bytearray((folder / "train-000000.tar").read_bytes())
    start = data.index(b"\x89PNG") + 60
    data[start : start + 200] = bytes(200)
    (folder / "train-000000.tar").write_bytes(data)
    return folder


def test_one_bad_image_in_the_first_shard_does_not_stop_the_others(eight, extract, tmp_path):
    report = extract(eight, tmp_path / "t", max_bad_fraction=0.05)
    assert (report.shards, report.samples, report.bad) == (8, 39, 1)


def test_a_limit_that_the_whole_passes_stops_as_soon_as_it_is_sure(eight, extract, tmp_path):
    listed = tmp_path / "t" / "bad_samples.jsonl"
    for _ in range(2):
        with pytest.raises(DataError, match="max_bad_fraction"):
            extract(eight, tmp_path / "t", max_bad_fraction=0.02)
        assert len(listed.read_text().splitlines()) == 1
    assert extract(eight, tmp_path / "t", max_bad_fraction=0.03).shards == 8


# --- two commands at once -------------------------------------------------------------------------------------------


def test_the_same_command_twice_at_once_commits_nothing_that_is_damaged(eight, tmp_path):
    command = [sys.executable, "-m", "milan_pipe", "extract-targets", str(eight), str(tmp_path / "t")]
    command += ["--set", "extract.device=cpu", "--set", "extract.threads=1", "--set", "views.count=2"]
    both = [processes.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=300)
        assert "Traceback" not in stderr
        assert process.returncode in (0, 2)
        assert process.returncode == 0 or "removed while it was written" in stderr or "shards are whole" in stderr
    again = processes.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert verify_store(tmp_path / "t").problems == ()
    processes.run([*command[:5], str(tmp_path / "alone"), *command[6:]], check=True, capture_output=True)
    assert store_tree(tmp_path / "t") == store_tree(tmp_path / "alone")
