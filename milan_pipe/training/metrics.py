"""A run's metric files, as dvclive writes them: read, cut back where a run goes on, renamed where damaged.

Metrics never stop a run: damage is reported, and the rest is used.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from milan_pipe.errors import StoreError, resource_hint
from milan_pipe.storage import location_of

_LATEST = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class MetricFile:
    """One metric.

    Attributes:
        header: first line; empty if there is none.
        rows: step, value and line of each readable row, without a last line that was cut.
        damage: what is wrong with the file; None if nothing is.
        data: all of it.
    """

    header: str
    rows: tuple[tuple[int, float, str], ...]
    damage: str | None
    data: bytes


def metric_files(folder: Path) -> list[Path]:
    """All metrics below a folder; none if the folder does not exist.

    Raises:
        StoreError: it cannot be listed.
    """
    try:
        return sorted(path for path in folder.rglob("*.tsv") if path.is_file())
    except OSError as error:
        raise StoreError(f"{folder} cannot be listed: {resource_hint(error) or error.strerror or error}") from error


def read_metric(file: Path) -> MetricFile:
    """Read a metric; damage is reported, not raised.

    Raises:
        StoreError: the file cannot be read.
    """
    data = _bytes_of(file)
    header, *lines = data.decode(errors="replace").split("\n")
    columns = header.rstrip("\r").split("\t")
    if not lines or len(columns) < 2 or "step" not in columns:
        return MetricFile(header="", rows=(), damage="has no header", data=data)
    damage = "ends in zero bytes" if "\0" in lines.pop() else None
    rows = []
    for number, line in enumerate(lines, 2):
        values = line.split("\t")
        try:
            if len(values) != len(columns):
                raise ValueError("not a row")
            rows.append((int(values[columns.index("step")]), float(values[-1]), line))
        except ValueError:
            damage = damage or f"is damaged in line {number}"
    return MetricFile(header=header, rows=tuple(rows), damage=damage, data=data)


def cut_metrics(folder: Path, step: int) -> None:
    """Remove points after a step: those steps will be done again.

    A damaged file is renamed, with a warning; what can be read of it stays.

    Raises:
        StoreError: a file cannot be read or written.
    """
    for file in metric_files(folder):
        found = read_metric(file)
        if found.damage is not None:
            _move_damaged(file, found.damage)
        kept = [line for at, _, line in found.rows if at <= step]
        content = "".join(f"{line}\n" for line in (found.header, *kept)).encode()
        if found.header and content != found.data:
            location_of(file.parent).write(file.name, content)
    latest = folder / _LATEST
    if latest.is_file() and not _is_summary(_bytes_of(latest)):
        _move_damaged(latest, "is damaged")


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {resource_hint(error) or error.strerror or error}") from error


def _is_summary(data: bytes) -> bool:
    """Whether dvclive can go on from it: the last values by group and name, and their step."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(values, dict)
        and isinstance(values.pop("step", 0), int)
        and all(isinstance(value, dict) for value in values.values())
    )


def _move_damaged(file: Path, damage: str) -> None:
    aside, number = file.with_name(f"{file.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = file.with_name(f"{file.name}.damaged-{number}")
    try:
        file.rename(aside)
    except OSError as error:
        raise StoreError(f"{file} {damage} and cannot be renamed: {error.strerror or error}") from error
    warnings.warn(
        f"{file} {damage}; it is now {aside.name}, and the run goes on with what can be read of it",
        RuntimeWarning,
        stacklevel=3,
    )
