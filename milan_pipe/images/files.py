"""Files: which suffixes are read, what a folder holds, and the bytes of one."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path

from milan_pipe.errors import DataError
from milan_pipe.storage.local import read_regular

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of the images that are read; all suffixes are in lower case and without the dot."""

OTHER_IMAGE_SUFFIXES = (
    *("apng", "avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe"),
    *("jxl", "pbm", "pgm", "pnm", "ppm", "tif", "tiff"),
)
"""Suffixes of images that are not read; each is reported."""

MASK_SUFFIX = "mask.png"
"""Suffix with which a sample's segmentation is written: an image of class indices."""

MASK_SUFFIXES = (MASK_SUFFIX, "seg.png")
"""Suffixes with which it is read."""

MAX_ENCODED_BYTES = 2**28
"""Size in bytes above which an encoded image is refused unread."""

MAX_TEXT_BYTES = 2**24
"""The same of text beside it: metadata can be large, as the outlines of its objects."""

_MOST_LINKS = 2**16


def read_file(path: Path) -> bytes:
    """Bytes of an encoded image; raises DataError where it is larger than `MAX_ENCODED_BYTES` or cannot be read."""
    try:
        if path.stat().st_size <= MAX_ENCODED_BYTES:
            return read_regular(path)
    # A list may name a path with a zero byte, which is a ValueError.
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise DataError(f"larger than {MAX_ENCODED_BYTES} bytes")


def files_under(folder: Path, suffixes: Container[str] | None = None) -> list[Path]:
    """All files below a folder, or those with one of the suffixes, sorted; without hidden names, through links.

    Raises DataError where a folder cannot be listed, or links to folders multiply.
    """
    found: list[Path] = []
    linked = 0
    for inside, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(inside, name))]
        linked += sum(Path(inside, name).is_symlink() for name in folders)
        if linked > _MOST_LINKS:
            # Two in each of 30 folders that lead to the next are a thousand million ways.
            raise DataError(f"{folder} has more than {_MOST_LINKS} folders that are links; do they lead to each other?")
        found += [Path(inside, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if suffixes is None or path.suffix[1:].lower() in suffixes)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _leads_back(folder: Path) -> bool:
    # Following a link to a folder that it lies in would never end.
    return folder.is_symlink() and any(folder.samefile(parent) for parent in folder.absolute().parents)


def suffix_of(name: str) -> str:
    """Lower-case suffix of a name, without its dot; empty where there is none."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def printable_name(name: str) -> str:
    """A file's name for JSON, where it is not UTF-8 with escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
