"""`extract-targets` as a process of its own, and what it leaves."""

from __future__ import annotations

import sys
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
