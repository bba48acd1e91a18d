"""Commands that say what a student is worth."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

import milan_pipe
from milan_pipe.cli.base import JsonOption, ParamsOption, RunArgument, SetOption, StudentArgument, SubjectArgument, app
from milan_pipe.cli.console import progress, show
from milan_pipe.cli.training import run_training, scored_rows
from milan_pipe.errors import SettingError, StoppedError

_TOP = {"top1": "top-1", "top5": "top-5"}
_HEADS = {"linear": "linear head", "knn": "k-NN"}
_MIOU = {"miou": "mIoU", "aacc": "pixel accuracy", "macc": "class accuracy"}

TrainArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRAIN", help="Labelled shards (folder, braces or glob), or a folder with one subfolder per class."
    ),
]
MasksArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRAIN", help="Shards with masks, ADE20K's folder, one with images/ and masks/, or IMAGES,MASKS."
    ),
]
TestArgument = Annotated[str, typer.Argument(metavar="TEST", help="The same, to be judged on.")]
ValArgument = Annotated[str, typer.Argument(metavar="VAL", help="The same, to be judged on.")]
FeaturesOption = Annotated[
    str | None,
    typer.Option("--features", metavar="FOLDER", help="Keep features there; the next knn or --quick probe reads them."),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="FOLDER",
        help="Keep the result there, for report; default: evaluations/ in the run, if it is one.",
    ),
]


def _frozen_rows(report: Any) -> dict[str, str]:
    rows = {"images": f"{report.train} train, {report.test} test ({report.bad} skipped)"}
    return rows if report.kept is None else {**rows, "kept in": report.kept}


@app.command()
def knn(
    checkpoint: SubjectArgument,
    train: TrainArgument,
    test: TestArgument,
    features: FeaturesOption = None,
    keep: KeepOption = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Accuracy of a k-nearest-neighbour classifier on frozen features.

    Example: milan-pipe knn run 'images/train-*.tar' 'images/test-*.tar'
    """
    settings = milan_pipe.load_params(params, overrides or ())
    with progress() as update:
        report = milan_pipe.knn(checkpoint, train, test, settings, features=features, keep=keep, on_progress=update)
    rows = {f"k = {k}": f"{100 * accuracy:.2f} %" for k, accuracy in report.accuracy.items()}
    return show(f"k-NN of {report.subject}", rows | _frozen_rows(report), report, as_json)


