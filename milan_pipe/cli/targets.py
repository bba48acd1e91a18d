"""Commands that train a teacher, and write, check and convert targets."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import milan_pipe
from milan_pipe.cli.base import JsonOption, ParamsOption, SetOption, TargetsArgument, app, as_typed
from milan_pipe.cli.console import plain, progress, results_on, show
from milan_pipe.errors import SettingError
from milan_pipe.units import size

_MOST_PROBLEMS = 50


@app.command("extract-targets")
def extract_targets(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="[IMAGES]",
            default_factory=list,
            help="Folder of .tar shards, or shard paths with {000..127} braces or a glob; local or a URL. Not with "
            "--views-from.",
        ),
    ],
    targets: Annotated[
        str, typer.Argument(metavar="TARGETS", help="Folder of the target store; local, s3:// or gs://.")
    ],
    views_from: Annotated[
        str | None,
        typer.Option(
            "--views-from",
            metavar="STORE",
            help="In place of IMAGES: another teacher's targets of them, whose stored views the teacher sees.",
        ),
    ] = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    store_format: Annotated[
        str | None, typer.Option("--format", metavar="zarr|webdataset", help="Format of the store (extract.format).")
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="N|auto",
            help="Processes of a Dask cluster on this machine; auto: as many as its GPUs are fed by (extract.workers).",
        ),
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
    """Run the teacher once over all images and store its targets.

    Each image gets views.count views (crop and flip). A view is rendered once, stored as JPEG, and the stored JPEG
    is what the teacher sees. The same command goes on after an interruption; shards that are whole are skipped. A shard
    that cannot be done is reported at the end, when all others are committed, and the exit code is not 0.

    A second teacher of the same views needs no images: extract-targets --views-from targets-a targets-b. Size, grid and
    settings of views are those of the first store; the targets are those that the images would have given.

    Example: milan-pipe extract-targets images targets
    """
    from milan_pipe.extraction.run import ExtractProgress

    if len(images) != (views_from is None):
        words = as_typed(views_from, [*images, targets])
        raise SettingError(f"expected IMAGES TARGETS, or --views-from STORE TARGETS; found {words}")
    source = images[0] if views_from is None else views_from
    flags = {"format": store_format, "workers": workers, "scheduler": scheduler}
    given = [f"extract.{name}={value}" for name, value in flags.items() if value is not None]
    settings = milan_pipe.load_params(params, [*(overrides or []), *given])
    with progress("what", "views", "views_per_second", "bad", "workers") as update:
        began: float | None = None

        def on_progress(now: ExtractProgress) -> None:
            nonlocal began
            if began is None:  # reported first when the teacher is loaded
                began = time.monotonic()
            update(
                now.shards_done,
                now.shards,
                what="shards",
                views=now.views,
                views_per_second=now.views / max(time.monotonic() - began, 1e-9),
                bad=now.bad,
                workers=now.workers,
            )

        report = milan_pipe.extract_targets(
            images[0] if images else None,
            targets,
            settings,
            shards=shards,
            redo=redo.split(",") if redo else (),
            verify_sources=verify_sources,
            views_from=views_from,
            on_progress=on_progress,
        )
    rows = {
        "shards": f"{report.shards} ({report.skipped} were there)" + ("" if report.complete else ", not all yet"),
        "images": f"{report.samples} ({report.bad} skipped"
        + (f", see {targets}/bad_samples.jsonl)" if report.bad and report.complete else ")"),
        "views": f"{report.views} in {report.seconds:.1f} s, {report.views_per_second:.1f} a second",
        "size": f"{size(report.bytes)}, {size(report.bytes_per_view)} a view",
        "codec": f"{settings.codec.name}, mean cosine "
        + (f"{report.mean_cosine:.7f}" if report.mean_cosine is not None else "not measured: nothing was done"),
    }
    return show(f"{source} -> {targets}", rows, report, as_json)


@app.command("verify-targets")
def verify_targets(
    targets: TargetsArgument,
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
    that occur once; counts. Exit code 1 and a table of what is wrong, with the command that repairs it, else 0.

    Example: milan-pipe verify-targets targets --against-teacher 8
    """
    settings = milan_pipe.load_params(params, overrides or ())
    with progress(what="shards") as update:
        report = milan_pipe.verify_targets(targets, settings, against_teacher=against_teacher, on_progress=update)
    rows = {
        "shards": str(report.shards),
        "views": f"{report.views} of {report.samples} images",
        "files": f"{report.files}, {size(report.bytes)}",
        "problems": str(len(report.problems)) if report.problems else "none",
    }
    tables = results_on(as_json)
    if report.problems:
        table = Table("shard", "array", "found")
        for problem in report.problems[:_MOST_PROBLEMS]:
            table.add_row(*(plain(part, overflow="fold") for part in (problem.shard, problem.array, problem.what)))
        tables.print(table)
        if len(report.problems) > _MOST_PROBLEMS:
            tables.print(f"and {len(report.problems) - _MOST_PROBLEMS} more: see --json")
    show(targets, rows, report, as_json)
    if report.problems:
        # One line each, however long, so that they can be copied.
        tables.print(Text("repair with, IMAGES (or --views-from STORE), settings as they were:", style="bold"))
        for command in report.repair:
            tables.print(plain(f"  {command}"), soft_wrap=True)
        raise typer.Exit(1)
    return report


