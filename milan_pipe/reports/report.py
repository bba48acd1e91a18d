"""The report of one run or several: one HTML page that needs nothing beside itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from milan_pipe.config.student import MaskSettings, StudentSettings
from milan_pipe.drawing.charts import Curve, bar_chart, line_chart
from milan_pipe.drawing.page import render
from milan_pipe.drawing.sheet import file_url
from milan_pipe.errors import DataError, MilanError, SettingError
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.loader.dataset import Targets, open_targets
from milan_pipe.reports.inspect_student import number_of, pretrained_objective, student_sheets, teachers_of
from milan_pipe.reports.inspect_targets import target_sheets
from milan_pipe.reports.own import require_own
from milan_pipe.reports.runs import PRETRAIN, RunRecord, read_runs
from milan_pipe.reports.samples import choose_samples
from milan_pipe.reports.scores import Cell, Table, transfer_table
from milan_pipe.reports.store_facts import store_facts
from milan_pipe.storage import local_folder
from milan_pipe.storage.local import lies_in, read_regular, write_file

_TARGET_SAMPLES, _STUDENT_SAMPLES = 2, 4
_LOSSES = {
    "clip": "2 - 2 cos, mean of all tokens",
    "pixels": "squared error of normalised pixels",
    "hog": "squared error of HOG",
    "clip-visible": "2 - 2 cos, mean of the tokens that are seen",
    "clip-visible+pixels": "squared error of normalised features and pixels",
    "clip-masked": "smooth L1 of normalised features",
}
_CURVES = {
    "probe/knn": ("k-NN of the student while it learns", "accuracy"),
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


def _told(runs: Sequence[RunRecord], stores: Iterable[Targets]) -> str:
    """What was done, in a sentence or two."""
    taught = []
    for run in runs:
        kind, teacher = run.record.get("settings", {}).get("target", "clip"), run.record.get("teacher") or {}
        features = f"features of the teacher {teacher.get('model', '')}"
        source = {
            "clip": f"{features}, for all patches",
            "pixels": "its own pixels, for the patches that it did not see",
            "hog": "gradients of its own pixels, for the patches that it did not see",
            "clip-visible": f"{features}, for the patches that it saw",
            "clip-visible+pixels": f"{features}, for the patches that it saw, and its own pixels for the others",
            "clip-masked": f"{features}, for the patches that it did not see",
        }
        epochs = _number(run.record.get("epochs"), "{}") + " epochs" + ("" if run.finished else ", not finished")
        taught.append(f"{run.name} {source.get(kind, kind)}, in {epochs}")
    seen = " and ".join(f"{len(store):,} images in {store.views} views each" for store in stores)
    what = f"Students saw part of the patches of {seen or 'images'}, and learned to reconstruct: "
    return what + "; ".join(taught) + "."


def _overview(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        settings, report = run.record.get("settings", {}), run.report
        student = StudentSettings.parse(run.record["student"], str(run.folder)).model_dump(mode="json")
        size = f"{student['model']}, {student['image_size']} pixels, patch {student['patch_size']}"
        own = [str(student[name]) for name in ("width", "depth", "heads") if student.get(name) is not None]
        row = {
            "run": run.name,
            "folder": str(run.folder),
            "target": settings.get("target", "clip"),
            "decoder": settings.get("decoder", {}).get("kind", "-"),
            "masks": settings.get("masking", {}).get("kind", "-"),
            "student (width / blocks / heads)": size + (f" ({' / '.join(own)})" if own else ""),
            "epochs": _number(run.record.get("epochs"), "{}"),
            "steps": f"{run.record['step']}" + ("" if run.finished else ", not finished"),
            "loss": _number(report.get("loss"), "{:.4f}"),
            "images/s": _number(report.get("images_per_second"), "{:.1f}"),
            "waiting": _number(report.get("data_wait"), "{:.1%}").replace("%", " %"),
            "time": _number(report.get("seconds"), "{:.0f} s"),
        }
        rows.append(row)
    return Table(columns=list(rows[0]), rows=[_cells(*row.values()) for row in rows])


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


def _score_chart(scores: Table) -> str:
    shares = {column: {name: 100 * share for name, share in found.items()} for column, found in scores.shares.items()}
    return bar_chart("Scores", "per cent", shares)


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
    return Table(columns=["setting", *(run.name for run in runs)], rows=rows, text=True) if rows else None


def _segment_images(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The last images that each run of `segment` drew."""
    found = []
    for run in (run for run in runs if run.task == "segment"):
        # A page is passed on: a link in a run must not put another file into it.
        files = [
            file
            for file in sorted((run.folder / "images").glob("*.png"))
            if file.is_file() and lies_in(run.folder, file)
        ]
        if files:
            url = file_url(read_regular(files[-1]), "png")
            found.append({"url": url, "caption": f"{run.name}: image, truth, prediction"})
    return found


