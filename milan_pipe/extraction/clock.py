"""Where the time of an extraction goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["read", "decode", "crop", "jpeg", "teacher", "encode", "write"]


class Clock:
    """Seconds by phase, summed over threads: phases that run side by side add up to more than the time on the wall."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, phase: Phase) -> Iterator[None]:
        """Count the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began)

    def add(self, phase: Phase, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        with self._lock:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return taken
