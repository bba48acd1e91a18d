"""Local folders and object stores do the same, in the same words."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub, hub_of, use_hub
from support.messages import one_line

from milan_pipe.errors import MissingError, SettingError, StoreError
from milan_pipe.storage import (
    SCRATCH,
    Listing,
    Location,
    is_url,
    location_of,
    object_store,
    require_writable,
    split_root,
    split_url,
)
from milan_pipe.storage import hub as hub_module


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class ReadContract:
    """What every location does. Subclasses give a `location` that does not exist yet."""

    def put(self, location: Location, path: str, data: bytes) -> None:
        """Have a file there to read."""
        assert location.write(path, data)

    def test_a_file_comes_back_as_it_was_written(self, location: Location) -> None:
        data = os.urandom(100_000)
        for path in ("a", "folder/b.tar", "größe 1/#%41+&.bin"):
            self.put(location, path, data)
            assert location.read(path) == data
            assert location.size(path) == len(data)
        self.put(location, "a", b"")
        assert location.read("a") == b""
        assert location.size("a") == 0

    def test_ranges(self, location: Location) -> None:
        self.put(location, "a", bytes(range(100)))
        assert location.read_range("a", 0, 100) == bytes(range(100))
        assert location.read_range("a", 10, 12) == bytes([10, 11])
        assert location.read_range("a", 98, 200) == bytes([98, 99])
        assert location.read_range("a", 100, 200) == b""
        assert location.read_range("a", 500, 600) == b""
        assert location.read_range("a", 5, 5) == b""

    def test_what_is_not_there(self, location: Location) -> None:
        self.put(location, "there", b"1")
        asks: list[Callable[[], object]] = [
            lambda: location.read("gone/a"),
            lambda: location.read_range("gone/a", 0, 1),
            lambda: location.read_range("gone/a", 0, 0),
            lambda: location.size("gone/a"),
            lambda: location.open("gone/a"),
        ]
        for ask in asks[: 2 if location.local else None]:
            with pytest.raises(MissingError, match="gone/a") as caught:
                ask()
            one_line(caught)
        assert location.child("gone").sizes() == {}
        assert location.child("gone").listing() == Listing(files={}, folders=())
        assert location.child("gone").present(["a"]) == {}

    def test_an_open_file_seeks_and_reads_like_any_other(
        self, location: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_store, "READ_AHEAD_BYTES", 100_000)
        data = os.urandom(1_000_000)
        self.put(location, "a", data)
        (tmp_path / "same").write_bytes(data)
        with location.open("a") as file, (tmp_path / "same").open("rb") as same:
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

    def test_an_empty_file_opens(self, location: Location) -> None:
        self.put(location, "a", b"")
        with location.open("a") as file:
            assert file.read() == b""

    def test_lists_leave_scratch_and_neighbours_out(self, location: Location) -> None:
        for path in ("a/1", "a/b/22", "a/b/c/333", "ab/1", f"a/{SCRATCH}x/1", f"a/b/{SCRATCH}y", "top"):
            self.put(location, path, b"x" * len(path.rpartition("/")[2]))
        assert location.child("a").sizes() == {"1": 1, "b/22": 2, "b/c/333": 3}
        assert list(location.sizes()) == ["a/1", "a/b/22", "a/b/c/333", "ab/1", "top"]
        assert location.child("a").child("b").sizes() == {"22": 2, "c/333": 3}
        assert location.child("a").listing() == Listing(files={"1": 1}, folders=("b",))
        assert location.listing() == Listing(files={"top": 3}, folders=("a", "ab"))
        assert location.present(["top", "a", "gone"]) == {"top": 3}

    def test_many_names_are_found_as_few_are(self, location: Location) -> None:
        for name in ("3", "30", "5000"):
            self.put(location, name, name.encode())
        assert location.present(str(number) for number in range(100)) == {"3": 1, "30": 2}

    def test_children_and_copies_in_other_processes_are_the_same_place(self, location: Location) -> None:
        child = location.child("a/b")
        self.put(child, "c", b"1")
        assert location.read("a/b/c") == b"1"
        copy = pickle.loads(pickle.dumps(child))
        assert copy == child
        assert hash(copy) == hash(child)
        assert copy.read("c") == b"1"
        assert str(child) == f"{location}/a/b"
        script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read('c'))"
        done = subprocess.run(
            [sys.executable, "-c", script], input=pickle.dumps(child), capture_output=True, check=True
        )
        assert done.stdout.strip() == b"b'1'"


class PlaceContract(ReadContract):
    """What every location that can be written does."""

    def test_create_only(self, location: Location) -> None:
        assert location.write("folder/a", b"first", replace=False)
        assert not location.write("folder/a", b"second", replace=False)
        assert location.read("folder/a") == b"first"
        assert location.write("folder/a", b"third")
        assert location.read("folder/a") == b"third"
        assert location.sizes() == {"folder/a": 5}

    def test_remove(self, location: Location) -> None:
        for path in ("a", "b/1", "b/c/2", "bc/3", "b.json"):
            location.write(path, b"x")
        location.remove("b")
        assert list(location.sizes()) == ["a", "b.json", "bc/3"]
        location.remove("a")
        location.remove("a")
        location.remove("gone/for/long")
        assert list(location.sizes()) == ["b.json", "bc/3"]

    def test_publish_puts_the_whole_in_the_location_of_what_was_there(self, location: Location) -> None:
        for files in ({"x": b"1", "deep/er/y": b"22", "stray/z": b"3"}, {"x": b"4", "deep/er/w": b"5" * 20}):
            scratch = fill(location.scratch("shard"), files)
            location.publish(scratch, "shard")
            assert not scratch.exists()
            assert {path: location.read(f"shard/{path}") for path in location.child("shard").sizes()} == files

    def test_scratch_is_cleared_by_its_own_name(self, location: Location) -> None:
        location.clear_scratch("a")
        mine, too, other = (location.scratch(name) for name in ("a", "a", "a-b"))
        fill(mine, {"x/y": b"1"})
        assert mine != too
        location.clear_scratch("a")
        assert [path.exists() for path in (mine, too, other)] == [False, False, True]
        location.clear_scratch()
        assert not other.exists()
        location.clear_scratch()


class TestFolder(PlaceContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> Location:
        return location_of(tmp_path / "location")

    def test_what_stands_in_the_way_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"mine")
        location = location_of(tmp_path / "file" / "store")
        for attempt in (lambda: location.write("a", b"1"), lambda: location.scratch("a"), lambda: location.read("a")):
            with pytest.raises(StoreError, match=r"file/store/\S+ ") as caught:
                attempt()
            one_line(caught)
        location = location_of(tmp_path)
        scratch = fill(location.scratch("file"), {"x": b"1"})
        with pytest.raises(StoreError, match="Not a directory"):
            location.publish(scratch, "file")
        assert (tmp_path / "file").read_bytes() == b"mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([scratch.name, "file"])

    def test_a_folder_that_may_not_be_listed_is_no_empty_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: object = ".") -> object:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", refuse)
        for ask in (location_of(tmp_path).sizes, location_of(tmp_path).listing):
            with pytest.raises(StoreError, match="Permission denied"):
                ask()

    def test_no_room_leaves_the_old_file_and_nothing_beside_it(self, tmp_path: Path) -> None:
        location = location_of(tmp_path)
        location.write("a", b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))
        try:
            with pytest.raises(StoreError, match="File too large"):
                location.write("a", b"new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}

    def test_of_two_processes_one_creates(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        barrier, created = context.Barrier(2), context.Queue()
        creators = [context.Process(target=_create, args=(str(tmp_path), mark, barrier, created)) for mark in "ab"]
        for creator in creators:
            creator.start()
        answers = dict(created.get(timeout=60) for _ in creators)
        for creator in creators:
            creator.join(60)
        found = {name: location_of(tmp_path).read(name).decode() for name in location_of(tmp_path).sizes()}
        assert len(found) == _CREATED
        assert {mark: [name for name in found if found[name] == mark] for mark in answers} == answers

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
    location = location_of(folder)
    barrier.wait(60)
    names = [f"{number:04d}" for number in range(_CREATED)]
    created.put((mark, [name for name in names if location.write(name, mark.encode(), replace=False)]))


def _publish(folder: str, mark: str, barrier: Any, errors: Any) -> None:
    location = location_of(folder)
    failed = None
    for attempt in range(60):
        scratch = fill(location.scratch("shard"), {f"{mark}-{n}": f"{mark}{attempt}".encode() for n in range(20)})
        if attempt == 0:
            barrier.wait(60)
        try:
            location.publish(scratch, "shard")
        except Exception as error:
            failed = repr(error)
    errors.put(failed)


class TestBucket(PlaceContract):
    @pytest.fixture
    def location(self, bucket: str) -> Location:
        return location_of(f"{bucket}/location")

    def test_two_processes_that_publish_the_same_files_leave_one_whole_folder(self, bucket: str) -> None:
        script = (
            "import sys; from milan_pipe.storage import location_of\n"
            "location = location_of(sys.argv[1])\n"
            "for attempt in range(5):\n"
            "    scratch = location.scratch(sys.argv[2])\n"
            "    for n in range(10): (scratch / str(n)).write_text(f'content {n}')\n"
            "    location.publish(scratch, 'shard')\n"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", script, bucket, name], stderr=subprocess.PIPE) for name in "ab"
        ]
        assert [process.communicate(timeout=60)[1] for process in running] == [b"", b""]
        location = location_of(bucket)
        assert {name: location.read(f"shard/{name}") for name in location.child("shard").sizes()} == {
            str(n): f"content {n}".encode() for n in range(10)
        }

    def test_files_of_several_parts(self, bucket: str) -> None:
        data = os.urandom(11_000_000)
        location = location_of(bucket)
        location.write("a", data)
        assert location.read("a") == data
        fill(scratch := location.scratch("shard"), {"big": data})
        location.publish(scratch, "shard")
        assert location.read("shard/big") == data

    def test_scratch_is_its_users_alone(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        location = location_of(bucket)
        path = location.scratch("a")
        assert path.stat().st_mode & 0o077 == 0
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        location.clear_scratch()
        assert path.exists()
        assert location.scratch("a") != path

    def test_no_room_for_scratch_says_where_to_find_some(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
        with pytest.raises(StoreError, match="TMPDIR"):
            location_of(bucket).scratch("a")


class TestHub(ReadContract):
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
        with hub_of(tmp_path / "hub") as hub:
            use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
            hub.behave(private={"datasets/org/data"}, page=2)
            monkeypatch.setenv("HF_TOKEN", hub.token)
            self.root = fill(hub.folder / "datasets" / "org" / "data", {"README.md": b"# data\n"})
            yield hub
            # Who has the token has it for the hub, and for no other host.
            assert hub.leaks == []

    @pytest.fixture
    def location(self, hub: Hub) -> Location:  # noqa: ARG002
        return location_of("hf://datasets/org/data@main/location")

    def put(self, location: Location, path: str, data: bytes) -> None:
        fill(self.root / split_root(location.address)[1], {path: data})

    def test_the_commit_is_asked_for_once(self, hub: Hub, location: Location) -> None:
        name, earlier = "datasets/org/data", fill(hub.objects, {"1": b"\0 first", "2": b"\0 second"})
        first = hub.commit(name, {"location/a": earlier / "1"})
        assert location.child("x").present(["a"]) == {}
        second = hub.commit(name, {"location/a": earlier / "2"})
        elsewhere = pickle.loads(pickle.dumps(location))
        assert [place.read("a") for place in (location, elsewhere)] == [b"\0 first"] * 2
        assert location_of(location.address).read("a") == b"\0 second"
        assert hub.commit(name, {"location/a": earlier / "1"}, "refs/pr/1") not in (first, second)
        for revision in (first, "refs/pr/1", "refs%2Fpr%2F1"):
            assert location_of(f"hf://datasets/org/data@{revision}/location").read("a") == b"\0 first"
        assert location_of(f"hf://datasets/org/data@{second}").sizes() == {"location/a": 8}

    def test_nothing_is_asked_for_before_it_is_needed(self, hub: Hub, location: Location) -> None:
        pickle.loads(pickle.dumps(location.child("a"))).child("b")
        assert hub.requests == []

    @pytest.mark.usefixtures("short_pauses")
    def test_the_server_is_asked_again_when_it_fails(
        self, hub: Hub, location: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = {str(number): os.urandom(1000) for number in range(20)}
        for name, content in data.items():
            self.put(location, name, content)
        location.sizes()
        hub.behave(fail_every=3)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        assert {name: location.read(name) for name in location.sizes()} == data

    @pytest.mark.usefixtures("short_patience")
    def test_a_hub_that_never_answers(self, hub: Hub, location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line for each: which commit, what files there are, what is in one."""
        self.put(location, "a", b"a")
        monkeypatch.setattr(hub_module, "_SECONDS", 0.3)
        monkeypatch.setitem(object_store.TIMEOUTS, "timeout", timedelta(seconds=0.3))
        for route, ask, said in [
            ("info", location.sizes, "revision main of repository datasets/org/data cannot be fetched .* timed out"),
            ("tree", location.sizes, "files of repository datasets/org/data cannot be fetched .* no answer in 0.3 s"),
            ("resolve", lambda: location.read("a"), "location/a cannot be read: no answer from "),
        ]:
            hub.behave(silent=(route,))
            with pytest.raises(StoreError, match=said) as caught:
                ask()
            assert "\n" not in str(caught.value)
        # A thread that still asked would close the connections of other tests.
        hub.behave(silent=())
        for thread in threading.enumerate():
            if thread.name == "hub":
                thread.join()

    def test_many_threads_read_at_once(self, hub: Hub, location: Location) -> None:
        self.put(location, "a", bytes(range(250)))
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(lambda n: location.read_range("a", n, n + 1), range(250)))
        assert b"".join(parts) == bytes(range(250))
        assert sum("/revision/" in path for _, path in hub.requests) == 1

    def test_it_cannot_be_written(self, location: Location) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: location.write("a", b"1"),
            lambda: location.remove("a"),
            lambda: location.publish(fill(location.scratch("a"), {"b": b"1"}), "a"),
            lambda: require_writable(location),
        ]
        for attempt in attempts:
            with pytest.raises(SettingError, match="can only be read"):
                attempt()


