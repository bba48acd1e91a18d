"""Files by their names and paths: which suffixes are read, which files a folder has, and the bytes of one."""

from __future__ import annotations

import os
from pathlib import Path

from milan_pipe.errors import DataError
from milan_pipe.storage.local import open_regular

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes, in lower case and without the dot, of the images that are read."""

OTHER_IMAGE_SUFFIXES = (
    *("apng", "avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe"),
    *("jxl", "pbm", "pgm", "pnm", "ppm", "tif", "tiff"),
)
"""Suffixes that show an image which is not read: they are reported, never passed over in silence."""

MASK_SUFFIX = "mask.png"
"""Suffix of a sample's segmentation, an image of class indices, as it is written."""

MASK_SUFFIXES = (MASK_SUFFIX, "seg.png")
"""Suffixes that are read as such."""

MAX_ENCODED_BYTES = 2**28
"""Size in bytes above which an encoded image is refused unread."""


def read_regular(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: it cannot be read, or is a FIFO, a socket or a device, where reading might never end.
    """
    with open_regular(path) as file:
        return file.read()


def read_file(path: Path) -> bytes:
    """Bytes of an encoded image.

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


def suffix_of(name: str) -> str:
    """Lower-case suffix of a name, without its dot; empty where there is none."""
    return name.rpartition(".")[2].lower() if "." in name else ""
