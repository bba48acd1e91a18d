"""Images decoded ahead on threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from milan_pipe.errors import DataError
from milan_pipe.images.tar import OnBad

T = TypeVar("T")


class Keyed(Protocol):
    """An image that has a key."""

    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=Keyed)


def thread_count(threads: int) -> int:
    """The number of threads of a setting; 0 is one per processor that this process may use."""
    # Where it exists, the affinity knows of containers and batch queues that grant a part of the machine.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return threads or usable or 1


def decoded_ahead(
    samples: Iterable[S], decode: Callable[[S], T], threads: int, ahead: int, on_bad: OnBad
) -> Iterator[T]:
    """`decode` of each sample, in the order of `samples` whatever the number of threads.

    Args:
        decode: runs on a thread; a `DataError` from it skips the sample.
        ahead: most samples under way or waiting, which bounds memory.
        on_bad: called with key and reason of a sample that is skipped.
    """
    pending: deque[tuple[str, Future[T]]] = deque()

    def first() -> Iterator[T]:
        key, future = pending.popleft()
        # Raised here, it would hold this frame, and that the future: a ring that keeps what was decoded.
        error = future.exception()
        if isinstance(error, DataError):
            on_bad(key, str(error))
        else:
            yield future.result()

    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
    try:
        for sample in samples:
            pending.append((sample.key, pool.submit(decode, sample)))
            if len(pending) >= ahead:
                yield from first()
        while pending:
            yield from first()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
