"""Python processes that start in 50 ms: forked from a server that has imported what they need, and never computed.

`Popen` and `run` are those of `subprocess`. A command `[sys.executable, "-m" or "-c", ...]` becomes a real child of
this process, with its own pid, signals and exit status. So do the Python processes that it starts (workers, ranks).
Anything else, or an environment that imports depend on, gets a process as usual. Tests of imports and of the installed
command use `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import multiprocessing.util
import os
import pickle
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil

# Not the command line: its console looks at the terminal when it is imported.
_IMPORTED = (
    "milan_pipe.api",
    "milan_pipe.evaluation.finetune",
    "milan_pipe.evaluation.frozen",
    "milan_pipe.evaluation.lars_probe",
    "milan_pipe.evaluation.segment",
    "milan_pipe.extraction.cluster",
    "milan_pipe.extraction.run",
    "milan_pipe.images.prepare",
    "milan_pipe.pretraining.run",
    "milan_pipe.targets.convert",
    "milan_pipe.targets.verify",
    "dask.__main__",
    "distributed.nanny",
    "torch.distributed.run",
    "typer",
    "rich.progress",
)
_READ_BY_IMPORTS = ("HF_", "LD_", "PYTHONPATH")
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_PR_SET_CHILD_SUBREAPER = 36
_AS_USUAL = subprocess.Popen
_ROOM_FOR_ARGUMENTS = 16384


class _Request(NamedTuple):
    words: list[str]
    cwd: str
    environment: dict[str, str]
    descriptors: list[int]
    new_session: bool
    umask: int
    mask: set[int]
    ignored: list[int]
    limits: dict[int, tuple[int, int]]


class _Server:
    """The other end: a process that forks on request."""

    def __init__(self, requests: socket.socket, environment: dict[str, str]) -> None:
        self._requests = requests
        self._imported_with = _read_by_imports(environment)
        self._lock = threading.Lock()

    def fork(
        self,
        words: list[str],
        descriptors: dict[int, int],
        cwd: str | None = None,
        environment: dict[str, str] | None = None,
        new_session: bool = False,
        umask: int = -1,
    ) -> int | None:
        """Pid of a new child of this process, or None where it must be started as usual.

        Args:
            descriptors: number in the child -> number here.
        """
        environment = dict(os.environ if environment is None else environment)
        if _target(words) is None or _read_by_imports(environment) != self._imported_with:
            return None
        with self._lock:
            if umask < 0:
                umask = os.umask(0)
                os.umask(umask)
            request = _Request(
                words,
                os.path.abspath(cwd or "."),  # noqa: PTH100
                environment,
                list(descriptors),
                new_session,
                umask,
                {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())},
                [number for number in range(1, 32) if signal.getsignal(number) is signal.SIG_IGN],
                {limit: resource.getrlimit(limit) for limit in _LIMITS},
            )
            # The child's parent ends at once, and the nearest subreaper above it becomes its parent.
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._requests, [pickle.dumps(tuple(request))], list(descriptors.values()))
                return int(self._requests.recv(32))
            finally:
                ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


_server: _Server | None = None


def server() -> _Server:
    """This process's server, which ends with it."""
    global _server
    if _server is None:
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            words = [sys.executable, __file__, str(other.fileno()), " " * _ROOM_FOR_ARGUMENTS]
            _AS_USUAL(words, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        _server = _Server(mine, dict(os.environ))
    return _server


_started: list[subprocess.Popen[Any]] = []


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """What `Popen` starts meanwhile and nobody waits for, as a test failed, is killed with all that it has started."""
    _started.clear()
    yield
    for process in _started:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
    _started.clear()


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """As in `subprocess`."""

    def _execute_child(self, *given: Any) -> None:
        _started.append(self)
        call = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        words, streams = call["args"], [call["p2cread"], call["c2pwrite"], call["errwrite"]]
        usual = call["preexec_fn"] or call["executable"] or call["shell"] or not isinstance(words, (list, tuple))
        pid = None
        if not usual and _target([os.fsdecode(word) for word in words]) is not None:
            descriptors = {number: number if own < 0 else own for number, own in enumerate(streams)}
            pid = server().fork(
                [os.fsdecode(word) for word in words],
                {**{number: number for number in call["pass_fds"]}, **descriptors},
                call["cwd"],
                call["env"],
                call["start_new_session"],
                call["umask"],
            )
        if pid is None:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        self.pid, self._child_created = pid, True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in pipes))  # type: ignore[attr-defined]


