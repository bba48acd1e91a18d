"""What this machine has to work with: versions, devices, codecs, room, and whether locations can be reached."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import get_args

import psutil
import torch
from packaging.requirements import Requirement

from milan_pipe import __version__
from milan_pipe.errors import MilanError
from milan_pipe.extras import Extra
from milan_pipe.images.ahead import thread_count
from milan_pipe.storage import Location, location_of
from milan_pipe.targets.store import open_targets, read_header
from milan_pipe.targets.zarr_store import use_fast_pipeline

CORE = "core"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that torch sees; memory in bytes; whether it computes in bfloat16, None where torch does not say."""

    name: str
    what: str
    memory: int
    bfloat16: bool | None


@dataclass(frozen=True, kw_only=True)
class LocationCheck:
    """What was found at a location; `problem` is None where it can be used."""

    location: str
    found: str
    free_bytes: int | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """All that was found; `problems` says what is wrong, a line each.

    Attributes:
        version: of milan-pipe.
        packages: versions of those that it needs, under `core`, and of each extra's; None where one is not installed.
        threads: that this process may use.
        pipeline: codec pipeline that reads and writes zarr.
        params: the params file that commands run here would read, None for built-in settings.
    """

    version: str
    python: str
    system: str
    packages: dict[str, dict[str, str | None]]
    devices: tuple[Device, ...]
    threads: int
    memory: int
    pipeline: str
    params: str | None
    locations: tuple[LocationCheck, ...]
    problems: tuple[str, ...]


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> dict[str, dict[str, str | None]]:
    try:
        needed = [Requirement(line) for line in requires("milan-pipe") or ()]
    except PackageNotFoundError:
        needed = []  # run from a folder that was never installed
    names: dict[str, list[str]] = {CORE: [one.name for one in needed if one.marker is None]}
    for extra in get_args(Extra):
        here = {"extra": extra}
        names[extra] = [one.name for one in needed if one.marker is not None and one.marker.evaluate(here)]
    return {group: {name: _version_of(name) for name in found} for group, found in names.items()}


def _devices() -> tuple[Device, ...]:
    memory = psutil.virtual_memory().total
    cpu = Device(name="cpu", what=platform.processor() or platform.machine(), memory=memory, bfloat16=None)
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return cpu, *(
        Device(name=f"cuda:{number}", what=gpu.name, memory=gpu.total_memory, bfloat16=gpu.major >= 8)
        for number, gpu in enumerate(gpus)
    )


def _contents(location: Location) -> str:
    header = read_header(location)
    if header is None:
        if location.local is None and not location.listable:
            return "no target store"
        listed = location.listing()
        count = len(listed.files) + len(listed.folders)
        return f"no target store; {count} entries" if count else "empty"
    store = open_targets(location.address)
    samples = sum(store.samples(shard) for shard in store.shards)
    done = len(store.shards) == header.source.shards
    return (
        f"target store, {header.format}: {samples} images, {header.views.count} views, teacher "
        f"{header.teacher.model!r}, grid {header.teacher.grid[0]} x {header.teacher.grid[1]}, codec "
        f"{header.codec.name!r}, {len(store.shards)} of {header.source.shards} shards"
        + ("" if done else ", not complete")
    )


def _try_writing(location: Location) -> None:
    name = f".milan-pipe-doctor-{uuid.uuid4().hex}"
    location.write(name, b"milan-pipe doctor")
    try:
        location.read(name)
    finally:
        location.remove(name)


def _check(where: str, write: bool) -> LocationCheck:
    free, found, problem = None, "-", None
    try:
        location = location_of(where)
        folder = (location.local or Path()).absolute()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if location.local is not None:
            free = shutil.disk_usage(nearest).free
        if location.local is not None and not location.local.exists():
            found = "not there yet"
            if not nearest.is_dir():
                problem = f"{nearest} is no folder"
            elif not os.access(nearest, os.W_OK):
                problem = f"{nearest} cannot be written"
        else:
            found = _contents(location)
            if write:
                _try_writing(location)
                found += "; written to and cleaned"
    except (MilanError, OSError) as error:
        problem = " ".join(str(error).split())
    return LocationCheck(location=where, found=found, free_bytes=free, problem=problem)


def doctor(locations: Sequence[str | Path] = (), *, write: bool = False) -> DoctorReport:
    """Look at this machine, and at storage locations of images or targets.

    Args:
        locations: folders or URLs; their content is reported, and whether it can be read.
        write: also write a small file to each and remove it.
    """
    packages = _packages()
    fast = use_fast_pipeline() if _version_of("zarrs") is not None else False
    checks = tuple(_check(str(where), write) for where in locations)
    params = Path("params.yaml")
    problems = [f"package {name} is not installed" for name, found in packages[CORE].items() if found is None]
    problems += [f"{check.location}: {check.problem}" for check in checks if check.problem is not None]
    return DoctorReport(
        version=__version__,
        python=f"{sys.version.split()[0]} at {sys.executable}",
        system=platform.platform(),
        packages=packages,
        devices=_devices(),
        threads=thread_count(0),
        memory=psutil.virtual_memory().total,
        pipeline="zarrs" if fast else "zarr-python's own, which is slower",
        params=str(params.absolute()) if params.is_file() else None,
        locations=checks,
        problems=tuple(problems),
    )
