"""stderr for a log: what it does not take is lost."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


class Stderr:
    """stderr as it is at the time. A full disk or a reader that is gone ends no command, and changes no exit code.

    rich would end the process where the reader is gone.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        """As of a text file."""
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a text file."""
        with suppress(OSError):
            sys.stderr.flush()
