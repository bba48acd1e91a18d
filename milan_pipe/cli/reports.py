"""Commands that show what was extracted and what was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import milan_pipe
from milan_pipe.cli.base import (
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    ParamsOption,
    SetOption,
    TargetsArgument,
    app,
)
from milan_pipe.cli.console import progress, show
from milan_pipe.errors import DataError, MissingError, one_line
from milan_pipe.storage.local import read_regular
from milan_pipe.units import size

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="Local folder for index.html and the PNGs.")]
CountOption = Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many samples.")]
KeysOption = Annotated[
    str | None, typer.Option("--keys", metavar="KEY,...", help="Samples to draw; default: --count of them, spread.")
]
EpochOption = Annotated[
    int, typer.Option("--epoch", metavar="N", min=0, help="Draw the masks of this epoch, counted from 0.")
]


def _keys(text: str | None) -> tuple[str, ...]:
    return tuple(key for key in (text or "").split(",") if key)


@app.command("inspect-targets")
def inspect_targets(
    targets: TargetsArgument,
    out: OutArgument,
    keys: KeysOption = None,
    count: CountOption = 4,
    epoch: EpochOption = 0,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Draw what is stored of a few samples.

    All views of each, with the teacher's CLS attention over them, the patches that a student would see, and the patch
    features as colours: their three principal components over all that is drawn, so that one colour is one meaning.
    Masks are those of a run with the same settings (section masking).

    OUT/index.html is one page with all images in it, OUT/KEY.png one image for each sample.

    Example: milan-pipe inspect-targets targets looks --keys scene-0000000003,scene-0000000017
    """
    settings = milan_pipe.load_params(params, overrides or ())
    with progress(what="samples") as update:
        report = milan_pipe.inspect_targets(
            targets, out, settings, keys=_keys(keys), count=count, epoch=epoch, on_progress=update
        )
    rows = {"page": report.page, "images": f"{len(report.images)}, {report.views} views each"}
    return show(f"{targets} -> {out}", rows, report, as_json)


@app.command("inspect-student")
def inspect_student(
    checkpoint: CheckpointArgument,
    targets: Annotated[str, typer.Argument(metavar="TARGETS", help="Targets of the teacher that it learned from.")],
    out: OutArgument,
    keys: KeysOption = None,
    count: CountOption = 8,
    epoch: EpochOption = 0,
    view: Annotated[int, typer.Option("--view", metavar="N", min=0, help="Which view of each.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> Any:
    """Draw what a student predicts of a few samples, beside what it should have.

    A view, what the student saw of it, target and prediction in the same colours (principal components of the targets
    drawn), and the cosine between them of each patch. Masks are those of its own run.

    OUT/index.html is one page with all images in it, OUT/KEY.png one image for each sample.

    Example: milan-pipe inspect-student run targets looks --count 16
    """
    with progress(what="samples") as update:
        report = milan_pipe.inspect_student(
            checkpoint,
            targets,
            out,
            keys=_keys(keys),
            count=count,
            epoch=epoch,
            view=view,
            device=device,
            on_progress=update,
        )
    number = len(report.keys)
    rows = {
        "page": report.page,
        "images": f"{len(report.images)}, after step {report.step}",
        "cosine": f"{sum(report.cosine) / number:.4f}, of hidden patches {sum(report.masked_cosine) / number:.4f}",
    }
    return show(f"{checkpoint}, {targets} -> {out}", rows, report, as_json)


def _extraction(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(read_regular(file))
    except FileNotFoundError:
        raise MissingError(f"--extraction {file} is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--extraction {file} cannot be read: {one_line(error)}") from error
    return values


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs: pretrain, finetune, segment, linear-probe.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("report.html"),
    targets: Annotated[
        str | None, typer.Option("--targets", metavar="TARGETS", help="Default: those that each run was trained on.")
    ] = None,
    evaluations: Annotated[
        list[str] | None,
        typer.Option("--evaluations", metavar="FOLDER", help="What --keep was given; may be named several times."),
    ] = None,
    extraction: Annotated[
        Path | None,
        typer.Option("--extraction", metavar="FILE", help="What extract-targets --json printed: where time went."),
    ] = None,
    as_json: JsonOption = False,
) -> Any:
    """Write one page about one run, or several side by side.

    Settings and where they differ, loss curves together, speed, the store (bytes, fidelity of the codec, images
    skipped), every score with the command that makes it again, images of targets, predictions and segmentations. The
    page holds all of it: it can be mailed, and asks no network.

    Scores of knn, linear-probe and segment-probe are found in the runs that they were given; runs of finetune, segment
    and linear-probe are named beside those that they began with.

    Example: milan-pipe report run mae tuned segmented --out report.html
    """
    timings = _extraction(extraction) if extraction is not None else None
    with progress(what="runs") as update:
        written = milan_pipe.report(
            runs, out, targets=targets, evaluations=evaluations or (), extraction=timings, on_progress=update
        )
    rows = {"page": written.page, "size": size(written.bytes), "runs": ", ".join(written.runs)}
    return show("report", rows, written, as_json)
