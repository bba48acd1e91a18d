"""Commands that say what a student is worth."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from milan_pipe.cli.base import (
    CheckpointArgument,
    FeaturesOption,
    JsonOption,
    KeepOption,
    ParamsOption,
    SetOption,
    StudentArgument,
    TestArgument,
    TrainArgument,
    app,
    read_settings,
)
from milan_pipe.cli.console import console, plain, progress, show
from milan_pipe.cli.steps import show_training, training_rows

_MOST_CLASSES = 30


@app.command()
def knn(
    checkpoint: CheckpointArgument,
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
    from milan_pipe import api

    settings = read_settings(params, overrides)
    with progress() as update:
        report = api.knn(checkpoint, train, test, settings, features=features, keep=keep, on_progress=update)
    rows = {f"k = {k}": f"{100 * accuracy:.2f} %" for k, accuracy in report.accuracy.items()}
    rows["images"] = f"{report.train} train, {report.test} test ({report.bad} skipped)"
    if report.kept is not None:
        rows["kept in"] = report.kept
    show(f"k-NN of {report.subject}", rows, report, as_json)
    return report


@app.command()
def finetune(
    checkpoint: StudentArgument,
    train: Annotated[
        str, typer.Argument(metavar="TRAIN", help="Labelled shards, or a folder with one subfolder per class.")
    ],
    val: Annotated[str, typer.Argument(metavar="VAL", help="The same, to be judged on.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Local folder for checkpoints and metrics.")],
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
    from milan_pipe import api
    from milan_pipe.training.distributed import rank_of_environment

    settings = read_settings(params, overrides)
    if rank_of_environment():
        return api.finetune(checkpoint, train, val, run, settings)
    with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
        report = api.finetune(checkpoint, train, val, run, settings, on_progress=show_training(update))
    rows = {
        "top-1": f"{100 * report.scores['top1']:.2f} %, best {100 * report.best['top1']:.2f} %",
        "top-5": f"{100 * report.scores['top5']:.2f} %, best {100 * report.best['top5']:.2f} %",
        **training_rows(report),
    }
    show(f"{checkpoint} -> {run}", rows, report, as_json)
    return report


@app.command()
def segment(
    checkpoint: StudentArgument,
    train: Annotated[
        str,
        typer.Argument(
            metavar="TRAIN",
            help="Shards with masks, ADE20K's folder, one with images/ and masks/, or IMAGES,MASKS.",
        ),
    ],
    val: Annotated[str, typer.Argument(metavar="VAL", help="The same, to be judged on.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Local folder for checkpoints, metrics and images.")],
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
    from milan_pipe import api
    from milan_pipe.evaluation.segment import PER_CLASS_FILE
    from milan_pipe.training.distributed import rank_of_environment

    settings = read_settings(params, overrides)
    if rank_of_environment():
        return api.segment(checkpoint, train, val, run, settings)
    with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
        report = api.segment(checkpoint, train, val, run, settings, on_progress=show_training(update))
    classes = json.loads((Path(run) / PER_CLASS_FILE).read_text(encoding="utf-8"))
    console.print(_class_table(classes))
    if len(classes) > _MOST_CLASSES:
        console.print(
            plain(f"the first {_MOST_CLASSES} of {len(classes)} classes; all of them are in {run}/{PER_CLASS_FILE}")
        )
    names = {"miou": "mIoU", "aacc": "pixel accuracy", "macc": "class accuracy"}
    last, best = report.scores, report.best
    rows = {title: f"{100 * last[name]:.2f} %, best {100 * best[name]:.2f} %" for name, title in names.items()}
    if "ms_miou" in report.scores:
        rows["mIoU, multi-scale"] = f"{100 * report.scores['ms_miou']:.2f} %"
    show(f"{checkpoint} -> {run}", {**rows, **training_rows(report)}, report, as_json)
    return report


def _class_table(classes: list[dict[str, Any]]) -> Table:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    table = Table("class", title="Per class, in percent", title_justify="left", title_style="bold")
    for name in ("IoU", "accuracy", "pixels"):
        table.add_column(name, justify="right")
    for row in classes[:_MOST_CLASSES]:
        table.add_row(plain(row["name"]), percent(row["iou"]), percent(row["acc"]), str(row["pixels"]))
    return table


@app.command("linear-probe")
def linear_probe(
    checkpoint: CheckpointArgument,
    train: TrainArgument,
    test: TestArgument,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Folder for checkpoints and metrics, to go on in; none: nothing is kept."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Features once, of untouched images, and L-BFGS: a matter of minutes."),
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
    if quick:
        return _quick_probe(checkpoint, train, test, features, keep, params, overrides, as_json)
    from milan_pipe import api
    from milan_pipe.errors import SettingError
    from milan_pipe.training.distributed import rank_of_environment

    settings = read_settings(params, overrides)
    if checkpoint == "teacher":
        raise SettingError("the teacher has no linear probe by protocol; add --quick")
    with ExitStack() as stack:
        folder = run
        if folder is None:
            folder = stack.enter_context(TemporaryDirectory(prefix="milan-pipe-probe-"))
        if rank_of_environment():
            return api.lars_probe(checkpoint, train, test, folder, settings)
        with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
            report = api.lars_probe(checkpoint, train, test, folder, settings, on_progress=show_training(update))
    rows = {
        "top-1": f"{100 * report.scores['top1']:.2f} %, best {100 * report.best['top1']:.2f} %",
        "top-5": f"{100 * report.scores['top5']:.2f} %, best {100 * report.best['top5']:.2f} %",
        **training_rows(report),
    }
    if run is None:
        del rows["checkpoint"], rows["best"]
    show(f"linear probe of {checkpoint}", rows, report, as_json)
    return report


def _quick_probe(
    checkpoint: str,
    train: str,
    test: str,
    features: str | None,
    keep: str | None,
    params: Path | None,
    overrides: list[str] | None,
    as_json: bool,
) -> Any:
    from milan_pipe import api

    settings = read_settings(params, overrides)
    with progress() as update:
        report = api.linear_probe(checkpoint, train, test, settings, features=features, keep=keep, on_progress=update)
    rows = {
        "accuracy": f"{100 * report.accuracy:.2f} %",
        "on train": f"{100 * report.train_accuracy:.2f} %",
        "l2": f"{report.l2:g}" + ("" if report.converged else " (not converged: raise linear_probe.max_iterations)"),
        "images": f"{report.train} train, {report.test} test ({report.bad} skipped)",
    }
    if report.kept is not None:
        rows["kept in"] = report.kept
    show(f"linear probe of {report.subject}", rows, report, as_json)
    return report
