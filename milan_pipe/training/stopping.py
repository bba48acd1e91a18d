"""SIGTERM, Ctrl-C and a closed terminal during training: noted when they come, obeyed between two steps."""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from types import FrameType

_SIGNALS = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP)


@dataclass
class StopRequest:
    """Which signal asked to stop; None as long as none did."""

    signal: Signals | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM, SIGINT and SIGHUP instead of dying of them.

    The same signal again does what it did before, except SIGHUP, which a closed terminal sends more than once. An
    ignored signal, as under nohup, stays ignored. Outside the main thread, which alone has handlers, none is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # None is a handler that was not set from Python, and that could not be put back.
    before = {n: handler for n in _SIGNALS if (handler := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def note(number: int, _: FrameType | None) -> None:
        request.signal = Signals(number)
        if request.signal is Signals.SIGHUP:
            _drop_closed_terminal()
        else:
            signal.signal(number, before[request.signal])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def errors_before_sigterm() -> Iterator[None]:
    """Have SIGTERM wait while an error is handled: torchrun sends it to every rank as soon as one of them has died.

    After an error the handler stays, for what the caller says of it. One that comes while an error within is handled
    counts at the end. Outside the main thread nothing is changed.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return

    waits = False

    def end(number: int, _: FrameType | None) -> None:
        nonlocal waits
        if sys.exc_info()[0] is None:
            signal.signal(number, before)
            signal.raise_signal(number)
        else:
            waits = True

    signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)
    if waits:
        signal.raise_signal(signal.SIGTERM)


def _drop_closed_terminal() -> None:
    """Send output for a closed terminal nowhere: writing it would raise an error in place of a checkpoint."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            termios.tcgetattr(stream.fileno())
        # Not a terminal: ENOTTY. A stream of Python's own: no file number, a ValueError.
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
        except (OSError, ValueError):
            continue
