"""The command line: reads settings, shows progress, prints what a function of the same name returns.

Each command returns its report as well, for the scripts in `stages/`. It is annotated as `Any`, because typer evaluates
annotations and the report classes live behind imports that take seconds.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.table import Table
from rich.text import Text

from milan_pipe import __version__
from milan_pipe.terminal import console, errors_as_one_line, progress, show, show_warnings_as_lines, size

if TYPE_CHECKING:
    from milan_pipe.config import Params


class _Commands(typer.core.TyperGroup):
    """Commands whose errors are one line; outside of them typer turns Ctrl-C into silence."""

    def invoke(self, ctx: Any) -> Any:
        with errors_as_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    name="milan-pipe",
    cls=_Commands,
    help="Pretrain vision transformers on stored CLIP features.\n\n"
    "Stage 1 (extract-targets) runs a CLIP image tower over your pictures once and stores patch features, attention "
    "and rendered views. Stage 2 (pretrain) trains a masked student on them, with no teacher in memory.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MOST_PROBLEMS = 50
_WORST = 8
_MOST_CLASSES = 30

ParamsOption = Annotated[
    Path | None,
    typer.Option(
        "--params",
        metavar="FILE",
        help="Settings in YAML, or a recipe's name. Default: ./params.yaml if there, else built in.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given several times."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object with the results as the last line.")]
FeaturesOption = Annotated[
    str | None,
    typer.Option("--features", metavar="FOLDER", help="Keep features there; the next knn or --quick probe reads them."),
]
CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint folder, or run folder (its last checkpoint), or `random` (untrained student), or `teacher`.",
    ),
]
StudentArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint folder, or run folder (its last checkpoint), or `random` (untrained student).",
    ),
]
TrainArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRAIN", help="Labelled shards (folder, braces or glob), or a folder with one subfolder per class."
    ),
]
TestArgument = Annotated[str, typer.Argument(metavar="TEST", help="The same, to be judged on.")]


def _settings(params: Path | None, overrides: list[str] | None) -> Params:
    # Imported late: torch and open_clip take seconds, and --help should not.
    from milan_pipe.config import load_params

    return load_params(params, overrides or [])


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="`demo`, or a folder of pictures.")],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Local folder for the shards.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Pack pictures into webdataset shards with an index.

    SOURCE `demo` renders the built-in captioned scenes (splits train and test). A folder may be flat, hold one
    subfolder per class, or hold train/ val/ test/ folders of either kind. Pictures are stored as they are.

    Example: milan-pipe prepare ~/pictures data/images
    """
    from milan_pipe import commands

    settings = _settings(params, overrides)
    with progress() as update:
        report = commands.prepare(source, images, settings, on_progress=lambda done, total: update(done, total))
    rows = {"shards": str(report.shards), "pictures": str(report.samples), "size": size(report.bytes)}
    rows["classes"] = str(len(report.classes)) if report.classes else "none"
    rows["set aside"] = str(len(report.bad)) + (f", see {images}/bad_samples.jsonl" if report.bad else "")
    show(f"{source} -> {images}", rows, report, as_json)
    return report


@app.command()
def recipes(as_json: JsonOption = False) -> Any:
    """List the recipes that ship with the package: what each is for, on what, how long, and what comes out.

    A recipe is a params file: any command takes its name, as in --params imagenet1k-vit-b-16, and --set changes it.
    """
    from milan_pipe.config import load_params
    from milan_pipe.recipes import recipe_names

    found = {name: about for name in recipe_names() if (about := load_params(name).about) is not None}
    for name, about in found.items():
        rows = {
            "what": about.summary,
            "commands": "\n".join(about.commands),
            "hardware": about.hardware,
            "time": f"{about.time} ({about.time_source})",
            "score": f"{about.score} ({about.score_source})" if about.score_source != "none" else about.score,
        }
        show(name, rows, None, False)
    if as_json:
        sys.stdout.write(json.dumps({name: about.model_dump(mode="json") for name, about in found.items()}) + "\n")
    return found