@app.command("convert-targets")
def convert_targets(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or URL of the store that is there.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder or URL of the new store.")],
    store_format: Annotated[str, typer.Option("--format", metavar="zarr|webdataset", help="Format of the new store.")],
    zstd_level: Annotated[
        int | None,
        typer.Option("--zstd-level", min=0, max=19, metavar="0..19", help="Of its codes, 0: as they are; else SRC's."),
    ] = None,
    redo: Annotated[
        str | None, typer.Option("--redo", metavar="NAME,...", help="Write these shards again, as 000123.")
    ] = None,
    as_json: JsonOption = False,
) -> Any:
    """Write a store again in either format, without the teacher and without loss; also one of an earlier schema.

    Example: milan-pipe convert-targets targets s3://bucket/targets --format webdataset
    """
    from milan_pipe.config.extraction import ExtractSettings

    wanted = ExtractSettings.parse({"format": store_format}, "--format").format
    with progress(what="shards") as update:
        report = milan_pipe.convert_targets(
            source,
            destination,
            format=wanted,
            zstd_level=zstd_level,
            redo=redo.split(",") if redo else (),
            on_progress=update,
        )
    rows = {
        "shards": f"{report.shards} ({report.skipped} were there)",
        "images": str(report.samples),
        "size": size(report.bytes),
    }
    return show(f"{source} -> {destination}", rows, report, as_json)


@app.command("train-clip")
def train_clip(
    images: Annotated[
        str,
        typer.Argument(metavar="IMAGES", help="Captioned shards: a .txt with one caption a line beside each image."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the model, as teacher.model=local-dir:OUT.")],
    val: Annotated[
        str | None,
        typer.Option("--val", metavar="VAL", help="Labelled shards, told by clip.prompts: nothing is chosen."),
    ] = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train a small CLIP from images and captions, to be a teacher where none fits.

    On the CPU, with all images in memory (section clip). The bundled teacher was made by it; docs/scenes.md has the
    commands. Labels are not used.

    Example: milan-pipe train-clip 'images/train-*.tar' own-clip --val 'images/test-*.tar'
    """
    settings = milan_pipe.load_params(params, overrides or ())
    with progress("what", "loss", "images_per_second", "zero_shot") as update:

        def on_progress(now: Any) -> None:
            told = {"loss": now.loss, "images_per_second": now.images_per_second, "zero_shot": now.zero_shot}
            update(now.step, now.steps, **(told | {"what": ""} if now.step else {"what": "reading images"}))

        report = milan_pipe.train_clip(images, out, settings, val=val, on_progress=on_progress)
    rows = {
        "images": f"{report.images:,} with {report.captions:,} different captions ({report.bad} skipped)",
        "words": f"{report.words:,}",
        "parameters": f"{report.parameters:,}",
        "seen": f"{report.images_seen:,} images in {report.seconds:.0f} s",
        "zero-shot": "not measured: no --val" if report.zero_shot is None else f"{100 * report.zero_shot:.2f} %",
    }
    return show(f"{images} -> {out}", rows, report, as_json)
