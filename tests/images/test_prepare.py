"""Preparing: the same bytes each time, nothing lost in silence, nothing of the user's overwritten."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError
from support import processes
from support.images import bad_of

from milan_pipe.config.images import IMAGE_LIMITS, TEST_SCENE_OFFSET, PrepareSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.images import files, source_demo
from milan_pipe.images.decode import decode_image
from milan_pipe.images.files import files_under
from milan_pipe.images.index import PREPARE_MARKER, ShardRecord, read_index
from milan_pipe.images.prepare import PrepareReport, _packed, prepare
from milan_pipe.images.scenes import THINGS, render_scene
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.source_folder import folder_source, image_files
from milan_pipe.images.tar import Sample, read_shard

SMALL = PrepareSettings(train_scenes=5, test_scenes=2, samples_per_shard=2)


def image(path: Path, colour: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    Image.new("RGB", (8, 6), (colour, 9, 200)).save(buffer, kind)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder: Path, split: str = "") -> list[Sample]:
    def fail(key: str, reason: str) -> None:
        raise AssertionError((key, reason))

    names = [shard.name for shard in read_index(folder).shards if shard.split.startswith(split)]
    return [sample for name in names for sample in read_shard(folder / name, fail)]


def run(source: Path | str, images: Path, **values: object) -> PrepareReport:
    return prepare(source, images, PrepareSettings(**values), workers=1)  # type: ignore[arg-type]


# --- demo


def test_demo_content(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = prepare("demo", tmp_path / "images", SMALL, lambda done, total: steps.append((done, total)), workers=1)
    names = ["train-000000.tar", "train-000001.tar", "train-000002.tar", "test-000000.tar"]
    index = read_index(tmp_path / "images")
    assert [shard.name for shard in index.shards] == names
    assert [shard.samples for shard in index.shards] == [2, 2, 1, 2]
    assert index.classes == report.classes == THINGS
    assert steps == [(2, 7), (4, 7), (5, 7), (7, 7)]
    assert (report.shards, report.samples, report.bad) == (4, 7, 0)
    assert report.bytes == sum((tmp_path / "images" / name).stat().st_size for name in names)
    assert sorted(content(tmp_path / "images")) == sorted([*names, "index.json"])
    numbers = [0, 1, 2, 3, 4, TEST_SCENE_OFFSET, TEST_SCENE_OFFSET + 1]
    for number, sample in zip(numbers, samples(tmp_path / "images"), strict=True):
        scene = render_scene(0, number)
        np.testing.assert_array_equal(np.asarray(decode_image(sample.data)), scene.image)
        assert (sample.label, sample.caption) == (scene.label, "\n".join(scene.captions))


def test_demo_is_the_same_bytes_with_any_number_of_workers_and_on_its_own_output(tmp_path: Path) -> None:
    prepare("demo", tmp_path / "a", SMALL, workers=1)
    prepare("demo", tmp_path / "b", SMALL, workers=2)
    first = content(tmp_path / "a")
    assert content(tmp_path / "b") == first
    prepare("demo", tmp_path / "a", SMALL, workers=1)
    assert content(tmp_path / "a") == first
    # Fewer shards than before: none of the old ones stays.
    run("demo", tmp_path / "a", train_scenes=1, test_scenes=0, seed=5)
    assert sorted(content(tmp_path / "a")) == ["index.json", "train-000000.tar"]


def test_headers_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    run("demo", tmp_path, train_scenes=1, test_scenes=0)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_webdataset_reads_it_alike(tmp_path: Path) -> None:
    image(tmp_path / "in" / "größe & mehr" / "a b.v2.jpg")
    image(tmp_path / "in" / "x" / ("long " * 30 + ".png"))
    run(tmp_path / "in", tmp_path / "out")
    theirs = list(webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False))
    ours = samples(tmp_path / "out")
    assert [entry["__key__"] for entry in theirs] == [sample.key for sample in ours]
    assert [int(entry["cls"]) for entry in theirs] == [sample.label for sample in ours]
    assert [entry.get("jpg") or entry["png"] for entry in theirs] == [sample.data for sample in ours]


# --- folders


def test_class_folders(tmp_path: Path) -> None:
    source = tmp_path / "in"
    stored = [image(source / name) for name in ("Zebra/1.jpg", "ape/deep/2.PNG", "ape/3.webp", "über/4.jpeg")]
    image(source / ".hidden" / "x.jpg")
    image(source / "ape" / "._3.jpg")
    (source / "empty").mkdir()
    (source / "ape" / "notes.txt").write_text("x")
    report = run(source, tmp_path / "out")
    assert report.classes == read_index(tmp_path / "out").classes == ("Zebra", "ape", "über")
    found = samples(tmp_path / "out")
    assert [(s.key, s.label) for s in found] == [("Zebra-1", 0), ("ape-3", 1), ("ape-deep-2", 1), ("über-4", 2)]
    assert [s.data for s in found] == [stored[0], stored[2], stored[1], stored[3]]


def test_flat_folder_and_split_name(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg", "c.jpg"):
        image(tmp_path / "in" / name)
    report = run(tmp_path / "in", tmp_path / "out", split="val", samples_per_shard=2)
    assert report.classes is None
    assert [s.name for s in read_index(tmp_path / "out").shards] == ["val-000000.tar", "val-000001.tar"]
    assert [(s.key, s.label) for s in samples(tmp_path / "out")] == [("a", -1), ("b", -1), ("c", -1)]


def test_loose_images_beside_class_folders_have_no_label(tmp_path: Path) -> None:
    image(tmp_path / "in" / "loose.jpg")
    image(tmp_path / "in" / "ape" / "1.jpg")
    run(tmp_path / "in", tmp_path / "out")
    assert [(s.key, s.label) for s in samples(tmp_path / "out")] == [("ape-1", 0), ("loose", -1)]


def test_split_folders_share_their_classes(tmp_path: Path) -> None:
    for name in ("train/b/1.jpg", "train/a/1.jpg", "val/c/1.jpg", "test/x.jpg"):
        image(tmp_path / "in" / name)
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.classes == ("a", "b", "c")
    assert [(s.key, s.label) for s in samples(tmp_path / "out", "train")] == [("train-a-1", 0), ("train-b-1", 1)]
    assert [(s.key, s.label) for s in samples(tmp_path / "out", "val")] == [("val-c-1", 2)]
    assert [(s.key, s.label) for s in samples(tmp_path / "out", "test")] == [("test-x", -1)]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train/1.jpg", "bus/1.jpg"):
        image(tmp_path / "in" / name)
    assert run(tmp_path / "in", tmp_path / "out").classes == ("bus", "train")
    image(tmp_path / "in" / "test" / "1.jpg")
    with pytest.raises(DataError, match="beside"):
        run(tmp_path / "in", tmp_path / "out")


def test_keys_are_unique_and_safe(tmp_path: Path) -> None:
    names = ["a/b.jpg", "a-b.jpg", "a/b.png", "a.b.c.jpg", "a_b_c.jpg", "tab\there.jpg", "ü ñ.jpg", "x..jpg"]
    for name in names:
        image(tmp_path / "in" / name)
    image(tmp_path / "in" / os.fsdecode(b"latin\xff.jpg"))
    run(tmp_path / "in", tmp_path / "out")
    keys = [s.key for s in samples(tmp_path / "out")]
    assert len(keys) == len(set(keys)) == len(names) + 1
    assert not any("." in key or "/" in key or not key.isprintable() for key in keys)
    assert {"ü ñ", "tab_here", "latin_"} <= set(keys)


def test_links_that_lead_back_up_end(tmp_path: Path) -> None:
    image(tmp_path / "in" / "a" / "1.jpg")
    image(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert files_under(tmp_path / "in") == [tmp_path / "in" / name for name in ("a/1.jpg", "b/2.jpg", "c/2.jpg")]
    assert run(tmp_path / "in", tmp_path / "out").samples == 3


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="listed"):
        files_under(tmp_path / "gone")


def test_bad_images_are_skipped_and_leave_no_gap(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    good = image(source / "3.jpg")
    (source / "1.jpg").write_bytes(b"")
    (source / "2.jpg").write_bytes(good[: len(good) // 2])
    (source / "4.jpg").write_bytes(b"<html>")
    (source / "5.gif").write_bytes(b"GIF89a")
    (source / "6.jpg").symlink_to(tmp_path / "gone.jpg")
    report = run(source, out, samples_per_shard=1)
    bad = bad_of(out)
    assert report.bad == len(bad)
    assert [name for name, _ in bad] == ["1.jpg", "2.jpg", "4.jpg", "5.gif", "6.jpg"]
    assert [shard.name for shard in read_index(out).shards] == ["train-000000.tar"]
    assert [str(shard) for shard in expand_shards(out)] == [str(out / "train-000000.tar")]
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [name.split(".")[0] for name, _ in bad]
    assert bad[0][1] == "empty file"
    # Repaired, the same command leaves no trace of them.
    for name in ("1.jpg", "2.jpg", "4.jpg", "5.gif", "6.jpg"):
        (source / name).unlink()
    run(source, out, samples_per_shard=1)
    assert sorted(content(out)) == ["index.json", "train-000000.tar"]


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would be waited for for ever, and a device read until the memory is full."""
    source = tmp_path / "source"
    image(source / "ant" / "good.jpg")
    os.mkfifo(source / "ant" / "pipe.jpg")
    (source / "ant" / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        # A socket's path may have some hundred bytes.
        monkeypatch.chdir(source / "ant")
        listening.bind("socket.webp")
    run(source, tmp_path / "images")
    assert [sample.key for sample in samples(tmp_path / "images")] == ["ant-good"]
    names, reason = ("device.png", "pipe.jpg", "socket.webp"), "cannot be read: not a regular file"
    assert bad_of(tmp_path / "images") == [(f"ant/{name}", reason) for name in names]


def test_folders_of_links_to_each_other_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_LINKS", 100)
    for number in range(30):
        (tmp_path / f"{number:02d}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"{number:02d}" / name).symlink_to(tmp_path / f"{number + 1:02d}")
    image(tmp_path / "30" / "x.jpg")
    assert len(files_under(tmp_path / "28")) == 4
    with pytest.raises(DataError, match="more than 100 folders that are links; do they lead to each other"):
        files_under(tmp_path / "00")


def test_what_a_shard_skipped_is_not_kept_for_the_next(tmp_path: Path) -> None:
    for number in range(6):
        image(tmp_path / "in" / f"{number}.jpg")
        (tmp_path / "in" / f"{number}x.jpg").write_bytes(b"")
    settings = PrepareSettings(samples_per_shard=2)
    found = folder_source(tmp_path / "in", image_files(tmp_path / "in"), settings, IMAGE_LIMITS)
    paths = [tmp_path / f"{number}.tar" for number in range(len(found.jobs))]
    held: list[weakref.ref[ShardRecord]] = []
    for record, skipped in _packed(found.jobs, paths, 2):
        assert record is not None
        assert len(skipped) == 1
        assert not any(one() for one in held)
        held.append(weakref.ref(record))
        del record
    assert len(held) == 6


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images in .* can be read; the first is a\.jpg: empty file"):
        run(tmp_path / "in", tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == ["bad_samples.jsonl"]


# --- kills and foreign files


class _Killed(BaseException):
    pass


def test_killed_anywhere_the_same_command_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("demo", tmp_path / "whole", SMALL, workers=1)
    whole = content(tmp_path / "whole")
    out = tmp_path / "out"
    for stop in range(1, 8):
        calls = 0

        def render(seed: int, index: int, stop: int = stop) -> object:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise _Killed
            return render_scene(seed, index)

        monkeypatch.setattr(source_demo, "render_scene", render)
        with pytest.raises(_Killed):
            prepare("demo", out, SMALL, workers=1)
        assert (out / PREPARE_MARKER).exists()
        with pytest.raises(DataError, match="not complete"):
            expand_shards(out)
    monkeypatch.undo()
    image(tmp_path / "in" / "a.jpg")
    with pytest.raises(MismatchError, match="of demo"):
        run(tmp_path / "in", out)
    prepare("demo", out, SMALL, workers=1)
    assert content(out) == whole


def test_foreign_shards_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(MismatchError, match=r"train-000000\.tar"):
        prepare("demo", out, SMALL, workers=1)
    assert content(out) == {"train-000000.tar": b"precious"}
    (out / "train-000000.tar").unlink()
    prepare("demo", out, SMALL, workers=1)
    (out / "mine.tar").write_bytes(b"precious")
    before = content(out)
    with pytest.raises(MismatchError, match=r"mine\.tar"):
        prepare("demo", out, SMALL, workers=1)
    assert content(out) == before


def test_shards_of_another_source_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "one" / "a.jpg")
    image(tmp_path / "two" / "a.jpg")
    run(tmp_path / "one", tmp_path / "out")
    before = content(tmp_path / "out")
    for source in (tmp_path / "two", "demo"):
        with pytest.raises(MismatchError, match=r"shards of .*one"):
            run(source, tmp_path / "out")
        assert content(tmp_path / "out") == before
    # The same folder by another name is the same source.
    monkeypatch.chdir(tmp_path)
    run("one", tmp_path / "out")
    assert content(tmp_path / "out")["train-000000.tar"] == before["train-000000.tar"]


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        prepare("demo", tmp_path / "out", SMALL, workers=1)
    monkeypatch.undo()
    prepare("demo", tmp_path / "out", SMALL, workers=1)
    assert PREPARE_MARKER not in content(tmp_path / "out")


# --- sources that are none


def test_a_source_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    image(tmp_path / "a.jpg")
    for source in ("gone", "empty", "a.jpg"):
        with pytest.raises((MissingError, DataError), match=source):
            run(tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"seed": -1},
        {"train_scenes": 0},
        {"test_scenes": -1},
        {"samples_per_shard": 0},
        {"split": "a/b"},
        {"splits": "a"},
    ],
)
def test_settings_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(SettingError, match="prepare"):
        PrepareSettings.parse(values, "prepare")
    with pytest.raises((ValidationError, SettingError)):
        PrepareSettings(**values)  # type: ignore[arg-type]


