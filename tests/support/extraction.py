"""`extract-targets` as a process of its own, and what it leaves."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path

SETTINGS = [
    *("views.count=2", "views.seed=5", "extract.batch_size=4", "extract.threads=1", "extract.teacher_threads=1"),
    "extract.device=cpu",
]
"""One thread, so that processes that share a machine and one alone give the same bytes."""


def command(images: object, targets: object, *more: str) -> list[str]:
    """The words that start it with `SETTINGS`."""
    words = [part for text in SETTINGS for part in ("--set", text)]
    return [sys.executable, "-m", "milan_pipe", "extract-targets", str(images), str(targets), *words, *more]


def every_file(root: Path) -> dict[str, bytes]:
    """Path and bytes of all that lies below a folder, unfinished work too."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shards_with_bad(images: Path, folder: Path, bad_in: Mapping[int, Collection[int]]) -> list[str]:
    """Copies of the shards; in each, the images at the given rows are cut in half. Returns their keys."""
    folder.mkdir()
    keys = []
    for number, path in enumerate(sorted(images.glob("*.tar"))):
        with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as target:
            row = -1
            for member in source:
                file = source.extractfile(member)
                image = member.name.endswith(".png") and not member.name.endswith(".mask.png")
                row += image
                if image and row in bad_in.get(number, ()):
                    keys.append(member.name.removesuffix(".png"))
                    member.size //= 2
                target.addfile(member, file)
    return keys
