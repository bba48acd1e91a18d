"""The report of one run or several: one HTML page that needs nothing beside itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from milan_pipe.config.student import MaskSettings
from milan_pipe.drawing.charts import Curve, line_chart
from milan_pipe.drawing.page import render
from milan_pipe.drawing.sheet import file_url
from milan_pipe.errors import DataError, MilanError, SettingError
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.loader.dataset import Targets
from milan_pipe.reports.gallery import embedded
from milan_pipe.reports.inspect_student import pretrained_objective, student_sheets
from milan_pipe.reports.inspect_targets import target_sheets
from milan_pipe.reports.runs import PRETRAIN, RunRecord, read_runs
from milan_pipe.reports.samples import choose_samples
from milan_pipe.reports.scores import Cell, Table, transfer_table
from milan_pipe.reports.store_facts import store_facts
from milan_pipe.storage import local_folder
from milan_pipe.storage.local import write_file
from milan_pipe.targets.store import TargetStore, open_targets

_TARGET_SAMPLES, _STUDENT_SAMPLES = 2, 4
_LOSSES = {
    "clip": "2 - 2 cos, mean of all tokens",
    "pixels": "squared error of normalised pixels",
    "hog": "squared error of HOG",
}
_CURVES = {
    "train/lr": ("Learning rate", "learning rate"),
    "train/grad_norm": ("Norm of the gradient", "norm"),
    "train/images_per_second": ("Throughput since the start", "images a second"),
    "train/data_wait": ("Share of the time spent waiting for data", "share"),
}
_TRANSFER_CURVES = {
    "finetune": ("val/top1", "Fine-tuning", "top-1"),
    "linear-probe": ("val/top1", "Linear probe", "top-1"),
    "segment": ("val/miou", "Segmentation", "mIoU"),
}


@dataclass(frozen=True, kw_only=True)
class ReportReport:
    """What was written; `left_out` says what is not in it, and why."""

    page: str
    bytes: int
    runs: tuple[str, ...]
    left_out: tuple[str, ...]


def _cells(*values: object) -> list[Cell]:
    return [Cell(text=str(value)) for value in values]


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "-"


def _overview(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        settings, student = run.record.get("settings", {}), run.record["student"]
        size = f"{student['model']}, {student['image_size']} pixels, patch {student['patch_size']}"
        own = [str(student[name]) for name in ("width", "depth", "heads") if student.get(name) is not None]
        report = run.report
        wait = report.get("data_wait")
        rows.append(
            _cells(
                run.name,
                settings.get("target", "clip"),
                settings.get("decoder", {}).get("kind", "-"),
                settings.get("masking", {}).get("kind", "-"),
                size + (f" ({' / '.join(own)})" if own else ""),
                _number(run.record.get("epochs"), "{}"),
                f"{run.record['step']}" + ("" if run.finished else ", not finished"),
                _number(report.get("loss"), "{:.4f}"),
                _number(report.get("images_per_second"), "{:.1f}"),
                _number(100 * wait if isinstance(wait, int | float) else None, "{:.1f} %"),
                _number(report.get("seconds"), "{:.0f} s"),
            )
        )
    columns = "run, target, decoder, masks, student (width / blocks / heads), epochs, steps, loss, images/s, waiting"
    return Table(columns=[*columns.split(", "), "time"], rows=rows)


def _curves(runs: Sequence[RunRecord], name: str) -> dict[str, Curve]:
    """One curve of each run, in the run's colour."""
    return {run.name: replace(run.curves[name], colour=number) for number, run in enumerate(runs) if name in run.curves}


def _chart(title: str, label: str, curves: Mapping[str, Curve]) -> dict[str, str]:
    return {"url": line_chart(title, "step", label, curves), "caption": f"{title}: {', '.join(curves)}"}


