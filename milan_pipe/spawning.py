"""What processes inherit that are started, and when they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def script_unseen() -> Iterator[None]:
    """They start without the caller's script, which would run again in each."""
    main = sys.modules["__main__"].__dict__
    file = main.pop("__file__", None) if main.get("__spec__") is None else None
    try:
        yield
    finally:
        if file is not None:
            main["__file__"] = file


@contextmanager
def without_signals(*numbers: signal.Signals) -> Iterator[None]:
    """They, and threads, never see these signals: a terminal and a batch queue send them to all processes of a run."""
    # Starting the tracker later would unmask.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with(parent: int) -> None:
    """End this process within a second of its parent, which may be killed: it would wait for it for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
