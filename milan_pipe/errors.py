"""Errors that a user can act on.

Every error says what was found, what was expected and what to do. Each class also is the builtin that fits, so that
`except ValueError` and its kin work as callers expect. The command line prints the message and exits with code 2.
"""

from __future__ import annotations

import errno
import re

_RAN_OUT = {
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many open files on this machine; raise fs.file-max, or run fewer processes",
    errno.ENOMEM: "out of memory; use fewer workers or smaller batches",
    errno.EIO: "input/output error; look at the disk, or at the network mount",
    errno.ESTALE: "stale file handle: the file server restarted, or the file was replaced; mount it again",
}


def resource_hint(error: BaseException) -> str | None:
    """What ran out and what to do, where an error says that of the machine and not of the data; else None.

    Libraries in Rust give the number of a system error in their text alone.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\bos error (\d+)\b", str(error))) is not None:
        number = int(found[1])
    if number is None and isinstance(error, MemoryError):
        number = errno.ENOMEM
    return _RAN_OUT.get(number) if number is not None else None


def system_reason(error: BaseException) -> str:
    """Why the system or a library refused, for the end of a message; see `resource_hint`."""
    return resource_hint(error) or getattr(error, "strerror", None) or str(error)


def without_password(text: str) -> str:
    """Text in which no URL has its user and password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "***@", text)


def printable(text: str) -> str:
    """Text as it may be shown: without passwords, and control characters escaped, which a terminal would obey."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return without_password("".join(shown))


class MilanError(Exception):
    """Root of all errors that milan_pipe raises on purpose. What it says is `printable`, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingError(MilanError, ValueError):
    """A parameter is unknown, of the wrong type or out of its range."""


class ShapeError(MilanError, ValueError):
    """A tensor or array has a shape that does not fit its partner."""


class DataError(MilanError, ValueError):
    """Input data is there and cannot be used: no images, unreadable, damaged."""


class LabelError(DataError):
    """What is to be learnt of a sample is wrong; it is never passed over, as an unreadable image may be."""


class MissingError(MilanError, LookupError, FileNotFoundError):
    """A file, folder, shard, model or array that was named is not there."""


class StoreError(MilanError, OSError):
    """A target store or checkpoint cannot be read or written."""


class MismatchError(MilanError, ValueError):
    """Two things that must agree do not: store and configuration, checkpoint and model."""


class StoppedError(MilanError):
    """Work was stopped by a signal after its state was saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class RankLostError(MilanError, RuntimeError):
    """One of several ranks has died; the others cannot go on."""


class ReportedElsewhereError(MilanError):
    """Another rank says, or has said, what `cause` is; this one ends in silence."""

    def __init__(self, cause: MilanError) -> None:
        super().__init__(str(cause))
        self.cause = cause
