"""The command line: reads settings, shows progress, prints what a function of the same name returns.

Each command returns its report as well, for the scripts in `stages/`. It is annotated as `Any`, because typer evaluates
annotations and the report classes live behind imports that take seconds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from milan_pipe import __version__
from milan_pipe.errors import MilanError

if TYPE_CHECKING:
    from milan_pipe.config import Params

app = typer.Typer(
    name="milan-pipe",
    help="Pretrain vision transformers on stored CLIP features.\n\n"
    "Stage 1 (extract-targets) runs a CLIP image tower over your pictures once and stores patch features, attention "
    "and rendered views. Stage 2 (pretrain) trains a masked student on them, with no teacher in memory.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_console = Console(stderr=True)

ParamsOption = Annotated[
    Path | None,
    typer.Option("--params", metavar="FILE", help="Settings in YAML. Default: ./params.yaml if there, else built in."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given several times."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object with the results as the last line.")]
CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint folder, or run folder (its last checkpoint), or `random` (untrained student), or `teacher`.",
    ),
]
TrainArgument = Annotated[
    str, typer.Argument(metavar="TRAIN", help="Labelled shards to learn from: folder, braces or glob.")
]
TestArgument = Annotated[str, typer.Argument(metavar="TEST", help="Labelled shards to be judged on.")]


def _settings(params: Path | None, overrides: list[str] | None) -> Params:
    # Imported late: torch and open_clip take seconds, and --help should not.
    from milan_pipe.config import load_params

    return load_params(params, overrides or [])


def _plain(report: Any) -> dict[str, Any]:
    return {str(key): value for key, value in dataclasses.asdict(report).items()}


def _show(title: str, rows: dict[str, str], report: Any, as_json: bool) -> None:
    # `Text`, as paths may hold what rich takes for markup; a title of its own, as a table wraps it to its width.
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    _console.print(Text(title, style="bold"), soft_wrap=True)
    _console.print(table)
    if as_json:
        sys.stdout.write(json.dumps(_plain(report), ensure_ascii=False) + "\n")


@contextmanager
def _progress(*columns: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress line; call what it yields with `completed` and the values of `columns`."""
    parts = [TextColumn(f"{{task.fields[{name}]}}") for name in columns]
    with Progress(
        SpinnerColumn(),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        *parts,
        TimeRemainingColumn(compact=True),
        console=_console,
        transient=True,
    ) as bar:
        blank: dict[str, Any] = dict.fromkeys(columns, "")
        task = bar.add_task("", total=total, **blank)

        def update(completed: int, total: int | None = total, **fields: Any) -> None:
            bar.update(task, completed=completed, total=total, **fields)

        yield update


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="`demo`, or a folder of pictures.")],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder for the shards.")],
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
    with _progress() as update:
        report = commands.prepare(source, images, settings, on_progress=lambda done, total: update(done, total))
    rows = {"shards": str(report.shards), "pictures": str(report.samples), "size": _size(report.bytes)}
    rows["classes"] = str(len(report.classes)) if report.classes else "none"
    rows["set aside"] = str(len(report.bad)) + (f", see {images}/bad_samples.jsonl" if report.bad else "")
    _show(f"{source} -> {images}", rows, report, as_json)
    return report


