"""The temporary folder of a cluster of this machine, and those that runs left which were killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_FOLDER = "milan-pipe-dask"


def remove_abandoned() -> None:
    """Remove the folders of processes that are no more."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}-*-*"):
        process = path.name.split("-")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def own_folder() -> Iterator[str]:
    """A folder named by this process, removed at the end."""
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}-{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield folder
