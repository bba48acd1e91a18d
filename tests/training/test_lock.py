"""A run directory has one writer, whoever asks and however the one before has ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import processes

from milan_pipe.errors import StoreError
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.lock import LOCK, only_writer

ONE = Ranks(0, 1, torch.device("cpu"))
HOLD = """
import os, sys, warnings
from pathlib import Path
import torch
from milan_pipe.errors import StoreError
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.lock import only_writer
warnings.showwarning = lambda message, *_, **__: print("warning:", message)
try:
    with only_writer(Path(sys.argv[1]), Ranks(0, 1, torch.device("cpu"))):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        print("held", flush=True)
        sys.stdin.read()
except StoreError as error:
    print("error:", error)
"""


@contextmanager
def process_with(run: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", HOLD, str(run)]
    with processes.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_second_one_learns_who_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process_with(run) as first:
        assert line_of(first) == "held"
        holder = rf"process {first.pid} on {socket.gethostname()} since 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        for _ in range(2):
            with (
                pytest.raises(StoreError, match=rf"{run} is being written by {holder}.*; wait for it, stop it, or"),
                only_writer(run, ONE),
            ):
                pass
        first.communicate("")
    assert list(run.parent.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with only_writer(run, ONE):
            assert (run / ".lock").is_file()
            with process_with(run) as second:
                assert line_of(second).startswith(f"error: {run} is being written by process {os.getpid()} on")


def test_a_killed_one_is_taken_over_with_a_warning(tmp_path: Path) -> None:
    with process_with(tmp_path / "run") as first:
        assert line_of(first) == "held"
        first.kill()
        first.wait()
    with (
        pytest.warns(RuntimeWarning, match=rf"was being written by process {first.pid} on .*, which is gone"),
        only_writer(tmp_path / "run", ONE),
    ):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_one_process_does_not_take_it_twice(tmp_path: Path) -> None:
    with only_writer(tmp_path, ONE):
        for _ in range(2):
            with (
                pytest.raises(StoreError, match="is being written by this process already"),
                only_writer(tmp_path / ".." / tmp_path.name, ONE),
            ):
                pass
        with process_with(tmp_path) as second:
            assert line_of(second).startswith("error:")
    with only_writer(tmp_path, ONE):
        pass


def test_of_many_at_once_one_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(run)]
    started = [processes.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        lines = [line_of(process) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert sorted(line.partition(" ")[0] for line in lines) == ["error:", "error:", "held"]


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0\0", "[" * 5000])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with only_writer(tmp_path, ONE):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_no_folder_and_a_begun_one_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), only_writer(tmp_path / "a" / "b", ONE):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a" / "b", ONE):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with (
        pytest.raises(StoreError, match=r"cannot be made: .*; choose another folder"),
        only_writer(tmp_path / "a" / "b" / "file" / "run", ONE),
    ):
        pass


def test_where_nothing_can_be_written_there_is_no_lock(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o ro none {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a read-only disk needs the right to mount a tmpfs")
    words = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", HOLD, str(tmp_path)]
    done = processes.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system without locks, which cannot be had here."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_is_looked_for(tmp_path: Path) -> None:
    file, here = tmp_path / ".lock", socket.gethostname()
    with subprocess.Popen(["sleep", "60"]) as other:
        file.write_text(json.dumps({"host": here, "pid": other.pid, "since": "noon"}))
        with (
            pytest.raises(StoreError, match=rf"process {other.pid} on .* since noon; .* is gone, remove {file}"),
            only_writer(tmp_path, ONE),
        ):
            pass
        other.kill()
    with pytest.warns(RuntimeWarning, match=f"process {other.pid} .* is gone"), only_writer(tmp_path, ONE):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    file.write_text(json.dumps({"host": "elsewhere", "pid": other.pid, "since": "noon"}))
    with pytest.raises(StoreError, match="on elsewhere since noon"), only_writer(tmp_path, ONE):
        pass
    file.write_text(json.dumps({"host": here, "pid": os.getpid(), "since": "noon"}))
    with pytest.warns(RuntimeWarning, match="is gone"), only_writer(tmp_path, ONE):
        pass
    assert not file.exists()


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "File name too long"), ("loop", "File exists")])
def test_a_folder_that_cannot_be_is_one_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match=f"{name[:9]}.* cannot be made: .*{reason}"), only_writer(tmp_path / name, ONE):
        pass


def test_a_lock_that_is_a_link_to_itself_is_one_error(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(LOCK)
    with pytest.raises(StoreError, match=r"\.lock cannot be opened: .*symbolic links"), only_writer(tmp_path, ONE):
        pass
