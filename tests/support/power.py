"""Power cuts: what a folder holds after one.

`flushed.c` is preloaded into the processes of a run, and copies what they flush. Once they have ended, `cut` leaves of
a folder what a disk could hold: in each folder the names of its last flush, or of now; in each file the content of its
last flush, or of now, or, where it was never flushed, nothing.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("flushed.c")
_ROOM = 128


class Power:
    """The library, and the folder where it keeps what was flushed."""

    def __init__(self, folder: Path) -> None:
        """Build the library in a new folder; skips where there is no C compiler or no Linux."""
        compiler = shutil.which("cc")
        if compiler is None or os.uname().sysname != "Linux":
            pytest.skip("a power cut is made by a preloaded library, which needs Linux and a C compiler")
        self._kept = folder / "kept"
        self._kept.mkdir(parents=True)
        self._library = folder / "flushed.so"
        words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(_SOURCE), "-ldl"]
        subprocess.run(words, check=True)
        self._code = ctypes.CDLL(str(self._library))

    @property
    def environment(self) -> dict[str, str]:
        """For processes that may lose power."""
        return {**os.environ, "LD_PRELOAD": str(self._library), "FLUSHED": str(self._kept)}

    def keep(self, root: Path) -> None:
        """All that lies in a folder is on the disk."""
        for folder, _, files in os.walk(root, topdown=False):
            for path in (Path(folder, name) for name in (*files, "")):
                with _opened(path) as handle:
                    assert self._code.keep_flushed(handle, os.fsencode(self._kept)) == 0

    def after_cut(self, root: Path, to: Path, rng: random.Random | None = None) -> Path:
        """Write what a power cut leaves of a folder, which was kept once; its processes have ended.

        Args:
            to: the folder to write.
            rng: draws what was on the disk though it was not flushed; None: nothing of that.
        """
        self._restore("d", self._id(root), to, self._files_of(root), rng)
        return to

    def cut(self, root: Path, rng: random.Random | None = None) -> None:
        """Leave of a folder what `after_cut` writes."""
        after = self.after_cut(root, root.with_name(f"{root.name}.after"), rng)
        shutil.rmtree(root)
        after.rename(root)
        self.keep(root)

    def _id(self, path: Path) -> str:
        room = ctypes.create_string_buffer(_ROOM)
        with _opened(path) as handle:
            assert self._code.flushed_id(handle, room, _ROOM) == 1
        return room.value.decode()

    def _files_of(self, root: Path) -> dict[str, Path]:
        paths = [root, *root.rglob("*")]
        return {self._id(path): path for path in paths if path.is_file() or path.is_dir()}

    def _restore(self, kind: str, ident: str, to: Path, now: dict[str, Path], rng: random.Random | None) -> None:
        flushed, here = self._kept / ident, now.get(ident)
        as_now = here is not None and rng is not None and rng.random() < 0.5
        if kind == "f":
            content = flushed.read_bytes() if flushed.exists() else b""
            to.write_bytes(here.read_bytes() if here is not None and as_now else content)
            return
        to.mkdir()
        if here is not None and as_now:
            entries = [("d" if path.is_dir() else "f", self._id(path), path.name) for path in here.iterdir()]
        else:
            lines = flushed.read_bytes().decode().split("\0")[:-1] if flushed.exists() else []
            entries = [(line[0], *line[2:].split(" ", 1)) for line in lines]  # type: ignore[misc]
        for entry_kind, entry_ident, name in sorted(entries, key=lambda entry: entry[2]):
            self._restore(entry_kind, entry_ident, to / name, now, rng)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