@app.command()
def finetune(
    checkpoint: StudentArgument,
    train: TrainArgument,
    val: ValArgument,
    run: RunArgument,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train the whole student to classify, and report top-1 and top-5 accuracy.

    The recipe is in sections finetune (rates, layer decay, drop path, mean of the weights) and augment (RandAugment,
    mixup, cutmix, erasing, smoothing). ImageNet's own folders are taken as they are: TRAIN=imagenet/train
    VAL=imagenet/val. RUN/best holds the best weights, RUN/checkpoints the last; `milan-pipe export RUN/best OUT` gives
    them to timm, classifier included.

    The same command goes on after an interruption. On several devices: torchrun --nproc-per-node 8 -m milan_pipe
    finetune run imagenet/train imagenet/val tuned --params imagenet1k-vit-b-16

    Example: milan-pipe finetune run 'images/train-*.tar' 'images/test-*.tar' tuned
    """
    settings = milan_pipe.load_params(params, overrides or ())
    return run_training(
        milan_pipe.finetune,
        *(checkpoint, train, val, run, settings),
        title=f"{checkpoint} -> {run}",
        rows=lambda report: scored_rows(report, _TOP),
        as_json=as_json,
        known=_share(settings.finetune.train_fraction),
    )


def _share(fraction: float) -> dict[str, str]:
    """What a run with a part of TRAIN alone says of it: a params.yaml may have set it."""
    return {} if fraction == 1 else {"trained on": f"{100 * fraction:g} % of TRAIN, by train_fraction"}


@app.command()
def segment(
    checkpoint: StudentArgument,
    train: MasksArgument,
    val: ValArgument,
    run: RunArgument,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train UperNet on the student, and report mIoU, pixel and class accuracy.

    Images are tested by sliding windows; with segment.scales also over scales and mirrors, at the end. Masks hold
    class indices, segment.ignore_index for none; in ADE20K's own layout 0 is no class. Given ADE20K's folder twice,
    training/ and validation/ are taken. The class list is segment.classes, or a classes.txt beside the folders.

    The same command goes on after an interruption. RUN/per_class.json is the table of all classes.

    Example: milan-pipe segment run own/train own/val segmented
    """
    from milan_pipe.evaluation.segment import PER_CLASS_FILE

    settings = milan_pipe.load_params(params, overrides or ())

    def rows(report: Any) -> dict[str, str]:
        scores = scored_rows(report, _MIOU)
        file = Path(run) / PER_CLASS_FILE
        scores["IoU of classes"] = f"{_classes(json.loads(file.read_text(encoding='utf-8')))}, all in {file}"
        if "ms_miou" in report.scores:
            scores["mIoU, multi-scale"] = f"{100 * report.scores['ms_miou']:.2f} %"
        return scores

    return run_training(
        milan_pipe.segment,
        *(checkpoint, train, val, run, settings),
        title=f"{checkpoint} -> {run}",
        rows=rows,
        as_json=as_json,
        known=_share(settings.segment.train_fraction),
    )


def _classes(table: Sequence[Mapping[str, Any]]) -> str:
    """The classes that are told worst and best."""
    ordered = sorted((row for row in table if row["iou"] is not None), key=lambda row: row["iou"])
    low, high = (f"{row['name']} {100 * row['iou']:.1f} %" for row in (ordered[0], ordered[-1]))
    return f"from {low} to {high}"


@app.command("segment-probe")
def segment_probe(
    checkpoint: SubjectArgument,
    train: MasksArgument,
    val: ValArgument,
    keep: KeepOption = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """MIoU of frozen patch features, without training a network: a linear head, and nearest neighbours.

    Images are tested as segment tests them, by sliding windows of the subject's input. Masks and classes are those of
    segment, with its settings segment.classes, segment.ignore_index and segment.reduce_zero_label.

    segment_probe.heads=[knn] takes one head alone. --json has the table of all classes.

    Example: milan-pipe segment-probe run 'images/train-*.tar' 'images/test-*.tar'
    """
    settings = milan_pipe.load_params(params, overrides or ())
    with progress("what") as update:
        report = milan_pipe.segment_probe(
            checkpoint,
            train,
            val,
            settings,
            keep=keep,
            on_progress=lambda done, total, what: update(done, total, what=what),
        )
    rows = {}
    for name, found in report.heads.items():
        rows[f"mIoU, {_HEADS[name]}"] = f"{100 * found.miou:.2f} %, pixel accuracy {100 * found.aacc:.2f} %"
        rows[f"IoU, {_HEADS[name]}"] = _classes(found.classes)
    return show(f"patch features of {report.subject}", rows | _frozen_rows(report), report, as_json)


@app.command("linear-probe")
def linear_probe(
    checkpoint: SubjectArgument,
    train: TrainArgument,
    test: TestArgument,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Folder for checkpoints and metrics, to go on in; none: nothing is kept."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Features once, of untouched images, and L-BFGS: a matter of minutes.")
    ] = False,
    features: FeaturesOption = None,
    keep: KeepOption = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Accuracy of a linear classifier on frozen features.

    By protocol (section lars_probe): LARS, BatchNorm without affine part, every epoch with other crops. TRAIN and TEST
    may also be folders of one subfolder per class, and torchrun spreads it over devices.

    With --quick (sections embed, linear_probe) features are computed once and standardised, and the strength of the
    regularisation is chosen on a held-out part of TRAIN. The teacher can be judged this way alone.

    Example: milan-pipe linear-probe run 'images/train-*.tar' 'images/test-*.tar' --quick
    """
    settings = milan_pipe.load_params(params, overrides or ())
    if quick:
        with progress() as update:
            kept = {"features": features, "keep": keep}
            report = milan_pipe.linear_probe(checkpoint, train, test, settings, **kept, on_progress=update)
        advice = "" if report.converged else " (not converged: raise linear_probe.max_iterations)"
        found = {
            "accuracy": f"{100 * report.accuracy:.2f} %",
            "on train": f"{100 * report.train_accuracy:.2f} %",
            "l2": f"{report.l2:g}{advice}",
        }
        return show(f"linear probe of {report.subject}", found | _frozen_rows(report), report, as_json)
    if checkpoint == "teacher":
        raise SettingError("the teacher has no linear probe by protocol; add --quick")

    def rows(report: Any) -> dict[str, str]:
        left_out = () if run is not None else ("checkpoint", "best")
        return {name: text for name, text in scored_rows(report, _TOP).items() if name not in left_out}

    with nullcontext(run) if run is not None else TemporaryDirectory(prefix="milan-pipe-probe-") as folder:
        arguments = checkpoint, train, test, folder, settings
        title = f"linear probe of {checkpoint}"
        try:
            return run_training(milan_pipe.lars_probe, *arguments, title=title, rows=rows, as_json=as_json)
        except StoppedError as stopped:
            if run is not None:
                raise
            name = signal.Signals(stopped.signal).name
            raise StoppedError(f"by {name}; nothing is kept: name a RUN to go on with", stopped.signal) from stopped
