"""Commands that show what was extracted and what was learned."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from milan_pipe.cli.base import JsonOption, ParamsOption, SetOption, app, read_settings
from milan_pipe.terminal import progress, show

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="Local folder for index.html and the PNGs.")]
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
    targets: Annotated[str, typer.Argument(metavar="TARGETS", help="Folder or URL of the target store.")],
    out: OutArgument,
    keys: KeysOption = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many samples.")] = 4,
    epoch: EpochOption = 0,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Draw what is stored of a few samples.

    All views of each, with the teacher's CLS attention over them, the patches that a student would see, and the patch
    features as colours: their three principal components over all that is drawn, so that one colour is one meaning.
    Masks are those of a run with the same settings (section masking).

    OUT/index.html is one page with all pictures in it, OUT/KEY.png one picture for each sample.

    Example: milan-pipe inspect-targets targets looks --keys train-000000,train-000017
    """
    from milan_pipe import commands

    settings = read_settings(params, overrides)
    with progress("what") as update:
        report = commands.inspect_targets(
            targets,
            out,
            settings,
            keys=_keys(keys),
            count=count,
            epoch=epoch,
            on_progress=lambda done, total: update(done, total, what="samples"),
        )
    rows = {"page": report.page, "pictures": f"{len(report.pictures)}, {report.views} views each"}
    show(f"{targets} -> {out}", rows, report, as_json)
    return report


@app.command("inspect-student")
def inspect_student(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, or run folder (its last checkpoint).")
    ],
    targets: Annotated[str, typer.Argument(metavar="TARGETS", help="Targets of the teacher that it learned from.")],
    out: OutArgument,
    keys: KeysOption = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many samples.")] = 8,
    epoch: EpochOption = 0,
    view: Annotated[int, typer.Option("--view", metavar="N", min=0, help="Which view of each.")] = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: JsonOption = False,
) -> Any:
    """Draw what a student predicts of a few samples, beside what it should have.

    A view, what the student saw of it, target and prediction in the same colours (principal components of the targets
    drawn), and the cosine between them of each patch. Masks are those of its own run.

    OUT/index.html is one page with all pictures in it, OUT/KEY.png one picture for each sample.

    Example: milan-pipe inspect-student run targets looks --count 16
    """
    from milan_pipe import commands

    with progress("what") as update:
        report = commands.inspect_student(
            checkpoint,
            targets,
            out,
            keys=_keys(keys),
            count=count,
            epoch=epoch,
            view=view,
            device=device,
            on_progress=lambda done, total: update(done, total, what="samples"),
        )
    number = len(report.keys)
    rows = {
        "page": report.page,
        "pictures": f"{len(report.pictures)}, after step {report.step}",
        "cosine": f"{sum(report.cosine) / number:.4f}, of hidden patches {sum(report.masked_cosine) / number:.4f}",
    }
    show(f"{checkpoint}, {targets} -> {out}", rows, report, as_json)
    return report