@app.command()
def plan(
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="What extract-targets would be given: shards, local or a URL.")
    ],
    targets: Annotated[
        str | None,
        typer.Argument(metavar="TARGETS", help="Where the targets are meant to lie: its free disk is looked at."),
    ] = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=1, help="Pictures to measure with, spread over the shards.")
    ] = 64,
    as_json: JsonOption = False,
) -> Any:
    """Say what extraction and pretraining will take, before anything is spent.

    Counts the pictures, runs teacher, codecs, store and student on a few of them, and extrapolates: size of the store,
    hours, hours saved against a teacher in every step, and whether the disk has room. Nothing is left behind.

    Example: milan-pipe plan 'shards/train-{000000..000127}.tar' /big/disk/targets --params imagenet1k-vit-b-16
    """
    from milan_pipe import commands
    from milan_pipe.planning.run import PlanProgress
    from milan_pipe.planning.tables import recipe_rows, rows, store_table

    settings = _settings(params, overrides)
    with progress("what") as update:

        def tell(now: PlanProgress) -> None:
            update(now.done, now.total, what=now.what)

        report = commands.plan(images, targets, settings, sample=sample, on_progress=tell)
    console.print(store_table(report))
    show(f"{images} -> {report.space.folder}", {**recipe_rows(settings.about), **rows(report)}, report, as_json)
    for line in report.warnings:
        console.print(Text.assemble(("warning:", "bold yellow"), " ", line), soft_wrap=True)
    return report


@app.command("extract-targets")
def extract_targets(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="Folder of .tar shards, or shard paths with {000..127} braces or a glob; local or s3://, gs://, https://.",
        ),
    ],
    targets: Annotated[
        str, typer.Argument(metavar="TARGETS", help="Folder of the target store; local, s3:// or gs://.")
    ],
    params: ParamsOption = None,
    overrides: SetOption = None,
    store_format: Annotated[
        str | None, typer.Option("--format", metavar="zarr|webdataset", help="Format of the store (extract.format).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", help="Processes of a Dask cluster on this machine (extract.workers)."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="ADDRESS", help="A Dask scheduler that runs already (extract.scheduler)."),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option("--shards", metavar="i/n", help="Do only every n-th shard, from number i on: for a batch queue."),
    ] = None,
    redo: Annotated[
        str | None, typer.Option("--redo", metavar="NAME,...", help="Do these committed shards again, as 000123.")
    ] = None,
    verify_sources: Annotated[
        bool,
        typer.Option("--verify-sources", help="Compare the sha256 of shards that are done, not their sizes alone."),
    ] = False,
    as_json: JsonOption = False,
) -> Any:
    """Run the teacher once over all pictures and store its targets.

    Each picture gets views.count views (crop and flip). A view is rendered once, stored as JPEG, and the stored JPEG
    is what the teacher sees. The same command goes on after an interruption; shards that are whole are skipped. A shard
    that cannot be done is told of at the end, when all others are committed, and the exit code is not 0.

    Example: milan-pipe extract-targets 'shards/train-{000000..000127}.tar' targets --workers 4
    --set teacher.model=ViT-B-16 --set teacher.pretrained=openai --set student.image_size=224
    """
    from milan_pipe import commands
    from milan_pipe.extract.run import ExtractProgress

    flags = {"format": store_format, "workers": workers, "scheduler": scheduler}
    given = [f"extract.{name}={value}" for name, value in flags.items() if value is not None]
    settings = _settings(params, [*(overrides or []), *given])
    with progress("shards", "rate", "bad", "workers") as update:
        began: float | None = None

        def tell(now: ExtractProgress) -> None:
            nonlocal began
            if began is None:  # told first when the teacher is loaded
                began = time.monotonic()
            rate = now.views / max(time.monotonic() - began, 1e-9)
            update(
                now.shards_done,
                now.shards,
                shards="shards",
                rate=f"{now.views} views, {rate:.0f}/s",
                bad=f"{now.bad} set aside",
                workers=f"{now.workers} workers" if now.workers > 1 else "",
            )

        report = commands.extract_targets(
            images,
            targets,
            settings,
            shards=shards,
            redo=redo.split(",") if redo else (),
            verify_sources=verify_sources,
            on_progress=tell,
        )
    rows = {
        "shards": f"{report.shards} ({report.skipped} were there)" + ("" if report.complete else ", not all yet"),
        "pictures": f"{report.samples} ({report.bad} set aside"
        + (f", see {targets}/bad_samples.jsonl)" if report.bad and report.complete else ")"),
        "views": f"{report.views} in {report.seconds:.1f} s, {report.views_per_second:.1f} a second",
        "size": f"{size(report.bytes)}, {size(report.bytes_per_view)} a view",
        "codec": f"{settings.codec.name}, mean cosine "
        + (f"{report.mean_cosine:.7f}" if report.mean_cosine is not None else "not measured: nothing was done"),
    }
    show(f"{images} -> {targets}", rows, report, as_json)
    return report


