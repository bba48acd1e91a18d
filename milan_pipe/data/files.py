"""Local files by their paths: which there are below a folder, and the bytes of one."""

from __future__ import annotations

import os
from pathlib import Path

from milan_pipe.errors import DataError
from milan_pipe.storage import open_regular

MAX_ENCODED_BYTES = 2**28
"""Size in bytes above which an encoded picture is refused unread."""


def read_regular(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: it cannot be read, or is a FIFO, a socket or a device, where reading might never end.
    """
    with open_regular(path) as file:
        return file.read()


def read_file(path: Path) -> bytes:
    """Bytes of an encoded picture.

    Raises:
        DataError: it is larger than `MAX_ENCODED_BYTES`, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_ENCODED_BYTES:
            raise DataError(f"larger than {MAX_ENCODED_BYTES} bytes")
        return read_regular(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error


def files_under(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links to folders followed, hidden names left out."""
    found: list[Path] = []
    for inside, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(inside) / name for name in names if not name.startswith(".")]
    return sorted(found)