def _charts(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    # One chart of losses for each target: those of different targets are no comparison.
    kinds: dict[str, dict[str, Curve]] = {}
    targets = {run.name: str(run.record.get("settings", {}).get("target", "clip")) for run in runs}
    for name, curve in _curves(runs, "train/loss").items():
        kinds.setdefault(targets[name], {})[name] = curve
    charts = [_chart(f"Training loss, target {kind}", _LOSSES.get(kind, "loss"), kinds[kind]) for kind in kinds]
    for name, (title, label) in _CURVES.items():
        if curves := _curves(runs, name):
            charts.append(_chart(title, label, curves))
    return charts


def _transfer_charts(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    charts = []
    for task, (name, title, label) in _TRANSFER_CURVES.items():
        curves = _curves([run for run in runs if run.task == task], name)
        if any(len(curve.x) > 1 for curve in curves.values()):
            charts.append(_chart(f"{title}, on what it is judged by", label, curves))
    return charts


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = str(value)
    return flat


def _settings(run: RunRecord) -> dict[str, Any]:
    return {"student": run.record["student"], **run.record.get("settings", {})}


def _differences(runs: Sequence[RunRecord]) -> Table | None:
    """Settings in which the runs differ, a column for each."""
    flat = [_flat(_settings(run)) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [
        _cells(name, *(one.get(name, "-") for one in flat))
        for name in names
        if len({one.get(name) for one in flat}) > 1
    ]
    columns = ["setting", *(run.name for run in runs)]
    return Table(columns=columns, rows=rows, text=True) if len(runs) > 1 and rows else None


def _segment_images(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    shown = []
    for run in runs:
        files = sorted((run.folder / "images").glob("*.png")) if run.task == "segment" else []
        if files:
            shown.append({"url": file_url(files[-1].read_bytes()), "caption": f"{run.name}: image, truth, prediction"})
    return shown


class _Stores:
    """The stores of the runs, each opened once; one that cannot be opened is reported and left out."""

    def __init__(self, given: str | Path | None, left_out: list[str]) -> None:
        self._given = given
        self._left_out = left_out
        self._open: dict[str, TargetStore | None] = {}

    def of(self, run: RunRecord) -> TargetStore | None:
        where = self._given if self._given is not None else run.record.get("targets")
        if where is None:
            self._left_out.append(
                f"images of {run.name}: it does not say where its targets are; name them with --targets"
            )
            return None
        where = str(where)
        if where not in self._open:
            try:
                self._open[where] = open_targets(where)
            except MilanError as error:
                if self._given is not None:
                    raise
                self._open[where] = None
                self._left_out.append(f"store and images of {run.name}: {error}; name its location with --targets")
        return self._open[where]


def _predictions(run: RunRecord, store: TargetStore, left_out: list[str]) -> dict[str, Any] | None:
    try:
        objective = pretrained_objective(run.checkpoint, store.header, torch.device("cpu"))
    except MilanError as error:
        left_out.append(f"predictions of {run.name}: {error}")
        return None
    targets = Targets(store)
    samples = choose_samples(targets, (), _STUDENT_SAMPLES)
    sheets, cosines = student_sheets(targets, samples, objective, epoch=0, view=0)
    mean = sum(hidden for _, hidden in cosines) / len(cosines)
    return {
        "run": run.name,
        "what": f"target {objective.target}, {objective.masking.kind} masks of epoch 1; cosine of hidden patches "
        f"{mean:.3f} on these {len(samples)}",
        "sheets": [embedded(sheet) for sheet in sheets],
    }


def _store_section(store: TargetStore, masking: MaskSettings) -> dict[str, Any]:
    facts, bad = store_facts(store)
    targets = Targets(store)
    sheets = target_sheets(targets, choose_samples(targets, (), _TARGET_SAMPLES), masking, 0)
    return {"facts": facts, "bad": bad, "sheets": [embedded(sheet) for sheet in sheets]}


def _times(extraction: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if extraction is None:
        return None
    try:
        phases = {str(name): float(value) for name, value in extraction["phases"].items()}
        total = sum(phases.values())
        return {
            "facts": {
                "views": f"{extraction['views']:,} in {extraction['seconds']:.1f} s",
                "speed": f"{extraction['views_per_second']:.1f} views a second",
            },
            "table": Table(
                columns=["work", "seconds", "share"],
                rows=[_cells(name, f"{value:.1f}", f"{100 * value / total:.1f} %") for name, value in phases.items()],
            ),
        }
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(
            "--extraction: this is no result of `milan-pipe extract-targets --json` that did some work "
            f"({type(error).__name__}: {error})"
        ) from error


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    targets: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
    extraction: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> ReportReport:
    """Write one page about runs: settings, store, speed, curves, scores, images, and the commands behind them.

    Args:
        runs: folders of runs of `pretrain`, `finetune`, `segment` and `linear-probe`, finished or not.
        out: the HTML file.
        targets: the runs' target store; none takes the one that each run names.
        evaluations: folders with results of probes, besides those that lie in the runs.
        extraction: what `extract-targets --json` printed.
        on_progress: called with runs done, runs.

    Raises:
        SettingError: no run is named, or OUT is a URL.
        MissingError: a run or `targets` is not there.
        DataError: a run or store is damaged.
        StoreError: OUT cannot be written.
    """
    file = local_folder(out, "reports")
    if not runs:
        raise SettingError("a report needs a run; name the folders that `milan-pipe pretrain` and others wrote")
    folders = [Path(run) for run in runs]
    found = read_runs(folders)
    kept = [evaluation for folder in evaluations for evaluation in read_evaluations(_folder_of(folder))]
    pretrained = [run for run in found if run.task == PRETRAIN]
    left_out: list[str] = []
    stores = _Stores(targets, left_out)
    sections: dict[str, dict[str, Any]] = {}
    predictions = []
    for number, run in enumerate(pretrained):
        store = stores.of(run)
        if store is not None:
            if str(store.location) not in sections:
                masking = MaskSettings.parse(run.record.get("settings", {}).get("masking", {}), str(run.folder))
                sections[str(store.location)] = _store_section(store, masking)
            drawn = _predictions(run, store, left_out)
            predictions += [drawn] if drawn is not None else []
        on_progress(number + 1, len(pretrained))
    others = [run for run in found if run.task != PRETRAIN]
    text = render(
        "report.html.j2",
        title=f"Report: {', '.join(run.name for run in pretrained or found)}",
        overview=_overview(pretrained) if pretrained else None,
        transfer=transfer_table(found, kept),
        charts=_charts(pretrained),
        transfer_charts=_transfer_charts(others),
        stores=sections,
        extraction=_times(extraction),
        predictions=predictions,
        segmentations=_segment_images(others),
        differences=_differences(pretrained),
        commands=[(run.name, run.task, str(run.record.get("command", "not recorded"))) for run in found],
        settings=[(f"{run.name}: {run.task}", yaml.safe_dump(_settings(run), sort_keys=False)) for run in found],
        left_out=left_out,
    )
    data = text.encode()
    write_file(file, data)
    for line in left_out:
        warnings.warn(f"the report is without {line}", RuntimeWarning, stacklevel=2)
    return ReportReport(
        page=str(file), bytes=len(data), runs=tuple(str(run.folder) for run in found), left_out=tuple(left_out)
    )


def _folder_of(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise SettingError(f"--evaluations {path}: no such folder; name one that `milan-pipe knn --keep` wrote")
    return path