def test_words_of_urls() -> None:
    assert is_url("s3://b")
    assert not is_url("/a/b://c")
    assert not is_url(Path("a"))
    assert split_url("s3://b/c/d.tar") == ("s3://b/c", "d.tar")
    assert split_url("s3://b/d.tar") == ("s3://b", "d.tar")
    assert split_url("s3://b/c/") == ("s3://b", "c")
    assert split_url("s3://b") == ("s3://b", "")
    assert split_url("a/b.tar") == ("a", "b.tar")
    assert split_url("hf://datasets/o/n/c/d.tar") == ("hf://datasets/o/n/c", "d.tar")
    assert split_url("hf://datasets/o/n@refs/pr/1/d.tar") == ("hf://datasets/o/n@refs/pr/1", "d.tar")
    assert split_url("hf://datasets/o/n@v1/") == ("hf://datasets/o/n@v1", "")
    assert split_root("hf://datasets/o/n@refs%2Fpr%2F1/a/b") == ("hf://datasets/o/n@refs%2Fpr%2F1", "a/b")
    assert split_url("b.tar") == (".", "b.tar")


@pytest.mark.parametrize("url", ["ftp://host/a", "file:///a", "s3://", "s3:///a", "https:///a"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError, match="expected") as caught:
        location_of(url)
    assert url in one_line(caught)


def test_google_and_azure_can_be_named(monkeypatch: pytest.MonkeyPatch, aws_environment: None) -> None:  # noqa: ARG001
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    for url in ("az://container/a", "gs://bucket/a/b"):
        location = location_of(url)
        assert (str(location), location.local, location.listable) == (url, None, True)
        assert str(pickle.loads(pickle.dumps(location)).child("c")) == f"{url}/c"
