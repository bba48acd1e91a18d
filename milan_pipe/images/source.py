"""What `prepare` packs, whatever it comes from: jobs of one tar each, and the names of the classes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from milan_pipe.errors import DataError
from milan_pipe.images.files import printable_name

Bad = dict[str, str]
"""Key, file and reason of an image that was skipped."""

Members = tuple[str, dict[str, bytes]]
"""Key of a sample, and its members by suffix, the image first."""


class Part(Protocol):
    """Images of one tar. It is sent to another process."""

    def __len__(self) -> int:
        """Images in it, those that cannot be read as well."""

    def members(self, bad: list[Bad]) -> Iterator[Members]:
        """The samples in their order; what cannot be read goes into `bad`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What goes into one tar, and its split."""

    split: str
    part: Part


@dataclass(frozen=True, kw_only=True)
class Source:
    """All that is to be packed.

    Attributes:
        described: what `index.json` says of it: `kind`, and what tells it from another one of the kind.
        classes, mask_classes: see `ImageIndex`.
    """

    described: Mapping[str, Any]
    jobs: Sequence[Job]
    classes: tuple[str, ...] | None = None
    mask_classes: tuple[str, ...] | None = None


def label_and_caption(label: int, caption: str = "") -> dict[str, bytes]:
    """The members for a class index, -1 for none, and for captions, one a line."""
    members = {"cls": str(label).encode()} if label >= 0 else {}
    return members | ({"txt": caption.encode()} if caption else {})


def free_key(file: Sequence[str], used: set[str]) -> str:
    """A key for a file, by the parts of its path, that is not among `used`."""
    stem = "/".join((*file[:-1], PurePosixPath(file[-1]).stem))
    # A dot would end the key; what does not print may not pass through JSON, logs or other file systems.
    key = re.sub(r"[./\\]", lambda found: "_" if found[0] == "." else "-", stem)
    key = "".join(letter if letter.isprintable() else "_" for letter in key)
    path = "/".join(file)
    digest = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
    for free in (key, *(f"{key}-{digest[:length]}" for length in (8, 16, 24, 32))):
        if free not in used:
            return free
    raise DataError(f"no free key for {printable_name(path)}; rename the file")
