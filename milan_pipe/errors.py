"""Errors that a user can act on.

Every error says what was found, what was expected and what to do. Each class also is the builtin that fits, so that
`except ValueError` and its kin work as callers expect. The command line prints the message and exits with code 2.
"""

from __future__ import annotations

import errno
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_RAN_OUT: dict[int | None, str] = {
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many open files on this machine; raise fs.file-max, or run fewer processes",
    errno.ENOMEM: "out of memory; use fewer workers or smaller batches, or raise the limit (`ulimit -v`)",
    errno.EAGAIN: "no more threads or processes; use fewer workers and threads, or raise the limit (`ulimit -u`)",
    errno.EIO: "input/output error; look at the disk, or at the network mount",
    errno.ESTALE: "stale file handle: the file server restarted, or the file was replaced; mount it again",
}

# What the loader of libraries, torch and Python say without a number.
_IN_WORDS = {
    errno.ENOMEM: re.compile("failed to map segment|can't allocate memory"),
    errno.EAGAIN: re.compile("can't start new thread"),
}

# `Path` leaves one slash of a URL.
_USER = re.compile(r"(?<=\w:)(//?)[^/@\s]*@")
# What a server takes as a signature has any name; the last letter is none of the sentence around it.
# It ends where the next one begins: otherwise many take the square of their length.
_QUERY = re.compile(r"(https?://?(?:(?!https?:/)[^\s?#])*[?#])[^\s'\"]*[^\s'\"`,.:;)\]]", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"(?<=[?&])([\w.-]*(?:signature|credential|token|secret|password|passwd|key|auth|sig))=[^&\s'\"]*", re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def system_number(error: BaseException) -> int | None:
    """The number of the system's error that an error is, by its type, its number or its words; None for others."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    # Libraries in Rust give the number of a system error in their text alone.
    if number is None and (found := re.search(r"\bos error (\d+)\b", str(error))):
        number = int(found[1])
    if number is None:
        number = next((known for known, words in _IN_WORDS.items() if words.search(str(error))), None)
    return number


def resource_hint(error: BaseException) -> str | None:
    """What ran out and what to do, if an error is about the machine and not about the data; else None."""
    return _RAN_OUT.get(system_number(error))


def system_reason(error: BaseException) -> str:
    """Why the system or a library refused, for the end of a message; see `resource_hint`."""
    return resource_hint(error) or getattr(error, "strerror", None) or str(error)


def one_line(error: object) -> str:
    """What a library's error says, without line breaks and not too long; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_problem(error: ValidationError) -> str:
    """The first value that pydantic refused: where it stands, what is expected, and what was found."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    return f"{where}: {first['msg']}, found {str(first['input'])[:80]!r}"


def without_secrets(text: str) -> str:
    """Text to show or keep: without tokens of the hub, users and passwords of URLs, and what their queries hold."""
    text = _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))
    return _HUB_TOKEN.sub("hf_***", _SECRET_VALUE.sub(r"\1=***", text))


def printable(text: str) -> str:
    """Text to show: passwords hidden, and control characters escaped, which a terminal would obey."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return without_secrets("".join(shown))


def printable_json(values: Any, **how: Any) -> str:
    """JSON, as of `json.dumps`, that can be shown: with escapes for what a terminal would obey, and plain letters."""
    text = json.dumps(values, ensure_ascii=False, **how)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


class MilanError(Exception):
    """Root of all errors that milan_pipe raises on purpose. Its message is `printable`, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))

    def __reduce__(self) -> tuple[Any, ...]:
        # Dask's own way to pickle errors fails with those that are OSError and another built-in error.
        return type(self), self.args, self.__dict__


class SettingError(MilanError, ValueError):
    """A parameter is unknown, of the wrong type or out of its range."""


class ShapeError(MilanError, ValueError):
    """A tensor or array has a shape that does not fit its partner."""


class DataError(MilanError, ValueError):
    """Input data exists and cannot be used: no images, unreadable, damaged."""


class LabelError(DataError):
    """A label is wrong; such a sample is never skipped, as an unreadable image may be."""


class MissingError(MilanError, LookupError, FileNotFoundError):
    """A named file, folder, shard, model or array does not exist."""


class StoreError(MilanError, OSError):
    """A target store or checkpoint cannot be read or written."""


class ProcessLostError(StoreError):
    """A process that reads ahead ended by itself."""


class MismatchError(MilanError, ValueError):
    """Two things that must agree do not: store and configuration, checkpoint and model."""


class DeviceFullError(MilanError, OSError):
    """The memory of a device is full."""


class StoppedError(MilanError):
    """Work was stopped by a signal after its state was saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.signal)


class RankLostError(MilanError, RuntimeError):
    """One of several ranks has died; the others cannot go on."""


class ReportedElsewhereError(MilanError):
    """Another rank reports `cause`; this one ends in silence."""

    def __init__(self, cause: MilanError) -> None:
        super().__init__(str(cause))
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause,)
