"""Cases of one reader in a fork of this process, under watch, and what broke a promise.

A case is a folder that a reader was made for, with one of its files changed. The reader gives something or raises a
MilanError, within seconds and within memory. It writes nothing outside of the folder, starts and reaches nothing, and
unpickles nothing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from fuzz.mutate import STRINGS, Draw, mutated

from milan_pipe.errors import DataError, MilanError

Files = dict[str, bytes]

# A file of a few bytes may hold as many pixels as are read: seconds of a processor, and a gigabyte. Beside other work
# these take long, so what waits has longer.
TIMERS = {
    signal.SIGPROF: (signal.ITIMER_PROF, 60, "computed"),
    signal.SIGALRM: (signal.ITIMER_REAL, 600, "waited"),
}
_MORE_ADDRESSES = 2**32
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader of what comes from outside.

    Attributes:
        make: writes one or several folders that it reads, `0`, `1`, ... in a folder.
        read: reads one of them. An AssertionError is a broken promise too.
        changed: pattern of the paths in a folder that are changed.
        seal: fits digests of a folder's files to those that were changed; gets the path that was.
        words: strings that mean something to it.
        memory: most bytes that a case may take.
        may_read_outside: what it reads may name files of this machine.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    changed: str = ".*"
    seal: Callable[[Files, str], None] | None = None
    words: Sequence[str] = ()
    memory: int = 3 * 2**29
    may_read_outside: bool = False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """`what` is one line; cases of one bug have the same `where`."""

    reader: str
    seed: int
    case: int
    what: str
    where: str
    trace: str = ""

    @property
    def command(self) -> str:
        """Does it again."""
        return f"cd tests && python -m fuzz {self.reader} --seed {self.seed} --case {self.case}"

    def __str__(self) -> str:
        return f"{self.reader}, seed {self.seed}, case {self.case}: {self.what} at {self.where}. Again: {self.command}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    cases: int
    refused: int
    seconds: float
    failures: list[Failure]


class _Broken(BaseException):
    """No handler of errors takes it for one of a library."""


_tried: set[tuple[str, int]] = set()
_done: set[tuple[str, int]] = set()


def each(*reads: FunctionType) -> None:
    """Do all of them; refuses where all do, as most folders are not for all readers."""
    refused: list[str] = []
    for read in reads:
        place = read.__code__.co_filename, read.__code__.co_firstlineno
        _tried.add(place)
        try:
            read()
        except MilanError as error:
            # Not itself: its frames hold what was decoded.
            refused.append(str(error))
        else:
            _done.add(place)
    if len(refused) == len(reads):
        raise DataError(refused[0])


# --- watch --------------------------------------------------------------------------------------------------------

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
            "os.chown": 1, "os.truncate": 1, "os.utime": 1}  # fmt: skip
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
          "socket.connect", "socket.getaddrinfo", "socket.sendto", "os.putenv", "os.unsetenv")  # fmt: skip


class _Watch:
    """Audits this process; `inside` is the folder of the case, None between cases."""

    def __init__(self, root: Path, *, may_read_outside: bool) -> None:
        self._root, self._may_read_outside = f"{root}/", may_read_outside
        self.inside: str | None = None
        self.broken: str | None = None
        self._named = tuple(os.path.expanduser(word) for word in STRINGS if word.startswith(("/", "~")))  # noqa: PTH111
        self._there = self._around()
        sys.addaudithook(self._audit)

    def _around(self) -> set[str]:
        """Paths beside the folders of the cases, and those that words of the cases name."""
        beside = [entry.path for folder in (self._root, f"{self._root}made") for entry in os.scandir(folder)]
        return {*beside, *(path for path in self._named if os.path.lexists(path))}

    def strays(self) -> list[str]:
        """What native code wrote there since: it is not audited."""
        before, self._there = self._there, self._around()
        return sorted(self._there - before)

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = given
            writes = flags & _WRITING if isinstance(flags, int) else set(mode or "r") & set("wax+")
            self._require_inside(event, path, writes=bool(writes))
        elif event in _CHANGES:
            folder = given[-1] if event != "os.truncate" and given[-1] != -1 else None
            for path in given[: _CHANGES[event]]:
                below = path if folder is None else f"/proc/self/fd/{folder}/{os.fsdecode(path)}"
                self._require_inside(event, below, writes=True)
        elif event in _NEVER and not (event == "pickle.find_class" and given[0] == "numpy._core.multiarray"):
            self._break(f"{event} {given[:2]!r}"[:200])
        # Signal 0 asks whether a process is there.
        elif event in ("os.kill", "os.killpg") and given[1]:
            self._break(f"{event} {given!r}")

    def _require_inside(self, event: str, path: Any, *, writes: bool) -> None:
        if isinstance(path, int) or path is None or self.inside is None:
            return
        full = os.path.realpath(os.fsdecode(path))
        if f"{full}/".startswith(self.inside) or full == "/dev/null":
            return
        if writes or (full.startswith((self._root, *self._named)) and not self._may_read_outside):
            self._break(f"{event} of {full} outside of the folder")

    def _break(self, what: str) -> None:
        self.broken = self.broken or what
        raise _Broken(what)


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split(maxsplit=1)[0]) * 1024


def _watched(reader: Reader, folder: Path, watch: _Watch) -> tuple[str, BaseException | None]:
    """What is wrong, empty if nothing is; and the error."""
    Path("/proc/self/clear_refs").write_text("5")
    before, error = _memory("VmRSS"), None
    watch.broken, watch.inside = None, f"{folder}/"
    try:
        reader.read(folder)
    except BaseException as raised:
        error = raised
    finally:
        watch.inside = None
    if watch.broken:
        return watch.broken, error
    if strays := watch.strays():
        return f"{', '.join(strays)} came to be outside of the folder", error
    if error is not None and not isinstance(error, MilanError):
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", error
    grown = _memory("VmHWM") - before
    return (f"memory grew by {grown >> 20} MiB" if grown > reader.memory else ""), error


def _place_of(error: BaseException | None) -> str:
    """The innermost line of the package, or the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    own = [frame for frame in frames if "/milan_pipe/" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "nowhere"


# --- cases --------------------------------------------------------------------------------------------------------


def _tree(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """All that lies below a folder, the innermost first."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            yield entry


class Corpus:
    """The folders of a reader, one of which is changed at a time."""

    def __init__(self, reader: Reader, root: Path) -> None:
        self._reader, self._words = reader, (*STRINGS, *reader.words * 3)
        made = root / "made"
        made.mkdir(parents=True)
        reader.make(made)
        self._folders = sorted(folder for folder in made.iterdir() if folder.is_dir())
        self._files = [_tree(folder) for folder in self._folders]
        # Of each path that belongs there, when its file was last written.
        self._written = [
            {entry.path: entry.stat().st_mtime_ns for entry in _entries(str(folder))} for folder in self._folders
        ]
        self._changed: set[str] = set()
        # By kind and not by path: most files of a store are chunks.
        self._kinds = [_kinds(files, reader.changed) for files in self._files]

    def case(self, seed: int, number: int) -> Path:
        """The folder of a case; that of the one before is whole again."""
        draw = Draw("fuzz", self._reader.name, seed, number)
        at = draw.below(len(self._folders))
        kind = draw.of(sorted(self._kinds[at]))
        path, before = draw.of(self._kinds[at][kind]), self._files[at]
        others = [
            files[one] for files, kinds in zip(self._files, self._kinds, strict=True) for one in kinds.get(kind, ())
        ]
        changed = {**before, path: mutated(path, before[path], draw.of(others), draw, self._words)}
        if draw.one_in(50):
            del changed[path]
        elif self._reader.seal is not None:
            self._reader.seal(changed, path)
        for one, data in changed.items():
            if data is not before[one]:
                (self._folders[at] / one).write_bytes(data)
                self._changed.add(one)
        if path not in changed:
            (self._folders[at] / path).unlink()
            self._changed.add(path)
        return self._folders[at]

    def restore(self, folder: Path) -> None:
        """Undo a case, and what its reader wrote."""
        at = self._folders.index(folder)
        files, written, seen = self._files[at], self._written[at], set()
        for entry in _entries(str(folder)):
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.path not in written:
                Path(entry.path).rmdir() if is_folder else Path(entry.path).unlink()
                continue
            seen.add(entry.path)
            if not is_folder and entry.stat().st_mtime_ns != written[entry.path]:
                self._changed.add(entry.path[len(str(folder)) + 1 :])
        for missing in written.keys() - seen:
            self._changed.add(missing[len(str(folder)) + 1 :])
        for path in sorted(self._changed):
            if path not in files:
                (folder / path).mkdir(exist_ok=True)
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(files[path])
            written[str(folder / path)] = (folder / path).stat().st_mtime_ns
        self._changed.clear()


def _kinds(files: Files, pattern: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(files):
        if re.fullmatch(pattern, path):
            found.setdefault(re.sub(r"\d+", "N", path), []).append(path)
    return found


def _run(reader: Reader, root: Path, seed: int, first: int, stop: int, seconds: float) -> None:
    """Do cases, and write a line for each that fails, and one at the end."""
    warnings.simplefilter("ignore")
    corpus = Corpus(reader, root)
    for folder in sorted((root / "made").iterdir()):
        # What is whole is read, and lazy imports are done.
        reader.read(folder)
        corpus.restore(folder)
    if never := sorted(_tried - _done):
        raise RuntimeError(f"no whole folder is read by what stands at {never}")
    # Where it hangs is told, and the process ends, whoever holds the interpreter.
    for number in TIMERS:
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, all_threads=False, chain=True)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _MORE_ADDRESSES, resource.RLIM_INFINITY))
    began, refused, case = time.monotonic(), 0, first
    with (root / "now").open("w") as now:
        watch = _Watch(root, may_read_outside=reader.may_read_outside)
        while case < stop and time.monotonic() - began < seconds:
            os.pwrite(now.fileno(), f"{case:12d}{refused:12d}".encode(), 0)
            folder = corpus.case(seed, case)
            tempfile.tempdir = str(folder)
            for timer, most, _ in TIMERS.values():
                signal.setitimer(timer, most)
            what, error = _watched(reader, folder, watch)
            for timer, *_ in TIMERS.values():
                signal.setitimer(timer, 0)
            corpus.restore(folder)
            refused += error is not None
            if what:
                trace = "".join(traceback.format_exception(error))[-4000:] if error is not None else ""
                failure = Failure(
                    reader=reader.name, seed=seed, case=case, what=what, where=_place_of(error), trace=trace
                )
                print(json.dumps(asdict(failure)), flush=True)
            if error is not None:
                # The frames that it came through hold what was read, and one of them holds it.
                error.__traceback__ = None
            del error
            case += 1
    print(json.dumps({"cases": case - first, "refused": refused}), flush=True)


def _in_child(reader: Reader, root: Path, *cases: Any) -> int:
    """Do cases in a fork of this process; returns its status, as of `waitpid`."""
    root.mkdir()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # It ends with its parent.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            # What libraries print too, whatever the parent has in the places of these.
            sys.stdout, sys.stderr = (open(root / name, "a") for name in ("lines", "stderr"))  # noqa: PTH123, SIM115
            for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                os.dup2(stream.fileno(), number)
            _run(reader, root, *cases)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


def run_reader(
    reader: Reader, root: Path, *, seed: int, first: int = 0, cases: int = sys.maxsize, seconds: float = 86400
) -> Outcome:
    """Do cases `first` and on of a reader; a process that hangs or dies is a failure, and another one goes on.

    Raises:
        RuntimeError: the reader does not read what is whole.
    """
    failures: list[Failure] = []
    began, case, stop, refused, attempt = time.monotonic(), first, first + cases, 0, 0
    while (left := seconds - (time.monotonic() - began)) > 0 and case < stop:
        own = root / f"{reader.name}-{attempt}"
        attempt += 1
        status = _in_child(reader, own, seed, case, stop, left)
        said = (own / "stderr").read_text(errors="replace")[-4000:]
        lines = [json.loads(line) for line in (own / "lines").read_text().splitlines() if line.startswith("{")]
        failures += [Failure(**line) for line in lines if "where" in line]
        now = (own / "now").read_text() if (own / "now").exists() else ""
        shutil.rmtree(own)
        if ends := [line for line in lines if "cases" in line]:
            case, refused = case + ends[0]["cases"], refused + ends[0]["refused"]
            continue
        if not now:
            raise RuntimeError(f"reader {reader.name} does not read what is whole:\n{said}")
        ended = os.waitstatus_to_exitcode(status)
        _, most, doing = TIMERS.get(-ended, (0, 0, ""))
        what = f"{doing} for {most} s" if doing else f"the process ended with {ended}"
        case, refused = int(now[:12]), refused + int(now[12:])
        found = re.search(r'/milan_pipe/(?:.*/)?(\S+\.py)", line (\d+)', said)
        where = f"{found[1]}:{found[2]}" if found else "nowhere"
        failures.append(Failure(reader=reader.name, seed=seed, case=case, what=what, where=where, trace=said))
        case += 1
    return Outcome(cases=case - first, refused=refused, seconds=time.monotonic() - began, failures=failures)