two_processors = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one processor packs in the command's own process"
)


def packing(folder: Path) -> subprocess.Popen[str]:
    """`milan-pipe prepare` in the middle of its work, with two processes that pack."""
    words = [
        "prepare",
        "demo",
        "images",
        "--set",
        "prepare.train_scenes=40000",
        "--set",
        "prepare.samples_per_shard=50",
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "milan_pipe", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ends = time.monotonic() + 60
    while not (folder / "images" / "train-000000.tar").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < ends
        time.sleep(0.01)
    return run


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    run = packing(tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors


def workers_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(run.pid).children()
    workers = [child for child in children if any("popen_loky_posix" in word for word in child.cmdline())]
    assert workers
    return workers


@two_processors
def test_workers_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    run = packing(tmp_path)
    workers = workers_of(run)
    run.kill()
    run.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.ci
@two_processors
def test_sigkill_and_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    settings = PrepareSettings(train_scenes=300, test_scenes=0, samples_per_shard=10, seed=4)
    prepare("demo", tmp_path / "whole", settings, workers=2)
    given = settings.model_dump(include={"train_scenes", "test_scenes", "samples_per_shard", "seed"})
    words = [word for name, value in given.items() for word in ("--set", f"prepare.{name}={value}")]
    rng, kills, left = random.Random(3), 0, []
    while kills < 5:
        run = processes.Popen(
            [sys.executable, "-m", "milan_pipe", "prepare", "demo", "out", *words],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = set(tmp_path.glob("out/*"))
        while run.poll() is None and not set(tmp_path.glob("out/*.tar*")) - before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        workers = psutil.Process(run.pid).children()
        run.kill()
        assert not psutil.wait_procs(workers, timeout=60)[1]
        kills += run.wait() == -signal.SIGKILL
        left += [path.name for path in tmp_path.glob("out/.partial-*")]
        if not (tmp_path / "out" / PREPARE_MARKER).exists():
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert left, "none of the kills met a shard in the making"
    prepare("demo", tmp_path / "out", settings, workers=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@two_processors
def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    run = packing(tmp_path)
    workers = workers_of(run)
    workers[0].kill()
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == 2, errors
    assert "Traceback" not in errors
    assert "a process that packs shards was killed" in errors
