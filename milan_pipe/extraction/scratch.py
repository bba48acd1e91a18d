"""The temporary folder of a cluster of this machine, and those that runs left which were killed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# Machines may share their temporary folder, and know nothing of each other's processes.
_PREFIX = f"milan-pipe-dask-{platform.node()}-"


def remove_abandoned() -> None:
    """Remove the folders of processes of this machine that are no more."""
    for path in Path(tempfile.gettempdir()).iterdir():
        process = path.name.removeprefix(_PREFIX).partition("-")[0]
        if path.name.startswith(_PREFIX) and process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def own_folder() -> Iterator[str]:
    """A folder named by this process, removed at the end."""
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield folder
