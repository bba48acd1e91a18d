"""Local folders and object stores do the same, in the same words."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milan_pipe import storage
from milan_pipe.errors import MissingError, SettingError, StoreError
from milan_pipe.storage import SCRATCH, Place, is_url, place_of, split_url


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert "Debug" not in text
    assert "<" not in text
    assert len(text) < 400
    return text


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class PlaceContract:
    """What every place that can be written does. Subclasses give a `place` that does not exist yet."""

    def test_a_file_comes_back_as_it_was_written(self, place: Place) -> None:
        data = os.urandom(100_000)
        for path in ("a", "folder/b.tar", "größe 1/#%41+&.bin"):
            assert place.write(path, data)
            assert place.read(path) == data
            assert place.size(path) == len(data)
        assert place.write("a", b"")
        assert place.read("a") == b""
        assert place.size("a") == 0

    def test_ranges(self, place: Place) -> None:
        place.write("a", bytes(range(100)))
        assert place.read_range("a", 0, 100) == bytes(range(100))
        assert place.read_range("a", 10, 12) == bytes([10, 11])
        assert place.read_range("a", 98, 200) == bytes([98, 99])
        assert place.read_range("a", 100, 200) == b""
        assert place.read_range("a", 500, 600) == b""
        assert place.read_range("a", 5, 5) == b""

    def test_what_is_not_there(self, place: Place) -> None:
        place.write("there", b"1")
        asks: list[Callable[[], object]] = [
            lambda: place.read("gone/a"),
            lambda: place.read_range("gone/a", 0, 1),
            lambda: place.read_range("gone/a", 0, 0),
            lambda: place.size("gone/a"),
            lambda: place.open("gone/a"),
        ]
        for ask in asks[: 2 if place.local else None]:
            with pytest.raises(MissingError, match="gone/a is not there") as caught:
                ask()
            one_line(caught)
        assert place.child("gone").sizes() == {}
        assert place.child("gone").listing() == storage.Listing(files={}, folders=())
        assert place.child("gone").present(["a"]) == {}

    def test_an_open_file_seeks_and_reads_like_any_other(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_READ_AHEAD_BYTES", 100_000)
        data = os.urandom(1_000_000)
        place.write("a", data)
        (tmp_path / "same").write_bytes(data)
        with place.open("a") as file, (tmp_path / "same").open("rb") as same:
            steps = [
                (0, 512),
                (511, 1),
                (512, 200_000),
                (99_999, 2),
                (999_990, 100),
                (2_000_000, 5),
                (0, 1),
                (500_000, 0),
            ]
            for position, count in steps:
                assert file.seek(position) == same.seek(position)
                assert file.read(count) == same.read(count)
                assert file.tell() == same.tell()
            assert file.seek(-3, 2) == same.seek(-3, 2)
            assert file.read() == same.read()
            assert file.seek(10) == 10
            assert file.seek(5, 1) == 15
            buffer = bytearray(70_000)
            assert file.readinto(buffer) == 70_000  # type: ignore[attr-defined]
            assert buffer == data[15:70_015]
            with pytest.raises((ValueError, OSError)):
                file.seek(-1)
            file.seek(0)
            assert file.read() == data
        with pytest.raises(ValueError, match="closed"):
            file.read(1)

    def test_an_empty_file_opens(self, place: Place) -> None:
        place.write("a", b"")
        with place.open("a") as file:
            assert file.read() == b""

    def test_lists_leave_scratch_and_neighbours_out(self, place: Place) -> None:
        for path in ("a/1", "a/b/22", "a/b/c/333", "ab/1", f"a/{SCRATCH}x/1", f"a/b/{SCRATCH}y", "top"):
            place.write(path, b"x" * len(path.rpartition("/")[2]))
        assert place.sizes("a") == {"1": 1, "b/22": 2, "b/c/333": 3}
        assert list(place.sizes()) == ["a/1", "a/b/22", "a/b/c/333", "ab/1", "top"]
        assert place.child("a").sizes("b") == {"22": 2, "c/333": 3}
        assert place.child("a").listing() == storage.Listing(files={"1": 1}, folders=("b",))
        assert place.listing() == storage.Listing(files={"top": 3}, folders=("a", "ab"))
        assert place.present(["top", "a", "gone"]) == {"top": 3}

    def test_many_names_are_found_as_few_are(self, place: Place) -> None:
        for name in ("3", "30", "5000"):
            place.write(name, name.encode())
        assert place.present(str(number) for number in range(100)) == {"3": 1, "30": 2}

    def test_create_only(self, place: Place) -> None:
        assert place.write("folder/a", b"first", replace=False)
        assert not place.write("folder/a", b"second", replace=False)
        assert place.read("folder/a") == b"first"
        assert place.write("folder/a", b"third")
        assert place.read("folder/a") == b"third"
        assert place.sizes() == {"folder/a": 5}

    def test_remove(self, place: Place) -> None:
        for path in ("a", "b/1", "b/c/2", "bc/3", "b.json"):
            place.write(path, b"x")
        place.remove("b")
        assert list(place.sizes()) == ["a", "b.json", "bc/3"]
        place.remove("a")
        place.remove("a")
        place.remove("gone/for/long")
        assert list(place.sizes()) == ["b.json", "bc/3"]

    def test_publish_puts_the_whole_in_the_place_of_what_was_there(self, place: Place) -> None:
        for files in ({"x": b"1", "deep/er/y": b"22", "stray/z": b"3"}, {"x": b"4", "deep/er/w": b"5" * 20}):
            scratch = fill(place.scratch("shard"), files)
            place.publish(scratch, "shard")
            assert not scratch.exists()
            assert {path: place.read(f"shard/{path}") for path in place.sizes("shard")} == files

    def test_scratch_is_cleared_by_its_own_name(self, place: Place) -> None:
        place.clear_scratch("a")
        mine, too, other = (place.scratch(name) for name in ("a", "a", "a-b"))
        fill(mine, {"x/y": b"1"})
        assert mine != too
        place.clear_scratch("a")
        assert [path.exists() for path in (mine, too, other)] == [False, False, True]
        place.clear_scratch()
        assert not other.exists()
        place.clear_scratch()

    def test_children_and_copies_in_other_processes_are_the_same_place(self, place: Place) -> None:
        child = place.child("a/b")
        child.write("c", b"1")
        assert place.read("a/b/c") == b"1"
        copy = pickle.loads(pickle.dumps(child))
        assert copy == child
        assert hash(copy) == hash(child)
        assert copy.read("c") == b"1"
        assert str(child) == f"{place}/a/b"
        script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read('c'))"
        done = subprocess.run(
            [sys.executable, "-c", script], input=pickle.dumps(child), capture_output=True, check=True
        )
        assert done.stdout.strip() == b"b'1'"


class TestFolder(PlaceContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return place_of(tmp_path / "place")

    def test_what_stands_in_the_way_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"mine")
        place = place_of(tmp_path / "file" / "store")
        for attempt in (lambda: place.write("a", b"1"), lambda: place.scratch("a"), lambda: place.read("a")):
            with pytest.raises(
                StoreError, match=r"file/store/.*: Not a directory|file/store/.*: File exists"
            ) as caught:
                attempt()
            one_line(caught)
        place = place_of(tmp_path)
        scratch = fill(place.scratch("file"), {"x": b"1"})
        with pytest.raises(StoreError, match="file cannot be written: Not a directory"):
            place.publish(scratch, "file")
        assert (tmp_path / "file").read_bytes() == b"mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([scratch.name, "file"])

    def test_a_folder_that_may_not_be_listed_is_no_empty_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: object = ".") -> object:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", refuse)
        for ask in (place_of(tmp_path).sizes, place_of(tmp_path).listing):
            with pytest.raises(StoreError, match="cannot be listed: Permission denied"):
                ask()

    def test_no_room_leaves_the_old_file_and_nothing_beside_it(self, tmp_path: Path) -> None:
        place = place_of(tmp_path)
        place.write("a", b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))
        try:
            with pytest.raises(StoreError, match="a cannot be written: File too large"):
                place.write("a", b"new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}

    def test_of_two_processes_one_creates(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        barrier, created = context.Barrier(2), context.Queue()
        creators = [context.Process(target=_create, args=(str(tmp_path), mark, barrier, created)) for mark in "ab"]
        for creator in creators:
            creator.start()
        told = dict(created.get(timeout=60) for _ in creators)
        for creator in creators:
            creator.join(60)
        found = {name: place_of(tmp_path).read(name).decode() for name in place_of(tmp_path).sizes()}
        assert len(found) == _CREATED
        assert {mark: [name for name in found if found[name] == mark] for mark in told} == told

    def test_two_processes_that_publish_one_folder_leave_one_whole_folder(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(3)
        errors = context.Queue()
        publishers = [context.Process(target=_publish, args=(str(tmp_path), mark, barrier, errors)) for mark in "abc"]
        for publisher in publishers:
            publisher.start()
        for publisher in publishers:
            publisher.join(60)
        assert [errors.get(timeout=10) for _ in publishers] == [None] * 3
        files = {path.name: path.read_text()[0] for path in (tmp_path / "shard").iterdir()}
        mark = next(iter(files.values()))
        assert files == {f"{mark}-{n}": mark for n in range(20)}
        assert [path.name for path in tmp_path.iterdir()] == ["shard"]


_CREATED = 1000


def _create(folder: str, mark: str, barrier: Any, created: Any) -> None:
    place = place_of(folder)
    barrier.wait(60)
    names = [f"{number:04d}" for number in range(_CREATED)]
    created.put((mark, [name for name in names if place.write(name, mark.encode(), replace=False)]))


def _publish(folder: str, mark: str, barrier: Any, errors: Any) -> None:
    place = place_of(folder)
    failed = None
    for attempt in range(60):
        scratch = fill(place.scratch("shard"), {f"{mark}-{n}": f"{mark}{attempt}".encode() for n in range(20)})
        if attempt == 0:
            barrier.wait(60)
        try:
            place.publish(scratch, "shard")
        except Exception as error:
            failed = repr(error)
    errors.put(failed)


class TestBucket(PlaceContract):
    @pytest.fixture
    def place(self, bucket: str) -> Place:
        return place_of(f"{bucket}/place")

    def test_a_store_for_other_libraries_begins_at_this_folder(self, bucket: str) -> None:
        obstore = pytest.importorskip("obstore")
        place_of(bucket).write("a/b/c", b"1")
        assert bytes(obstore.get(place_of(f"{bucket}/a").child("b").store, "c").bytes()) == b"1"

    def test_two_processes_that_publish_the_same_files_leave_one_whole_folder(self, bucket: str) -> None:
        script = (
            "import sys; from milan_pipe.storage import place_of\n"
            "place = place_of(sys.argv[1])\n"
            "for attempt in range(5):\n"
            "    scratch = place.scratch(sys.argv[2])\n"
            "    for n in range(10): (scratch / str(n)).write_text(f'content {n}')\n"
            "    place.publish(scratch, 'shard')\n"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", script, bucket, name], stderr=subprocess.PIPE) for name in "ab"
        ]
        assert [process.communicate(timeout=60)[1] for process in running] == [b"", b""]
        place = place_of(bucket)
        assert {name: place.read(f"shard/{name}") for name in place.sizes("shard")} == {
            str(n): f"content {n}".encode() for n in range(10)
        }

    def test_files_of_several_parts(self, bucket: str) -> None:
        data = os.urandom(11_000_000)
        place = place_of(bucket)
        place.write("a", data)
        assert place.read("a") == data
        fill(scratch := place.scratch("shard"), {"big": data})
        place.publish(scratch, "shard")
        assert place.read("shard/big") == data

    def test_no_such_bucket(self, bucket: str) -> None:  # noqa: ARG002
        name = f"none-{uuid.uuid4().hex}"
        place = place_of(f"s3://{name}/a")
        for ask in (lambda: place.read("b"), lambda: place.write("b", b"1"), place.sizes, place.listing):
            with pytest.raises(StoreError, match=f"there is no bucket {name}") as caught:
                ask()
            one_line(caught)

    def test_scratch_of_another_user_is_not_used(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        place = place_of(bucket)
        path = place.scratch("a")
        assert path.parent.stat().st_mode & 0o077 == 0
        someone = os.getuid() + 1
        path.parent.rename(path.parent.with_name(path.parent.name.replace(f"-{os.getuid()}-", f"-{someone}-")))
        monkeypatch.setattr(os, "getuid", lambda: someone)
        with pytest.raises(StoreError, match="belongs to another user; set TMPDIR"):
            place.scratch("a")


def test_words_of_urls() -> None:
    assert is_url("s3://b")
    assert not is_url("/a/b://c")
    assert not is_url(Path("a"))
    assert split_url("s3://b/c/d.tar") == ("s3://b/c", "d.tar")
    assert split_url("s3://b/d.tar") == ("s3://b", "d.tar")
    assert split_url("s3://b/c/") == ("s3://b", "c")
    assert split_url("s3://b") == ("s3://b", "")
    assert split_url("a/b.tar") == ("a", "b.tar")
    assert split_url("b.tar") == (".", "b.tar")


@pytest.mark.parametrize("url", ["ftp://host/a", "file:///a", "s3://", "s3:///a", "https:///a"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError, match=r"expected a path, or s3://, gs://, az:// or https://") as caught:
        place_of(url)
    assert url in one_line(caught)


def test_google_and_azure_can_be_named(monkeypatch: pytest.MonkeyPatch, aws_environment: None) -> None:  # noqa: ARG001
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(SettingError, match="set AZURE_STORAGE_ACCOUNT_NAME") as caught:
        place_of("az://container/a")
    one_line(caught)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    for url in ("az://container/a", "gs://bucket/a/b"):
        place = place_of(url)
        assert (str(place), place.local, place.listable) == (url, None, True)
        assert str(pickle.loads(pickle.dumps(place)).child("c")) == f"{url}/c"
