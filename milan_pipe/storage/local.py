"""Folders on a local disk, and files that are written whole or not at all.

By hand, not by obstore's LocalStore: that flushes nothing, hangs on a named pipe and in a forked process, and leaves
`name#1` behind when it is killed.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from milan_pipe.errors import MissingError, StoreError, system_reason
from milan_pipe.storage.location import SCRATCH, Listing, Location, is_foreign

_WRITE_ATTEMPTS = 3
_PART_BYTES = 512 * 1024
MOST_READ_WHOLE = 2**31
"""Size in bytes above which no file is read at once: records, lists, metadata and single images are smaller."""


class LocalFolder(Location):
    """A folder on a local disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.local: Path = path

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[Path]]:
        # Another process may be in another folder.
        return LocalFolder, (self.local.absolute(),)

    def child(self, path: str) -> Location:
        return LocalFolder(self.local / path)

    @contextmanager
    def _errors(self, path: str, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and doing not in ("made", "written"):
                raise MissingError(f"{self.local / path} is not there") from None
            raise StoreError(f"{self.local / path} cannot be {doing}: {system_reason(error)}") from error

    def read(self, path: str) -> bytes:
        with self._errors(path, "read"):
            return read_regular(self.local / path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._errors(path, "read"), open_regular(self.local / path) as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def read_into(
        self, path: str, start: int, memory: memoryview, on_part: Callable[[int], None] = lambda _: None
    ) -> int:
        count = 0
        with self._errors(path, "read"), open_regular(self.local / path) as file:
            file.seek(start)
            while read := file.readinto(memory[count : count + _PART_BYTES]):
                count += read
                on_part(count)
        return count

    def open(self, path: str) -> IO[bytes]:
        with self._errors(path, "read"):
            return io.BufferedReader(open_regular(self.local / path))

    def size(self, path: str) -> int:
        with self._errors(path, "read"):
            return (self.local / path).stat().st_size

    def present(self, names: Iterable[str]) -> dict[str, int]:
        with self._errors("", "read"):
            return _sizes_of((name, self.local / name) for name in names)

    def listing(self) -> Listing:
        try:
            with self._errors("", "listed"), os.scandir(self.local) as entries:
                content = sorted((e for e in entries if not is_foreign(e.name)), key=lambda e: e.name)
                return Listing(
                    files=_sizes_of((entry.name, Path(entry)) for entry in content),
                    folders=tuple(entry.name for entry in content if entry.is_dir()),
                )
        except MissingError:
            return Listing(files={}, folders=())

    def sizes(self, expected: Iterable[str] = ()) -> dict[str, int]:  # noqa: ARG002
        files = []
        with self._errors("", "listed"):
            for parent, folders, names in os.walk(self.local, onerror=_unless_missing):
                folders[:] = [name for name in folders if not is_foreign(name)]
                files += [Path(parent, name) for name in names if not is_foreign(name)]
            return _sizes_of(sorted((path.relative_to(self.local).as_posix(), path) for path in files))

    def write(self, path: str, data: bytes, *, replace: bool = True) -> bool:
        final = self.local / path
        for attempt in range(_WRITE_ATTEMPTS):
            try:
                _make_folders(final.parent)
                with whole_file(final, replace=replace) as partial:
                    partial.write_bytes(data)
                break
            except OSError as error:
                if isinstance(error, FileExistsError) and not replace and final.exists():
                    return False
                # Another process that has finished the store may just have cleared all scratch.
                if isinstance(error, FileNotFoundError) and attempt + 1 < _WRITE_ATTEMPTS:
                    continue
                raise StoreError(f"{final} cannot be written: {system_reason(error)}") from error
        return True

    def remove(self, path: str) -> None:
        with self._errors(path, "removed"), suppress(FileNotFoundError):
            _remove(self.local / path)

    def scratch(self, name: str) -> Path:
        path = beside(self.local / name)
        with self._errors(name, "made"):
            _make_folders(path.parent)
            path.mkdir()
        return path

    def publish(self, scratch: Path, path: str) -> None:
        final = self.local / path
        with self._errors(path, "written"):
            _make_folders(final.parent)
            flush_all(scratch)
            previous = beside(final)
            try:
                while not _renamed(scratch, final):
                    # Renamed first: removed in place, the old folder would be seen in parts. Another process may
                    # publish meanwhile.
                    _remove_if_possible(previous)
                    with suppress(FileNotFoundError):
                        final.rename(previous)
            except OSError:
                # Nothing follows the old folder, which may be committed: it stays.
                with suppress(OSError):
                    previous.rename(final)
                raise
            finally:
                _remove_if_possible(previous)
            flush(final.parent)

    def clear_scratch(self, name: str = "") -> None:
        clear_scratch(self.local, re.escape(name) or ".+")


def _make_folders(path: Path) -> None:
    """Make a folder and those above it; what is new is on the disk before anything is in it."""
    missing = [path, *(folder for folder in path.parents if not folder.exists())] if not path.is_dir() else []
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def clear_scratch(folder: Path, pattern: str) -> None:
    """Remove scratch of names that match a pattern; what cannot be removed stays."""
    # Of `a` exactly, and not of `a-b`.
    scratch = re.compile(rf"{re.escape(SCRATCH)}{pattern}-[0-9a-f]{{32}}", re.DOTALL)
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if scratch.fullmatch(entry.name):
                _remove_if_possible(entry)


def beside(path: Path) -> Path:
    """A new scratch name in the same folder."""
    return path.with_name(f"{SCRATCH}{path.name}-{uuid.uuid4().hex}")


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A new file to write in place of `path`: flushed and renamed at the end, removed on an error. Mode by umask.

    Raises OSError where it cannot be written: FileExistsError where `path` exists and must not be replaced.
    """
    partial = beside(path)
    try:
        partial.touch()
        # Read from a file: reading the umask changes it for other threads.
        mode = partial.stat().st_mode
        yield partial
        file_mode(partial, mode)
        flush(partial)
        if replace:
            partial.replace(path)
        else:
            _create(partial, path)
        flush(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


def make_folder(path: Path, advice: str = "choose another folder") -> None:
    """Make a folder, if it does not exist. Raises StoreError, with `advice`."""
    try:
        _make_folders(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {system_reason(error)}; {advice}") from error


def write_file(path: Path, data: bytes | str, advice: str = "make room, or choose another folder") -> None:
    """Write bytes, or text as UTF-8, whole or not at all; makes the folder. Raises StoreError, with `advice`."""
    try:
        _make_folders(path.parent)
        with whole_file(path) as partial:
            partial.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {system_reason(error)}; {advice}") from error


def file_mode(path: Path, mode: int) -> None:
    """Give a file that a library made for its owner alone the mode of another."""
    # Not every file system has modes to change.
    if path.stat().st_mode != mode:
        path.chmod(mode & 0o777)


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk: after a power cut a rename may be there without the data."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # In some folders one may write and not read.
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems flush no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """`flush` a folder and all that is in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in (*names, ""):
            flush(Path(parent, name))


def open_regular(path: Path) -> io.FileIO:
    """A file without a buffer; OSError if it is no regular file: reading a pipe may wait for ever."""
    # Before it is opened: a device may begin to work.
    if not stat.S_ISREG(path.stat().st_mode):
        raise _not_regular(path)
    return io.FileIO(path, opener=_open)


def _open(path: str | Path, flags: int) -> int:
    # What became a pipe meanwhile, and files of /proc that would wait for content, though they are regular.
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_regular(path)
    return handle


def _not_regular(path: str | Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular(path: Path) -> bytes:
    """All bytes of a file; OSError as `open_regular`, and where it is larger than `MOST_READ_WHOLE`."""
    with open_regular(path) as file:
        return read_whole(file)


def read_whole(file: io.FileIO) -> bytes:
    """All bytes of an open file; OSError where it is larger than `MOST_READ_WHOLE`, or has none as yet."""
    size, count, parts = os.fstat(file.fileno()).st_size, 0, list[bytes]()
    # Files of /proc say that they are empty, and some never end.
    while max(size, count) <= MOST_READ_WHOLE:
        part: bytes | None = file.read(max(size + 1 - count, _PART_BYTES))
        if part is None and not parts:
            raise OSError(errno.EINVAL, "it has no content as yet, as no plain file has", str(file.name))
        if not part:
            return b"".join(parts)
        parts.append(part)
        count += len(part)
    raise OSError(errno.EFBIG, f"larger than {MOST_READ_WHOLE} bytes", str(file.name))


def is_utf8(name: str) -> bool:
    """Whether a name of a file is UTF-8; Python has half surrogates for bytes that are none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def real_path(path: str | Path) -> Path:
    """Absolute and without links. `Path.resolve` raises RuntimeError for links that lead to each other."""
    return Path(os.path.realpath(path))


def lies_in(folder: Path, file: Path) -> bool:
    """Whether a file is below a folder where it leads to: a link may lead elsewhere."""
    return real_path(file).is_relative_to(real_path(folder))


def require_own_folders(root: Path) -> None:
    """Raise StoreError for a link below a folder to one outside: what is written there would go elsewhere."""
    folders = [root]
    while folders:
        try:
            # Types come with the names: nothing is asked of a file.
            with os.scandir(folders.pop()) as entries:
                found = [
                    (entry.is_symlink(), Path(entry))
                    for entry in entries
                    if entry.is_symlink() or entry.is_dir(follow_symlinks=False)
                ]
        except OSError:
            continue  # what cannot be listed is told, in words that fit, by what writes there
        folders += [path for is_link, path in found if not is_link]
        for path in (path for is_link, path in found if is_link and path.is_dir() and not lies_in(root, path)):
            raise StoreError(
                f"{path} is a link to {real_path(path)}, where nothing is written: put a folder in its "
                f"place, or let {root} as a whole be elsewhere"
            )


def open_own(path: str, flags: int) -> int:
    """An `opener` for what is written in place: a link would lead the writing out of the folder, a pipe would wait."""
    return _open(path, flags | os.O_NOFOLLOW)


def _create(partial: Path, final: Path) -> None:
    try:
        # Unlike a rename, a link fails where the name is taken, in one step.
        os.link(partial, final)
    except OSError as error:
        if isinstance(error, (FileExistsError, FileNotFoundError)) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A file system without links. Who is first is settled in one step too; the content follows.
        with final.open("xb") as file:
            file.write(partial.read_bytes())
        flush(final)


def _renamed(scratch: Path, final: Path) -> bool:
    """Whether the folder could take its final name; False where a folder with content has it."""
    try:
        scratch.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _remove(path: Path) -> None:
    # In one step for readers. Removed in place, a folder would also be filled again by an owner that still writes, and
    # could take its final name in parts.
    own = path.rename(beside(path.with_name("removed")))
    if own.is_dir() and not own.is_symlink():
        shutil.rmtree(own)
    else:
        own.unlink()


def _remove_if_possible(path: Path) -> None:
    with suppress(OSError):
        _remove(path)


def _sizes_of(files: Iterable[tuple[str, Path]]) -> dict[str, int]:
    """Bytes of the files among `files` by name; another process may remove one that has just been listed."""
    sizes = {}
    for name, path in files:
        with suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISREG((found := path.stat()).st_mode):
                sizes[name] = found.st_size
    return sizes


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