@app.command("extract-targets")
def extract_targets(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", help="Folder of .tar shards, or shard paths with {000..127} braces or a glob."
        ),
    ],
    targets: Annotated[Path, typer.Argument(metavar="TARGETS", help="Folder of the target store.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Run the teacher once over all pictures and store its targets.

    Each picture gets views.count views (crop and flip). A view is rendered once, stored as JPEG, and the stored JPEG
    is what the teacher sees. The same command goes on after an interruption; shards that are whole are skipped.

    Example: milan-pipe extract-targets 'shards/train-{000000..000127}.tar' targets
    --set teacher.model=ViT-B-16 --set teacher.pretrained=openai --set student.image_size=224
    """
    from milan_pipe import commands
    from milan_pipe.extract.run import ExtractProgress

    settings = _settings(params, overrides)
    with _progress("shards", "rate", "bad") as update:
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
            )

        report = commands.extract_targets(images, targets, settings, on_progress=tell)
    rows = {
        "shards": f"{report.shards} ({report.skipped} were there)",
        "pictures": f"{report.samples} ({report.bad} set aside"
        + (f", see {targets}/bad_samples.jsonl)" if report.bad else ")"),
        "views": f"{report.views} in {report.seconds:.1f} s, {report.views_per_second:.1f} a second",
        "size": f"{_size(report.bytes)}, {_size(report.bytes_per_view)} a view",
        "codec": f"{settings.codec.name}, mean cosine "
        + (f"{report.mean_cosine:.7f}" if report.mean_cosine is not None else "not measured: nothing was done"),
    }
    _show(f"{images} -> {targets}", rows, report, as_json)
    return report


@app.command()
def pretrain(
    targets: Annotated[Path, typer.Argument(metavar="TARGETS", help="Folder of the target store.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder for checkpoints and metrics.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train the student on stored targets.

    The ablations of the method are settings: masking=random, decoder=plain, target=pixels.

    Example: milan-pipe pretrain targets run --set pretrain.epochs=100
    """
    from milan_pipe import commands
    from milan_pipe.pretraining import PretrainProgress

    settings = _settings(params, overrides)
    with _progress("epoch", "loss", "rate", "wait") as update:

        def tell(now: PretrainProgress) -> None:
            update(
                now.step,
                now.steps,
                epoch=f"epoch {now.epoch + 1}",
                loss=f"loss {now.loss:.4f}",
                rate=f"{now.images_per_second:.0f} img/s",
                wait=f"wait {100 * now.data_wait:.1f} %",
            )

        report = commands.pretrain(targets, run, settings, on_progress=tell)
    rows = {
        "steps": f"{report.steps} in {report.epochs} epochs, {report.seconds:.0f} s",
        "loss": f"{report.loss:.4f}, mean of the last epoch",
        "speed": f"{report.images_per_second:.0f} images a second",
        "data wait": f"{100 * report.data_wait:.1f} % of the time",
        "checkpoint": report.checkpoint,
    }
    _show(f"{targets} -> {run}", rows, report, as_json)
    return report


@app.command()
def knn(
    checkpoint: CheckpointArgument,
    train: TrainArgument,
    test: TestArgument,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Accuracy of a k-nearest-neighbour classifier on frozen features.

    Example: milan-pipe knn run 'images/train-*.tar' 'images/test-*.tar'
    """
    from milan_pipe import commands

    settings = _settings(params, overrides)
    with _progress() as update:
        report = commands.knn(checkpoint, train, test, settings, on_progress=update)
    rows = {f"k = {k}": f"{100 * accuracy:.2f} %" for k, accuracy in report.accuracy.items()}
    rows["pictures"] = f"{report.train} train, {report.test} test ({report.bad} set aside)"
    _show(f"k-NN of {report.subject}", rows, report, as_json)
    return report


@app.command("linear-probe")
def linear_probe(
    checkpoint: CheckpointArgument,
    train: TrainArgument,
    test: TestArgument,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Accuracy of a linear classifier on frozen features.

    Features are standardised; the strength of the regularisation is chosen on a held-out part of TRAIN.

    Example: milan-pipe linear-probe run 'images/train-*.tar' 'images/test-*.tar'
    """
    from milan_pipe import commands

    settings = _settings(params, overrides)
    with _progress() as update:
        report = commands.linear_probe(checkpoint, train, test, settings, on_progress=update)
    rows = {
        "accuracy": f"{100 * report.accuracy:.2f} %",
        "on train": f"{100 * report.train_accuracy:.2f} %",
        "l2": f"{report.l2:g}" + ("" if report.converged else " (not converged: raise linear_probe.max_iterations)"),
        "pictures": f"{report.train} train, {report.test} test ({report.bad} set aside)",
    }
    _show(f"linear probe of {report.subject}", rows, report, as_json)
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
    _console.print(f"zero-shot accuracy on unseen scenes {100 * result['zero_shot_accuracy']:.2f} %, weights in {out}")
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


def _fail(message: str) -> NoReturn:
    line = " ".join(message.splitlines())
    _console.print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)
    sys.exit(2)


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """End the process with one line and exit code 2 on a mistake of the user, 130 on Ctrl-C."""
    try:
        yield
    except MilanError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        _console.print("interrupted; what was committed stays", style="bold red")
        sys.exit(130)


def main() -> None:
    """Entry point of `milan-pipe`."""
    with errors_as_one_line():
        app()


if __name__ == "__main__":
    main()
