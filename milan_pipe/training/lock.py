"""One process to a run directory: a lock that says who holds it, and that goes with its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from milan_pipe.errors import StoreError, system_reason
from milan_pipe.storage.kinds import RUN, require_new
from milan_pipe.storage.local import make_folder, open_own
from milan_pipe.training.distributed import Ranks

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_TODO = "wait for it, stop it, or name another folder"
_held: dict[str, object] = {}


@contextmanager
def only_writer(run: Path, ranks: Ranks) -> Iterator[None]:
    """Make a run's directory and be its only writer; every rank calls it, the first one takes the lock.

    The lock of a killed process is taken over, with a warning. Where nothing can be written there is no lock: a
    finished run can be read there.

    Raises:
        StoreError: another process writes the run, or the directory cannot be made; says which, and what to do.
    """
    with ExitStack() as stack:
        problem = ""
        if ranks.first:
            try:
                stack.enter_context(_made(run))
                stack.enter_context(_locked(run))
            except StoreError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{run} cannot be made: {system_reason(error)}; name another folder"
        # All ranks end, and none waits for one that has.
        if problem := ranks.broadcast(problem):
            raise StoreError(problem)
        yield


@contextmanager
def _made(run: Path) -> Iterator[None]:
    """Make a directory; new folders that are empty in the end are removed, as of a refused run."""
    require_new(run, RUN)
    new = [path for path in (run, *run.parents) if not path.exists()]
    make_folder(run)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    file = run / LOCK
    name, mine = os.path.realpath(file), object()
    # Before the file is opened: closing it again would release the lock, which is the process's. One atomic call.
    if _held.setdefault(name, mine) is not mine:
        raise StoreError(f"{run} is being written by this process already; {_TODO}")
    try:
        handle = _acquire(run, file)
        try:
            yield
        finally:
            if handle is not None:
                # While it is locked, so that no other process's is removed.
                with suppress(OSError):
                    file.unlink()
                os.close(handle)
    finally:
        del _held[name]


def _acquire(run: Path, file: Path) -> int | None:
    """The open lock file, locked and with this process in it; None where nothing can be written."""
    while True:
        # Not `filelock`: it empties the file on each attempt, so that nobody could say who holds the lock.
        try:
            handle = open_own(str(file), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in _READ_ONLY and not file.exists():
                return None
            reason = f"{system_reason(error)}; it says which process writes the run: remove it if there is none"
            raise StoreError(f"{file} cannot be opened: {reason}") from error
        with ExitStack() as stack:
            stack.callback(os.close, handle)
            try:
                owner = _lock(handle, run, file)
                # A process that has just ended may have removed the file that was opened.
                with suppress(FileNotFoundError):
                    if os.path.samestat(file.stat(), os.fstat(handle)):
                        _write_owner(handle)
                        if owner:
                            gone = f"{run} was being written by {_described(owner)}, which is gone"
                            warnings.warn(f"{gone}; its run is taken over", RuntimeWarning, stacklevel=2)
                        stack.pop_all()
                        return handle
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(f"{file} cannot be locked: {system_reason(error)}") from error


def _lock(handle: int, run: Path, file: Path) -> dict[str, Any]:
    """Lock a file; returns what a dead process has left in it."""
    try:
        # POSIX locks: not inherited by forked workers, released by the kernel when the process dies, known to NFS.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner, held = _owner(handle), error.errno in (errno.EACCES, errno.EAGAIN)
        if not held and error.errno not in _NO_LOCKS:
            raise
        # On a file system without locks a process of this host can be looked for, another host's cannot.
        if held or (owner and not _is_gone(owner)):
            todo = _TODO if held else f"{_TODO}. If that process is gone, remove {file}"
            raise StoreError(f"{run} is being written by {_described(owner)}; {todo}") from None
        return owner
    return _owner(handle)


def _owner(handle: int) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(os.pread(handle, 4096, 0))
        return found if isinstance(found, dict) else {}
    return {}


def _described(owner: dict[str, Any]) -> str:
    known = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
    return known if owner else "another process"


def _is_gone(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    # In containers the number of every process is the same: this process's own says that another one is gone.
    return pid == os.getpid() or not psutil.pid_exists(pid)


def _write_owner(handle: int) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    data = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode() + b"\n"
    # Cut after it is written: whoever reads it meanwhile finds somebody.
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
