"""Interrupted, full, damaged, repeated: what is committed stays good and the same command ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tarfile
import time

import pytest
from support.disks import small_disk
from support.extraction import shards_with_bad

from milan_pipe.config.images import ViewSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.targets.store import open_targets


class Interrupted(BaseException):
    """Stands for Ctrl-C at a chosen moment."""


# --- same bytes ---------------------------------------------------------------------------------------------------


def test_threads_do_not_change_a_byte(whole, images, extract, tree, tmp_path):
    expected = tree(whole[0])
    for threads in (1, 4):
        extract(images, tmp_path / str(threads), threads=threads)
        found = tree(tmp_path / str(threads))
        assert found.keys() == expected.keys()
        assert [path for path in found if found[path] != expected[path]] == []
    assert b"\x80\x04" not in b"".join(data[:2] for data in expected.values())
    assert not any(path.endswith((".pkl", ".pickle", ".pt")) for path in expected)


def test_a_clock_that_jumps_and_files_of_the_future_change_nothing(whole, images, extract, tree, tmp_path, monkeypatch):
    extract(images, tmp_path / "t", shards="0/2")
    for path in (tmp_path / "t").rglob("*"):
        os.utime(path, (4e9, 4e9))
    true_time, rng = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: true_time() + rng.uniform(-1e8, 1e8))
    report = extract(images, tmp_path / "t")
    assert (report.skipped, report.complete) == (2, True)
    assert tree(tmp_path / "t") == tree(whole[0])


def test_again_does_nothing(images, extract, tree, tmp_path):
    targets = tmp_path / "t"
    extract(images, targets)
    before, times = tree(targets), {path: path.stat().st_mtime_ns for path in targets.glob("shards/00*/**/*")}
    assert times
    report = extract(images, targets)
    assert (report.shards, report.skipped, report.views, report.mean_cosine) == (3, 3, 0, None)
    assert tree(targets) == before
    assert {path: path.stat().st_mtime_ns for path in targets.glob("shards/00*/**/*")} == times


def test_interrupted_between_and_inside_shards(whole, images, extract, tree, tmp_path):
    targets, reported = tmp_path / "t", []

    def stop(now):
        reported.append(now)
        if now.shards_done == 1 and now.views > 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        extract(images, targets, on_progress=stop)
    assert open_targets(targets).shards == ("000000",)
    kept = {path: path.stat().st_mtime_ns for path in targets.glob("shards/000000/**/*")}
    report = extract(images, targets)
    assert (report.shards, report.skipped, report.views, report.samples) == (3, 1, 28, 24)
    assert {path: path.stat().st_mtime_ns for path in targets.glob("shards/000000/**/*")} == kept
    assert tree(targets) == tree(whole[0])


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ViewSettings(count=3, seed=5)}, "views.count"),
        ({"views": ViewSettings(count=2, seed=6)}, "views.seed"),
        ({"codec": "float16"}, "codec.name"),
        ({"view_size": 48}, "views.size"),
        ({"teacher": TeacherSettings(normalization="imagenet")}, "teacher.normalization"),
        ({"teacher": TeacherSettings(pretrained="random")}, "teacher.weights_sha256"),
    ],
)
def test_another_configuration_is_refused(whole, images, extract, tree, change, message):
    before = tree(whole[0])
    with pytest.raises(MismatchError, match=message):
        extract(images, whole[0], **change)
    assert tree(whole[0]) == before


def test_other_images_are_refused(whole, images, extract):
    with pytest.raises(MismatchError, match=r"source\.shards"):
        extract(str(images / "train-00000{0,1}.tar"), whole[0])


def test_no_images(extract, tmp_path):
    with pytest.raises(MissingError, match="is not there"):
        extract(tmp_path / "nowhere", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        extract(tmp_path / "empty", tmp_path / "t")
    assert not (tmp_path / "t").exists()


# --- bad images -------------------------------------------------------------------------------------------------


def test_bad_images_are_skipped(whole, images, extract, tree, tmp_path):
    keys = shards_with_bad(images, tmp_path / "images", {0: [3], 1: [0, 9]})
    report = extract(tmp_path / "images", tmp_path / "t", max_bad_fraction=0.2, threads=4)
    assert (report.samples, report.bad, report.views) == (21, 3, 42)
    records = [json.loads(line) for line in (tmp_path / "t" / "bad_samples.jsonl").read_text().splitlines()]
    assert [record["key"] for record in records] == keys
    assert [record["shard"] for record in records] == ["000000", "000001", "000001"]
    assert all(record["source"].endswith(".tar") and "truncated" in record["reason"] for record in records)
    good, found = open_targets(whole[0]), open_targets(tmp_path / "t")
    rest = [row for row in range(10) if row != 3]
    expected, run = good.read("000000", 1, 0, 10), found.read("000000", 1, 0, 9)
    assert list(run.keys) == [expected.keys[row] for row in rest]
    assert list(run.jpegs) == [expected.jpegs[row] for row in rest]
    extract(tmp_path / "images", tmp_path / "one thread", max_bad_fraction=0.2, threads=1)
    assert tree(tmp_path / "one thread") == tree(tmp_path / "t")


def test_too_many_bad_images_stop_each_time(images, extract, tmp_path):
    keys = shards_with_bad(images, tmp_path / "images", {1: [2, 4, 6], 2: [1]})
    # A second run skips the bad shard; it must not pass for a good one.
    for _ in range(2):
        listed = tmp_path / "t" / "bad_samples.jsonl"
        with pytest.raises(DataError, match=rf"max_bad_fraction.*{keys[0]}"):
            extract(tmp_path / "images", tmp_path / "t", max_bad_fraction=0.15)
        assert [json.loads(line)["key"] for line in listed.read_text().splitlines()] == keys
    report = extract(tmp_path / "images", tmp_path / "t", max_bad_fraction=0.2)
    assert (report.shards, report.skipped, report.bad) == (3, 3, 4)


def test_shard_without_a_readable_image(images, extract, tmp_path):
    shards_with_bad(images, tmp_path / "images", {1: range(10)})
    with pytest.raises(DataError, match="no readable image"):
        extract(tmp_path / "images", tmp_path / "t", max_bad_fraction=1)
    assert open_targets(tmp_path / "t").shards == ("000000", "000002")
    assert not list((tmp_path / "t").glob(".*"))


def test_shard_without_images(extract, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.md"))
    with pytest.raises(DataError, match="holds no images"):
        extract(tmp_path / "a.tar", tmp_path / "t")


def test_cut_shard_is_not_committed(images, extract, tmp_path):
    data = (images / "train-000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cut or damaged"):
        extract(tmp_path / "a.tar", tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").rglob("*")] == ["shards", "zarr.json"]


# --- a store that cannot be written -------------------------------------------------------------------------------


def test_unwritable_store(images, extract, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"file/t.*Not a directory"):
        extract(images, tmp_path / "file" / "t")


def full_disk_goes_on(whole, images, extract, tree, disk, share):
    """Whether the disk was too small."""
    expected, page = tree(whole[0]), 4096
    needed = sum(-(-len(data) // page) * page for data in expected.values())
    with small_disk(disk, max(page, int(share * needed))):
        try:
            extract(images, disk / "t")
        except StoreError as error:
            message = str(error)
        else:
            assert tree(disk / "t") == expected
            return False
        assert "No space left" in message
        assert "\n" not in message
        assert not list((disk / "t").glob(".*"))
        committed = list((disk / "t" / "manifest").glob("*.json"))
        said = message.partition(" of 3 shards")[0].split()[-1]
        assert len(committed) == (int(said) if said.isdecimal() else 0)
        kept = tree(disk / "t")
        assert all(expected[path] == data for path, data in kept.items())
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        report = extract(images, disk / "t")
        assert report.skipped == len(committed)
        assert tree(disk / "t") == expected
    return True


@pytest.mark.parametrize("share", [0.1, 0.45, 0.78, 0.92])
def test_full_disk_is_one_error_and_goes_on(whole, images, extract, tree, tmp_path, share):
    assert full_disk_goes_on(whole, images, extract, tree, tmp_path / "disk", share)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_sizes_of_a_full_disk(whole, images, extract, tree, tmp_path, counted):
    full = [
        full_disk_goes_on(whole, images, extract, tree, tmp_path / str(number), number * 1.1 / 49)
        for number in range(50)
    ]
    assert full[0]
    assert not full[-1]
    counted("disk full during `extract-targets`, 50 sizes", sum(full), "one line; with room, an unbroken run's bytes")