def _learned_from(run: RunRecord, targets: Targets) -> int:
    """Which of a run's stores this one stands for, by its teacher; the first where none has it."""
    return number_of(targets.header.teacher, teachers_of(run.record)) or 0


def _targets_of(
    run: RunRecord, given: str | Path | None, opened: dict[str, Targets | None], left_out: list[str]
) -> Iterator[Targets]:
    """The targets of a run, opened once; those that cannot be opened are reported and left out."""
    wheres = [run.record.get("targets"), *(other["targets"] for other in run.record.get("others", []))]
    if given is not None:
        opened[str(given)] = found = opened.get(str(given)) or open_targets(given)
        wheres[_learned_from(run, found)] = given
    if wheres[0] is None:
        left_out.append(f"images of {run.name}: it does not say where its targets are; name them with --targets")
        return
    for where in wheres:
        if str(where) not in opened:
            try:
                opened[str(where)] = open_targets(where)
            except MilanError as error:
                opened[str(where)] = None
                left_out.append(f"store and images of {run.name}: {error}; name its location with --targets")
        if (store := opened[str(where)]) is not None:
            yield store


def _predictions(run: RunRecord, targets: Targets, left_out: list[str]) -> list[dict[str, Any]]:
    try:
        objective, store = pretrained_objective(run.checkpoint, targets.header, torch.device("cpu"))
    except MilanError as error:
        left_out.append(f"predictions of {run.name}: {error}")
        return []
    samples = choose_samples(targets, (), _STUDENT_SAMPLES)
    sheets, cosines = student_sheets(targets, samples, objective, store, epoch=0, view=0)
    teacher = f"teacher {targets.header.teacher.model}, " if len(objective.codecs) > 1 else ""
    what = (
        f"{teacher}target {objective.target}, {objective.masking.kind} masks of epoch 1; cosine of hidden patches "
        f"{sum(hidden for _, hidden in cosines) / len(cosines):.3f} on these {len(samples)}"
    )
    return [{"run": run.name, "target": objective.target, "what": what, "sheets": sheets}]


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
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
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
        StoreError: OUT cannot be written, or is a file of something else.
    """
    file = local_folder(out, "reports")
    require_own([file])
    if not runs:
        raise SettingError("a report needs a run; name the folders that `milan-pipe pretrain` and others wrote")
    found = read_runs([Path(run) for run in runs])
    for folder in map(Path, evaluations):
        if not folder.is_dir():
            raise SettingError(f"--evaluations {folder}: no such folder; name one that `milan-pipe knn --keep` wrote")
    kept = [evaluation for folder in evaluations for evaluation in read_evaluations(Path(folder))]
    pretrained = [run for run in found if run.task == PRETRAIN]
    left_out: list[str] = []
    opened: dict[str, Targets | None] = {}
    stores: dict[str, dict[str, Any]] = {}
    predictions: list[dict[str, Any]] = []
    for number, run in enumerate(pretrained):
        for store in _targets_of(run, targets, opened, left_out):
            name = str(store.store.location)
            if name not in stores:
                masking = MaskSettings.parse(run.record.get("settings", {}).get("masking", {}), str(run.folder))
                facts, bad = store_facts(store.store)
                sheets = target_sheets(store, choose_samples(store, (), _TARGET_SAMPLES), masking, 0)
                stores[name] = {"facts": facts, "bad": bad, "sheets": sheets}
            predictions += _predictions(run, store, left_out)
        on_progress(number + 1, len(pretrained))
    others = [run for run in found if run.task != PRETRAIN]
    scores = transfer_table(found, kept)
    shown: list[Any] = next((run["sheets"] for run in predictions if run["target"] == "clip"), [])
    text = render(
        "report.html.j2",
        title=", ".join(run.name for run in pretrained or found),
        told=_told(pretrained, (store for store in opened.values() if store is not None)) if pretrained else None,
        chart=_score_chart(scores) if scores is not None else None,
        scene=shown.pop(0) if shown else None,
        overview=_overview(pretrained) if pretrained else None,
        transfer=scores,
        charts=_charts(pretrained),
        transfer_charts=_transfer_charts(others),
        stores=stores,
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