def run(words: list[str], **given: Any) -> subprocess.CompletedProcess[Any]:
    """As in `subprocess`."""
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(words, **given)


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Processes that `multiprocessing` spawns here meanwhile are forked from the server too."""
    as_usual = multiprocessing.util.spawnv_passfds

    def spawn(path: Any, words: list[Any], descriptors: list[int]) -> int:
        numbers = {number: number for number in (0, 1, 2, *descriptors)}
        pid = server().fork([os.fsdecode(path), *map(os.fsdecode, words[1:])], numbers)
        return as_usual(path, words, descriptors) if pid is None else pid

    with mock.patch.object(multiprocessing.util, "spawnv_passfds", spawn):
        yield


def _read_by_imports(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_BY_IMPORTS)}


def _target(words: list[str]) -> tuple[str, list[str]] | None:
    """`-m` or `-c`, and what comes after it."""
    if words[0] != sys.executable:
        return None
    rest = words[1:]
    while rest and rest[0] in ("-u", "-B"):
        rest = rest[1:]
    return (rest[0], rest[1:]) if rest and rest[0] in ("-m", "-c") else None


# --- in the server, and in its children ---------------------------------------------------------------------------


def _wait_for_request(requests: socket.socket) -> tuple[_Request, list[int]]:
    """Fork for each request. Returns in the children alone; the server ends when nobody can ask it any more."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 64)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os._exit(0)
            while os.getppid() == middle:
                time.sleep(0.0005)
            for descriptor in (reading, writing):
                os.close(descriptor)
            requests.close()
            return _Request(*pickle.loads(message)), descriptors
        os.waitpid(middle, 0)
        requests.send(os.read(reading, 32))
        for descriptor in (reading, writing, *descriptors):
            os.close(descriptor)


def _become(request: _Request, descriptors: list[int]) -> None:
    """Take over what a process that is started as usual inherits."""
    for number in range(1, 32):
        if signal.getsignal(number) is signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.mask)
    if request.new_session:
        os.setsid()
    os.umask(request.umask)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    # First out of the way of the numbers that they are to have.
    above = max(request.descriptors) + 1
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for number, descriptor in zip(request.descriptors, high, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for limit, values in request.limits.items():
        if resource.getrlimit(limit) != values:
            resource.setrlimit(limit, values)
    _show(request.words)
    _read_environment_again()


def _show(words: list[str]) -> None:
    """Let `ps` and psutil see the command."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(os.fsencode(word) for word in words)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _read_environment_again() -> None:
    import tempfile

    tempfile.tempdir = None
    if any(name.startswith("DASK_") for name in os.environ):
        import dask

        dask.config.refresh()
        sys.modules["distributed.config"].initialize_logging(dask.config.config)
    if os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _main() -> None:
    global _server
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.set_inheritable(False)
    # A terminal sends Ctrl-C to the server too.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    del sys.path[0]
    # Before torchrun's own module takes it.
    subprocess.Popen = Popen  # type: ignore[misc]
    for name in _IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # Torch would take its operators apart at the end of each process.
    for one in weakref.finalize._registry:  # type: ignore[attr-defined]
        one.atexit = False
    gc.freeze()
    while True:
        request, descriptors = _wait_for_request(requests)
        own, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            break
        own.close()
        for descriptor in descriptors:
            os.close(descriptor)
    requests.close()
    _become(request, descriptors)
    _server = _Server(own, dict(os.environ))
    target = _target(request.words)
    assert target is not None
    code, interrupted = 0, False
    try:
        with forked_workers():
            _run(*target)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        interrupted = True
    # As the interpreter ends, but for the half second in which it takes all modules apart.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 255)


def _run(kind: str, words: list[str]) -> None:
    sys.argv = [kind, *words[1:]]
    sys.path.insert(0, os.getcwd() if kind == "-m" else "")  # noqa: PTH109
    if kind == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    _main()
