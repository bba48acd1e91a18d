"""A run's metric files, in dvclive's form: damage never stops a run, it is reported and the rest is used."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from milan_pipe.errors import StoreError, system_reason
from milan_pipe.storage import location_of
from milan_pipe.storage.local import flush, flush_all, open_own

CURVES = Path("plots", "metrics")
_LATEST = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class MetricFile:
    """One metric.

    Attributes:
        data: the whole file.
        damage: what is wrong with it; None if nothing is.
        header: first line; empty if there is none.
        rows: step, value and line of each readable row, without a last line that was cut.
    """

    data: bytes
    damage: str | None
    header: str = ""
    rows: tuple[tuple[int, float, str], ...] = ()


def metric_files(folder: Path) -> list[Path]:
    """All metrics below a folder, none if there is no folder; StoreError if it cannot be listed."""
    try:
        return sorted(path for path in folder.rglob("*.tsv") if path.is_file())
    except OSError as error:
        raise StoreError(f"{folder} cannot be listed: {system_reason(error)}") from error


def read_metric(file: Path) -> MetricFile:
    """Read a metric; damage is reported, not raised; StoreError if the file cannot be read."""
    data = location_of(file.parent).read(file.name)
    header, *lines = data.decode(errors="replace").split("\n")
    columns = header.rstrip("\r").split("\t")
    if not lines or len(columns) < 2 or "step" not in columns:
        return MetricFile(data=data, damage="has no header")
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
    return MetricFile(data=data, damage=damage, header=header, rows=tuple(rows))


def cut_metrics(folder: Path, step: int) -> None:
    """Remove points after a step: those steps will be done again. Damaged files are renamed, with a warning.

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
    if latest.is_file() and not _is_summary(location_of(folder).read(latest.name)):
        _move_damaged(latest, "is damaged")


@contextmanager
def metrics_written(folder: Path) -> Iterator[None]:
    """An OSError inside becomes a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"the metrics in {folder} cannot be written: {system_reason(error)}") from error


def require_own_metrics(folder: Path) -> None:
    """Raise StoreError for a link or a pipe among the metrics, which dvclive would follow or wait for."""
    for file in [*folder.rglob("*.tsv"), folder / _LATEST]:
        with metrics_written(folder):
            if file.is_symlink() or file.exists():
                os.close(open_own(str(file), os.O_WRONLY))


def flush_metrics(folder: Path) -> None:
    """Put the points on the disk: a checkpoint after them does not measure them again. Raises StoreError."""
    with metrics_written(folder):
        flush_all(folder / CURVES.parts[0])
        for path in filter(Path.exists, (folder / _LATEST, folder, folder.parent)):
            flush(path)


class MetricWriter:
    """Writes the files that dvclive writes, for a run without it."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        """Begin in a folder, or go on in it; without `resume` its earlier metrics are removed."""
        self._folder, self._curves, self._latest = folder, folder / CURVES, folder / _LATEST
        self._values: dict[str, Any] = {}
        if not resume:
            shutil.rmtree(self._curves, ignore_errors=True)
            self._latest.unlink(missing_ok=True)
        elif self._latest.is_file():
            self._values = json.loads(self._latest.read_bytes())

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row to the curve of each name, as `train/loss`, and write the last values of all; raises StoreError."""
        with metrics_written(self._folder):
            self._add(step, values)

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            group, _, short = name.rpartition("/")
            file = self._curves / group / f"{short}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8", opener=open_own) as curve:
                if not curve.tell():
                    curve.write(f"step\t{short}\n")
                curve.write(f"{step}\t{value}\n")
            latest = self._values.setdefault(group, {}) if group else self._values
            latest[short] = value if math.isfinite(value) else str(value)  # JSON has no such numbers
        self._values["step"] = step
        location_of(self._folder).write(_LATEST, (json.dumps(self._values, indent=4) + "\n").encode())

    def image(self, step: int, file: Path) -> None:
        """The run's folder has it already."""


def _is_summary(data: bytes) -> bool:
    """Whether a run can go on from it: the last values by group and name, and their step."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return False
    known = isinstance(values, dict) and isinstance(values.pop("step", 0), int)
    return known and all(isinstance(value, dict) for value in values.values())


def _move_damaged(file: Path, damage: str) -> None:
    names = chain([f"{file.name}.damaged"], (f"{file.name}.damaged-{number}" for number in count(2)))
    kept = next(path for path in map(file.with_name, names) if not path.exists())
    try:
        file.rename(kept)
    except OSError as error:
        raise StoreError(f"{file} {damage} and cannot be renamed: {system_reason(error)}") from error
    text = f"{file} {damage}; it is now {kept.name}, and the run goes on with what can be read of it"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
