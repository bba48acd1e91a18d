"""What a worker process of this machine's own cluster does before anything else; Dask loads it by name."""

from __future__ import annotations

import signal


def dask_setup(worker: object) -> None:  # noqa: ARG001
    """Leave Ctrl-C, which a terminal sends to all its processes, to the one that started them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