@app.command("verify-targets")
def verify_targets(
    targets: Annotated[str, typer.Argument(metavar="TARGETS", help="Folder or URL of the target store.")],
    against_teacher: Annotated[
        int,
        typer.Option(
            "--against-teacher",
            metavar="N",
            min=0,
            help="Also run the teacher live on N views of each shard and compare.",
        ),
    ] = 0,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Check every file and every promise of a store.

    Presence, size and sha256 of each file; shapes; values finite; attention rows that sum to 1; views that decode; keys
    that occur once; counts. Exit code 1 and a table of what is wrong, with the command that mends it, else 0.

    Example: milan-pipe verify-targets targets --against-teacher 8
    """
    from milan_pipe import commands

    settings = _settings(params, overrides)
    with progress("what") as update:
        report = commands.verify_targets(
            targets,
            settings,
            against_teacher=against_teacher,
            on_progress=lambda done, total: update(done, total, what="shards"),
        )
    rows = {
        "shards": str(report.shards),
        "views": f"{report.views} of {report.samples} pictures",
        "files": f"{report.files}, {size(report.bytes)}",
        "problems": str(len(report.problems)) if report.problems else "none",
    }
    if report.problems:
        table = Table("shard", "array", "found")
        for problem in report.problems[:_MOST_PROBLEMS]:
            table.add_row(*(Text(part, overflow="fold") for part in (problem.shard, problem.array, problem.what)))
        console.print(table)
        if len(report.problems) > _MOST_PROBLEMS:
            console.print(f"and {len(report.problems) - _MOST_PROBLEMS} more: see --json")
    show(str(targets), rows, report, as_json)
    if report.problems:
        # One line each, however long, so that they can be copied.
        console.print(Text("mend with, IMAGES and settings as they were:", style="bold"))
        for command in report.mend:
            console.print(Text(f"  {command}"), soft_wrap=True)
    if report.problems:
        raise typer.Exit(1)
    return report


@app.command("convert-targets")
def convert_targets(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or URL of the store that is there.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder or URL of the new store.")],
    store_format: Annotated[str, typer.Option("--format", metavar="zarr|webdataset", help="Format of the new store.")],
    as_json: JsonOption = False,
) -> Any:
    """Write a store again in the other format, without the teacher and without loss.

    Example: milan-pipe convert-targets targets s3://bucket/targets --format webdataset
    """
    from milan_pipe import commands
    from milan_pipe.extract.settings import ExtractConfig

    wanted = ExtractConfig.parse({"format": store_format}, "--format").format
    with progress("what") as update:
        report = commands.convert_targets(
            source, destination, format=wanted, on_progress=lambda done, total: update(done, total, what="shards")
        )
    rows = {
        "shards": f"{report.shards} ({report.skipped} were there)",
        "pictures": str(report.samples),
        "size": size(report.bytes),
    }
    show(f"{source} -> {destination}", rows, report, as_json)
    return report


@app.command()
def pretrain(
    targets: Annotated[str, typer.Argument(metavar="TARGETS", help="Folder or URL of the target store.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Local folder for checkpoints and metrics.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train the student on stored targets.

    On several devices or machines: torchrun --nproc-per-node 8 -m milan_pipe pretrain targets run. The batch and the
    learning rate are those of pretrain.batch_size, whatever the number of ranks.

    The same command goes on after an interruption, from the last checkpoint: they are written every
    pretrain.checkpoint_minutes or pretrain.checkpoint_every steps, and on SIGTERM and Ctrl-C. A run of another
    configuration is refused, with a list of what differs.

    The ablations of the method are settings: masking=random, decoder=plain, target=pixels, target=hog. With
    pretrain.targets=online the teacher runs in every step, on the stored views: what stored targets are measured by.

    Example: milan-pipe pretrain targets run --set pretrain.epochs=100
    """
    from milan_pipe import commands
    from milan_pipe.training.distributed import rank_of_environment

    settings = _settings(params, overrides)
    if rank_of_environment():
        return commands.pretrain(targets, run, settings)
    with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
        report = commands.pretrain(targets, run, settings, on_progress=_tell_training(update))
    rows = {
        "steps": f"{report.steps} in {report.epochs} epochs"
        + (f", {report.seconds:.0f} s" if report.steps_now else ": finished before, nothing was done")
        + (f", gone on from step {report.resumed_from}" if report.resumed_from and report.steps_now else ""),
        "loss": f"{report.loss:.4f}, mean of the last epoch",
        "speed": f"{report.images_per_second:.0f} images a second",
        "data wait": f"{100 * report.data_wait:.1f} % of the time",
        "checkpoint": report.checkpoint,
    }
    show(f"{targets} -> {run}", rows, report, as_json)
    return report


class PrecisionChoice(StrEnum):
    """Precisions of a forward pass."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="RUN/not-finite/step-NNNNNNNN.safetensors.")],
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1.")] = "auto",
    precision: Annotated[
        PrecisionChoice | None, typer.Option("--precision", help="Of the forward pass. Default: the run's.")
    ] = None,
    as_json: JsonOption = False,
) -> Any:
    """Compute the batch again that stopped a run.

    When a loss or a gradient is not finite, pretrain writes the batch and the weights that met it to a file. This says
    which samples, stored values and gradients are not finite; another --precision tells whether that was the cause.

    Example: milan-pipe replay run/not-finite/step-00001234.safetensors --precision float32
    """
    from milan_pipe import commands

    with progress() as update:
        report = commands.replay(
            file,
            device=device,
            precision=precision.value if precision else None,
            on_progress=lambda done, total: update(done, total),
        )
    worst = [f"{key}: {loss:.4g}" for key, loss in list(report.loss_by_key.items())[:_WORST]]
    broken = [f"{count} in {name}" for name, count in report.stored.items() if count]
    first = ", ".join(report.gradient[:_WORST]) + (" ..." if len(report.gradient) > _WORST else "")
    rows = {
        "step": f"{report.step}, epoch {report.epoch + 1}, {report.precision}",
        "loss": f"{report.loss:.6g}",
        "gradient": f"norm {report.grad_norm:.6g}" + (f"; not finite in {first}" if first else ""),
        "not finite": ", ".join(broken) or "nothing in the batch or the weights",
        "largest losses": ", ".join(worst),
    }
    show(str(file), rows, report, as_json)
    return report


@app.command()
def knn(
    checkpoint: CheckpointArgument,
    train: TrainArgument,
    test: TestArgument,
    features: FeaturesOption = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Accuracy of a k-nearest-neighbour classifier on frozen features.

    Example: milan-pipe knn run 'images/train-*.tar' 'images/test-*.tar'
    """
    from milan_pipe import commands

    settings = _settings(params, overrides)
    with progress() as update:
        report = commands.knn(checkpoint, train, test, settings, features=features, on_progress=update)
    rows = {f"k = {k}": f"{100 * accuracy:.2f} %" for k, accuracy in report.accuracy.items()}
    rows["pictures"] = f"{report.train} train, {report.test} test ({report.bad} set aside)"
    show(f"k-NN of {report.subject}", rows, report, as_json)
    return report


def _tell_training(update: Any) -> Any:
    from milan_pipe.training.recorder import TrainProgress

    def tell(now: TrainProgress) -> None:
        update(
            now.step,
            now.steps,
            epoch=f"ep {now.epoch + 1}",
            loss=f"loss {now.loss:.3f}",
            lr=f"lr {now.lr:.0e}".replace("e-0", "e-"),
            rate=f"{now.images_per_second:.0f}/s",
            wait=f"wait {100 * now.data_wait:.0f} %",
            memory=size(now.memory),
        )

    return tell


def _training_rows(report: Any) -> dict[str, str]:
    return {
        "steps": str(report.steps)
        + (f" in {report.seconds:.0f} s" if report.steps_now else ": finished before, nothing was done")
        + (f", gone on from step {report.resumed_from}" if report.resumed_from and report.steps_now else ""),
        "loss": f"{report.loss:.4f}, mean of the last epoch",
        "speed": f"{report.images_per_second:.0f} images a second, {100 * report.data_wait:.1f} % waiting for data",
        "set aside": f"{report.bad} pictures",
        "checkpoint": report.checkpoint,
        "best": f"{report.best_checkpoint}, of step {report.best_step}",
    }


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
    from milan_pipe import commands
    from milan_pipe.training.distributed import rank_of_environment

    settings = _settings(params, overrides)
    if rank_of_environment():
        return commands.finetune(checkpoint, train, val, run, settings)
    with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
        report = commands.finetune(checkpoint, train, val, run, settings, on_progress=_tell_training(update))
    rows = {
        "top-1": f"{100 * report.scores['top1']:.2f} %, best {100 * report.best['top1']:.2f} %",
        "top-5": f"{100 * report.scores['top5']:.2f} %, best {100 * report.best['top5']:.2f} %",
        **_training_rows(report),
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
    run: Annotated[str, typer.Argument(metavar="RUN", help="Local folder for checkpoints, metrics and pictures.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train UperNet on the student, and report mIoU, pixel and class accuracy.

    Pictures are tested by sliding windows; with segment.scales also over scales and mirrors, at the end. Masks hold
    class indices, segment.ignore_index for none; in ADE20K's own layout 0 is no class. Given ADE20K's folder twice,
    training/ and validation/ are taken. The class list is segment.classes, or a classes.txt beside the folders.

    The same command goes on after an interruption. RUN/per_class.json is the table of all classes.

    Example: milan-pipe segment run ADEChallengeData2016 ADEChallengeData2016 segmented --params imagenet1k-vit-b-16
    """
    from milan_pipe import commands
    from milan_pipe.training.distributed import rank_of_environment
    from milan_pipe.transfer.segment import PER_CLASS_FILE

    settings = _settings(params, overrides)
    if rank_of_environment():
        return commands.segment(checkpoint, train, val, run, settings)
    with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
        report = commands.segment(checkpoint, train, val, run, settings, on_progress=_tell_training(update))
    classes = json.loads((Path(run) / PER_CLASS_FILE).read_text(encoding="utf-8"))
    console.print(_class_table(classes))
    if len(classes) > _MOST_CLASSES:
        console.print(f"the first {_MOST_CLASSES} of {len(classes)} classes; all of them are in {run}/{PER_CLASS_FILE}")
    names = {"miou": "mIoU", "aacc": "pixel accuracy", "macc": "class accuracy"}
    last, best = report.scores, report.best
    rows = {title: f"{100 * last[name]:.2f} %, best {100 * best[name]:.2f} %" for name, title in names.items()}
    if "ms_miou" in report.scores:
        rows["mIoU, multi-scale"] = f"{100 * report.scores['ms_miou']:.2f} %"
    show(f"{checkpoint} -> {run}", {**rows, **_training_rows(report)}, report, as_json)
    return report


def _class_table(classes: list[dict[str, Any]]) -> Table:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    table = Table("class", title="Per class, in percent", title_justify="left", title_style="bold")
    for name in ("IoU", "accuracy", "pixels"):
        table.add_column(name, justify="right")
    for row in classes[:_MOST_CLASSES]:
        table.add_row(Text(row["name"]), percent(row["iou"]), percent(row["acc"]), str(row["pixels"]))
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
        typer.Option("--quick", help="Features once, of untouched pictures, and L-BFGS: a matter of minutes."),
    ] = False,
    features: FeaturesOption = None,
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
        return _quick_probe(checkpoint, train, test, features, params, overrides, as_json)
    from milan_pipe import commands
    from milan_pipe.errors import SettingError
    from milan_pipe.training.distributed import rank_of_environment

    settings = _settings(params, overrides)
    if checkpoint == "teacher":
        raise SettingError("the teacher has no linear probe by protocol; add --quick")
    with ExitStack() as stack:
        folder = run
        if folder is None:
            folder = stack.enter_context(TemporaryDirectory(prefix="milan-pipe-probe-"))
        if rank_of_environment():
            return commands.lars_probe(checkpoint, train, test, folder, settings)
        with progress("epoch", "loss", "lr", "rate", "wait", "memory") as update:
            report = commands.lars_probe(checkpoint, train, test, folder, settings, on_progress=_tell_training(update))
    rows = {
        "top-1": f"{100 * report.scores['top1']:.2f} %, best {100 * report.best['top1']:.2f} %",
        "top-5": f"{100 * report.scores['top5']:.2f} %, best {100 * report.best['top5']:.2f} %",
        **_training_rows(report),
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
    params: Path | None,
    overrides: list[str] | None,
    as_json: bool,
) -> Any:
    from milan_pipe import commands

    settings = _settings(params, overrides)
    with progress() as update:
        report = commands.linear_probe(checkpoint, train, test, settings, features=features, on_progress=update)
    rows = {
        "accuracy": f"{100 * report.accuracy:.2f} %",
        "on train": f"{100 * report.train_accuracy:.2f} %",
        "l2": f"{report.l2:g}" + ("" if report.converged else " (not converged: raise linear_probe.max_iterations)"),
        "pictures": f"{report.train} train, {report.test} test ({report.bad} set aside)",
    }
    show(f"linear probe of {report.subject}", rows, report, as_json)
    return report


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, or run folder (its last checkpoint).")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for model.safetensors and config.json.")],
    as_json: JsonOption = False,
) -> Any:
    """Write the student as timm reads it, from a folder or from its hub.

    The weights have timm's own names, so that any tool that builds on timm can fine-tune them. The decoder is left out.
    Of a run of finetune the classifier is part of it; RUN/best names the best weights.

    Example: milan-pipe export run vit-milan
    """
    from milan_pipe import commands

    report = commands.export(checkpoint, out)
    sizes = "".join(f", {name}={value!r}" for name, value in report.model_args.items())
    rows = {
        "parameters": f"{report.parameters:,}",
        "step": str(report.step),
        "by folder": f"timm.create_model('local-dir:{report.folder}', pretrained=True)",
        "by name": f"timm.create_model('{report.model}'{sizes}, num_classes={report.classes}, "
        f"checkpoint_path='{report.weights}')",
    }
    show(f"{checkpoint} -> {out}", rows, report, as_json)
    return report


@app.command("import-published")
def import_published(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Safetensors, or .pth with a state dict.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Run folder for the checkpoint.")],
    encoder_heads: Annotated[
        int | None, typer.Option("--encoder-heads", metavar="N", min=1, help="Default: one per 64 channels.")
    ] = None,
    decoder_heads: Annotated[
        int | None, typer.Option("--decoder-heads", metavar="N", min=1, help="Default: 16, for a width of 512.")
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="TEXT", help="What stands before every name, as `module.`.")
    ] = "",
    as_json: JsonOption = False,
) -> Any:
    """Make a checkpoint of a published one: MILAN's or MAE's key names, decoder included.

    A .pth is read without unpickling; one that holds more than tensors is refused, with the reason.

    Example: milan-pipe import-published milan_vit_base.pth runs/published
    """
    from milan_pipe import commands

    report = commands.import_published(
        file, out, encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix=prefix
    )
    student, decoder = report.student, report.decoder
    rows = {
        "student": f"{student.model}, {student.image_size} pixels, patch {student.patch_size}, width {student.width}, "
        f"{student.depth} blocks, {student.heads} heads",
        "decoder": f"{decoder.kind}, width {decoder.width}, {decoder.depth} blocks, {decoder.heads} heads",
        "predicts": f"{report.output_width} values a token",
        "parameters": f"{report.parameters:,}",
        "checkpoint": report.checkpoint,
    }
    show(f"{file} -> {out}", rows, report, as_json)
    return report


@app.command("train-demo-teacher")
def train_demo_teacher(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the weights.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the scenes' small CLIP anew, from pictures and captions alone.

    The package ships what this wrote. It takes about an hour on two cores.
    """
    import logging

    from milan_pipe import commands

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = commands.train_demo_teacher(out, _settings(params, overrides))
    console.print(f"zero-shot accuracy on unseen scenes {100 * result['zero_shot_accuracy']:.2f} %, weights in {out}")
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"milan-pipe {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Entry point of `milan-pipe`."""
    show_warnings_as_lines()
    with errors_as_one_line():
        app()


if __name__ == "__main__":
    main()
