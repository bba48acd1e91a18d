"""Files that reports write, and those that they may replace."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from milan_pipe.errors import StoreError, system_reason
from milan_pipe.storage.kinds import require_outside_stores
from milan_pipe.storage.local import open_regular

# At the end of a page, and at the beginning of an image.
_MARKS = (b"<footer>milan-pipe ", b"Software\0milan-pipe")
_PART = 256


def require_own(files: Iterable[Path]) -> None:
    """Raise StoreError for a file that is there and does not say that milan-pipe wrote it, or would lie in a store."""
    for file in files:
        try:
            with open_regular(file) as opened:
                # What is regular in /proc may have nothing as yet.
                part = opened.read(_PART) or b""
                opened.seek(max(0, file.stat().st_size - _PART))
                part += opened.read(_PART) or b""
        except (FileNotFoundError, NotADirectoryError):
            part = None
        except OSError as error:
            raise StoreError(f"{file} cannot be replaced: {system_reason(error)}; name another place") from error
        if part is not None and not any(mark in part for mark in _MARKS):
            raise StoreError(f"{file} is there, and does not say that milan-pipe wrote it; name another place")
        require_outside_stores(file)
