"""Signals as a terminal's own job has them, however the tests were started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


@contextmanager
def default_signals() -> Iterator[None]:
    """Handlers that Python sets at its start, for this process and those that it starts.

    Under nohup or in a script's background some are ignored, which is inherited.
    """
    before = {number: signal.signal(number, handler) for number, handler in DEFAULT.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
