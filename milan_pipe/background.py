"""An iterator that runs on a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs an iterator on a thread, at most `ahead` finished items ahead. An error of the iterator is raised here.

    Args:
        seconds: most that is waited for an item, then TimeoutError; the thread is left to itself. None: any time.
    """

    def __init__(self, items: Iterator[T], ahead: int, name: str, seconds: float | None = None) -> None:
        self._seconds = seconds
        self._queue: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _put(self, item: tuple[T] | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item,)):
                    return
            self._put(None)
        except BaseException as error:  # any: the reader must not wait for ever
            self._put(error)

    def __iter__(self) -> Iterator[T]:
        while (item := self._next()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]

    def _next(self) -> tuple[T] | BaseException | None:
        try:
            return self._queue.get(timeout=self._seconds)
        except queue.Empty:
            self._stop.set()
            raise TimeoutError(f"no answer in {self._seconds:g} s") from None

    def close(self) -> None:
        """Stop running ahead."""
        self._stop.set()
        self._thread.join()
