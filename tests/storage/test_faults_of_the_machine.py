"""What is the machine's fault is not called damage; what is no file is not waited for; what is secret is not shown."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import processes
from support.targets import check_store, header, tree, write_store

from milan_pipe.errors import DataError, MilanError, StoreError, printable, resource_hint
from milan_pipe.extraction.cluster import own_folder, remove_left_folders
from milan_pipe.images.masked import read_classes
from milan_pipe.images.shards import shard_file
from milan_pipe.images.table import read_header
from milan_pipe.images.tar import read_shard
from milan_pipe.storage import local, location_of
from milan_pipe.storage.local import open_regular
from milan_pipe.targets.store import TargetStoreWriter, open_targets
from milan_pipe.targets.verify import verify_store

FORMATS = ["zarr", "webdataset"]


# --- descriptors --------------------------------------------------------------------------------------------------

_READ_ALL = """
import resource, sys
from milan_pipe.targets.store import open_targets
import milan_pipe.targets.zarr_store
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
store = open_targets(sys.argv[1])
for view in range(store.header.views.count):
    for shard in store.shards:
        store.read(shard, view, 0, store.samples(shard))
"""


@pytest.mark.parametrize("store_format", FORMATS)
def test_many_shards_are_read_with_few_descriptors(tmp_path: Path, store_format: str) -> None:
    write_store(tmp_path, header(format=store_format, shards=32), [5] * 32)
    processes.run([sys.executable, "-c", _READ_ALL, str(tmp_path)], check=True, timeout=120)


def descriptors() -> Iterator[int]:
    """All that are left."""
    with contextlib.suppress(OSError):
        while True:
            yield os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize("store_format", FORMATS)
def test_no_descriptor_left_is_not_called_damage(tmp_path: Path, store_format: str) -> None:
    written = write_store(tmp_path, header(format=store_format), [130])
    store = open_targets(tmp_path)
    store.read("000000", 0, 0, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))  # noqa: PTH208
        taken = list(descriptors())
        try:
            for read in (lambda: store.read("000000", 1, 0, 130), lambda: open_targets(tmp_path)):
                with pytest.raises(StoreError, match="ulimit") as caught:
                    read()
                assert not isinstance(caught.value, DataError)
                assert "--redo" not in str(caught.value)
        finally:
            for handle in taken:
                os.close(handle)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check_store(store, written)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.EMFILE, "x"), "ulimit"),
        (RuntimeError("Generic LocalFileSystem error: Too many open files (os error 24)"), "ulimit"),
        (OSError(errno.EIO, "x"), "disk"),
        (OSError(errno.ESTALE, "x"), "mount"),
        (MemoryError(), "memory"),
        (OSError(errno.ENOENT, "x"), None),
        (ValueError("the checksum does not fit"), None),
    ],
)
def test_what_ran_out_is_named(error: Exception, word: str | None) -> None:
    hint = resource_hint(error)
    assert (hint is None) == (word is None)
    assert word is None or word in str(hint)


def test_the_command_line_raises_the_soft_limit() -> None:
    code = (
        "import resource; from milan_pipe.cli.console import raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300)); raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = processes.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "(300, 300)"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is one of glibc")
def test_a_command_does_not_wait_for_fresh_pages_of_large_blocks() -> None:
    """Without it each of these 64 MB costs 16,384 faults."""
    code = (
        "import resource, numpy\n"
        "from milan_pipe.cli.console import keep_freed_memory\n"
        "keep_freed_memory(); numpy.ones(2**23); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): numpy.ones(2**23)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = processes.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 10_000


# --- files that change, and that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize("store_format", FORMATS)
def test_a_file_that_is_cut_while_the_store_is_open_is_one_error(tmp_path: Path, store_format: str) -> None:
    write_store(tmp_path, header(format=store_format), [130])
    store = open_targets(tmp_path)
    store.read("000000", 0, 0, 128)
    for path in (tmp_path / "shards" / "000000").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="--redo"):
        store.read("000000", 0, 0, 128)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    location = location_of(tmp_path)
    for ask in (lambda: location.read("a"), lambda: location.open("a"), lambda: location.read_range("a", 0, 5)):
        with pytest.raises(StoreError, match="regular"):
            ask()


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="files of /proc are Linux's")
def test_a_file_that_says_it_is_empty_and_is_not_is_read_up_to_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MOST_READ_WHOLE", 2**20)
    for name in ("version", "self/pagemap"):
        (tmp_path / Path(name).name).symlink_to(Path("/proc", name))
    location = location_of(tmp_path)
    assert location.read("version") == Path("/proc/version").read_bytes()
    with pytest.raises(StoreError, match="larger than 1048576 bytes"):
        location.read("pagemap")


@pytest.mark.skipif(not os.access("/proc/kmsg", os.R_OK), reason="only root reads the kernel's messages")
def test_a_file_that_waits_for_content_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.tar", "a.csv", "a.parquet", "classes.txt"):
        (tmp_path / name).symlink_to("/proc/kmsg")
    with contextlib.suppress(OSError), open_regular(tmp_path / "a.tar") as file:
        while file.read(2**16):
            pass
    for name, read in (
        ("a.tar", lambda path: list(read_shard(path, lambda *_: None))),
        ("a.csv", lambda path: read_header(shard_file(path))),
        ("a.parquet", lambda path: read_header(shard_file(path))),
        ("classes.txt", read_classes),
    ):
        # The kernel may have something to say meanwhile.
        with contextlib.suppress(MilanError):
            read(tmp_path / name)


def test_what_macos_leaves_is_no_content(tmp_path: Path) -> None:
    location = location_of(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    head = header(shards=2)
    written = write_store(tmp_path, head, [5, 5])
    for name in ("._zarr.json", "shards/000000/._zarr.json", "shards/000000/.DS_Store", "manifest/._000000.json"):
        (tmp_path / name).write_bytes(b"x")
    assert not any("._" in path or ".DS_Store" in path for path in location.sizes())
    assert verify_store(tmp_path).problems == ()
    (tmp_path / "manifest.json").unlink()
    assert sorted(TargetStoreWriter(tmp_path, head).committed(sizes=True)) == ["000000", "000001"]
    TargetStoreWriter(tmp_path, head).finish()
    check_store(open_targets(tmp_path), written)


def test_a_file_system_without_links_holds_a_new_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    # A file system of that kind cannot be mounted here.
    monkeypatch.setattr(os, "link", refuse)
    written = write_store(tmp_path, header(), [5])
    check_store(open_targets(tmp_path), written)
    assert not location_of(tmp_path).write("shards/zarr.json", b"another", replace=False)
    check_store(open_targets(tmp_path), written)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("store_format", FORMATS)
def test_files_of_a_store_follow_the_umask(tmp_path: Path, store_format: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_store(tmp_path / "t", header(format=store_format), [130])
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "t").rglob("*")}
    assert {
        path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    } == {}


# --- what is shown ------------------------------------------------------------------------------------------------


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9b\u202ec") == "a\\x1b[2Jb\\x07\\x9b\\u202ec"
    assert printable("größe 日本 🙂\tx") == "größe 日本 🙂\tx"
    assert "\x1b" not in str(DataError("key \x1b]0;title\x07"))


def test_passwords_of_urls_are_not_shown() -> None:
    assert printable("s3://me:pw@b/c@d s3:/me:pw@b a:b@c") == "s3://***@b/c@d s3:/***@b a:b@c"
    assert printable("hf://datasets/o/n@v1/a az://b/a?x=1&sig=ab%2F&y=2") == (
        "hf://datasets/o/n@v1/a az://b/a?x=1&sig=***&y=2"
    )
    assert (
        printable("https://h/it's?any=ab%2F, http:/h/a#x. https://h/?")
        == "https://h/it's?***, http:/h/a#***. https://h/?"
    )
    location = location_of("https://anna:secret@example.org/data").child("deep")
    assert "secret" not in f"{location} {location!r}"
    assert location.address == "https://anna:secret@example.org/data/deep"
    assert "secret" not in str(StoreError("s3://key:secret@bucket/x cannot be read"))
    assert str(StoreError("mail a@b.org, see https://x.org/a@b")) == "mail a@b.org, see https://x.org/a@b"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["http://" * 150_000, "http://a?" + "." * 10**6, "http://a?x=" * 90_000])
def test_long_text_takes_no_square_of_its_length(text: str) -> None:
    assert len(printable(text)) <= len(text)


# --- temporary folders that machines share --------------------------------------------------------------------------


def test_only_this_machines_dead_processes_lose_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f"milan-pipe-dask-{platform.node()}-{gone.pid}-x"
    elsewhere = tmp_path / f"milan-pipe-dask-another-host-{gone.pid}-x"
    dead.mkdir()
    elsewhere.mkdir()
    with own_folder() as own:
        remove_left_folders()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(own).name, elsewhere.name])


def test_a_finished_store_may_lie_where_nothing_can_be_written(tmp_path: Path) -> None:
    head = header()
    write_store(tmp_path / "t", head, [5])
    before = tree(tmp_path / "t")
    mount = ["mount", "--bind", "-o", "ro", str(tmp_path / "t"), str(tmp_path / "t")]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a read-only mount needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path / "t")], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "t" / "x").touch()
        writer = TargetStoreWriter(tmp_path / "t", head)
        assert list(writer.committed(sizes=True)) == ["000000"]
        writer.finish()
    finally:
        subprocess.run(["umount", str(tmp_path / "t")], check=True)
    assert tree(tmp_path / "t") == before
