"""What a run's folder says of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milan_pipe.config.subjects import METHODS, RANDOM, UNTRAINED
from milan_pipe.drawing.charts import Curve
from milan_pipe.errors import DataError, MissingError, StoreError, resource_hint
from milan_pipe.evaluation.backbone import Backbone, student_of
from milan_pipe.evaluation.results import FOLDER, Evaluation, read_evaluations
from milan_pipe.storage.local import read_regular, real_path
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint
from milan_pipe.training.metrics import CURVES, metric_files, read_metric

PRETRAIN = "pretrain"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as it lies in its folder, finished or not.

    Attributes:
        name: of its student, made unique among the runs of one task.
        task: `pretrain`, `finetune`, `segment` or `linear-probe`.
        checkpoint: its last one.
        identity: digest of the pretrained student: its own, or of a transfer run the one that it began with.
        report: `report.json`; empty where the run is not finished.
        curves: by name, as `train/loss`.
    """

    name: str
    folder: Path
    task: str
    checkpoint: Checkpoint
    identity: str
    report: Mapping[str, Any]
    curves: Mapping[str, Curve]
    evaluations: tuple[Evaluation, ...]

    @property
    def record(self) -> Mapping[str, Any]:
        """What the last checkpoint says beside its weights."""
        return self.checkpoint.record

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return bool(self.record.get("finished"))


def _curves(folder: Path) -> dict[str, Curve]:
    found = {}
    root = folder / "metrics" / CURVES
    for file in metric_files(root):
        metric = read_metric(file)
        if metric.damage is not None:
            raise DataError(f"{file} cannot be read (it {metric.damage}); remove it to have the report without")
        curve = Curve([step for step, _, _ in metric.rows], [value for _, value, _ in metric.rows])
        found[file.relative_to(root).with_suffix("").as_posix()] = curve
    return found


def _report_of(folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    try:
        # Shown as numbers with a point, which have a largest one.
        values = json.loads(read_regular(file), parse_int=float)
        if not isinstance(values, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {resource_hint(error) or error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}); remove it to have the report without"
        ) from error
    return values


def _identity(checkpoint: Checkpoint, task: str) -> str:
    if task == PRETRAIN:
        settings, encoder = student_of(checkpoint)
        return Backbone(name=str(checkpoint.path), settings=settings, weights=encoder.state_dict()).digest()
    try:
        return str(checkpoint.record["configuration"]["student"]["weights"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{checkpoint.path} does not say which student it began with") from error


def _read_run(path: Path) -> RunRecord:
    if not path.is_dir():
        raise MissingError(f"{path} is not there; expected the folder of a run")
    checkpoint = open_checkpoint(path)
    if checkpoint.path.parent.parent != path:
        raise DataError(f"{path} is a checkpoint; name the folder of its run")
    task = str(checkpoint.record.get("task") or PRETRAIN)
    return RunRecord(
        name=real_path(path).name,
        folder=path,
        task=task,
        checkpoint=checkpoint,
        identity=_identity(checkpoint, task),
        # One that is left of a finished run whose last checkpoint was removed is of weights that are gone.
        report=_report_of(path) if checkpoint.record.get("finished") else {},
        curves=_curves(path),
        evaluations=tuple(read_evaluations(path / FOLDER)),
    )


def _unique_names(folders: list[Path]) -> list[str]:
    """The last part of each path, with as many before it as tell them apart."""
    resolved = [real_path(folder).parts for folder in folders]
    for depth in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-depth:]) for parts in resolved]
        if len(set(names)) == len(set(resolved)):
            break
    return names


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Runs of one report by unique names; a run that is named twice is read once.

    A run goes by its student: by what it learned from, or by its folder where no method has this combination.

    Raises:
        MissingError: one is not there, or has no checkpoint yet.
        DataError: something in it is damaged.
        StoreError: something in it cannot be read.
    """
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(real_path(folder), folder)
    runs = [_read_run(folder) for folder in once.values()]
    students = {run.identity: _student(run) for run in runs if run.task == PRETRAIN}
    named: dict[Path, str] = {}
    for task in {run.task for run in runs}:
        of_task = [run for run in runs if run.task == task]
        titles = [_title(run, students) for run in of_task]
        for run, title, own in zip(of_task, titles, _unique_names([run.folder for run in of_task]), strict=True):
            several = titles.count(title) > 1
            named[run.folder] = own if title is None else f"{title} ({own})" if several else title
    return [replace(run, name=named[run.folder]) for run in runs]


def _student(run: RunRecord) -> str | None:
    settings = run.record.get("settings", {})
    decoder, masking = (str(settings.get(section, {}).get("kind")) for section in ("decoder", "masking"))
    return METHODS.get((settings.get("target", "clip"), decoder, masking))


def _title(run: RunRecord, students: Mapping[str, str | None]) -> str | None:
    if run.record.get("backbone") == RANDOM:
        return UNTRAINED
    return students.get(run.identity)
