"""Commands that come before any work: images into shards, recipes, a plan."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import milan_pipe
from milan_pipe.cli.base import JsonOption, ParamsOption, SetOption, app, as_typed
from milan_pipe.cli.console import print_json, print_labelled, progress, results_on, show
from milan_pipe.errors import SettingError
from milan_pipe.units import size


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="`demo`, a folder of images, parquet files, or a list.")
    ],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Local folder for the shards.")],
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Pack images into webdataset shards with an index.

    SOURCE `demo` renders the built-in captioned scenes (splits train and test). A folder may be flat, hold one
    subfolder per class, or hold train/ val/ test/ folders of either kind. Parquet files (a folder of them, a glob, a
    URL) have bytes of images, as the hub's datasets do; or they are lists, as CSV and TSV files: a column of paths or
    URLs, and labels and captions where there are. Images are stored as they are.

    Example: milan-pipe prepare ~/photos data/images
    """
    settings = milan_pipe.load_params(params, overrides or ())
    with progress() as update:
        report = milan_pipe.prepare(source, images, settings, on_progress=update)
    rows = {"shards": str(report.shards), "images": str(report.samples), "size": size(report.bytes)}
    rows["classes"] = str(len(report.classes)) if report.classes else "none"
    rows["skipped"] = str(report.bad) + (f", see {images}/bad_samples.jsonl" if report.bad else "")
    return show(f"{source} -> {images}", rows, report, as_json)


@app.command()
def recipes(as_json: JsonOption = False) -> Any:
    """List the recipes that ship with the package: what each is for, on what, how long, and what comes out.

    A recipe is a params file: any command takes its name, as in --params imagenet1k-vit-b-16, and --set changes it.
    """
    from milan_pipe.config.params import load_params
    from milan_pipe.config.recipes import recipe_names

    found = {name: about for name in recipe_names() if (about := load_params(name).about) is not None}
    for name, about in found.items():
        rows = {
            "what": about.summary,
            "commands": "\n".join(about.commands),
            "hardware": about.hardware,
            "time": f"{about.time} ({about.time_source})",
            "score": f"{about.score} ({about.score_source})" if about.score_source != "none" else about.score,
        }
        show(name, rows, None, as_json)
    if as_json:
        print_json(found)
    return found


@app.command()
def plan(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES [TARGETS]",
            default_factory=list,
            help="What extract-targets would be given: shards, local or a URL (not with --views-from). Where the "
            "targets are meant to lie: its free disk is looked at.",
        ),
    ],
    views_from: Annotated[
        str | None,
        typer.Option(
            "--views-from",
            metavar="STORE",
            help="In place of IMAGES: plan another teacher's targets of this store's views, and pretraining on both.",
        ),
    ] = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=1, help="Images to measure with, spread over the shards.")
    ] = 64,
    total: Annotated[
        int | None,
        typer.Option(
            "--total",
            metavar="N",
            min=1,
            help="Plan for N images like these, in shards of prepare.samples_per_shard; IMAGES are then a sample.",
        ),
    ] = None,
    devices: Annotated[int, typer.Option("--devices", metavar="N", min=1, help="Devices for both stages.")] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops",
            metavar="X",
            min=0.001,
            help="TFLOP/s that a device sustains: hours come from counted arithmetic and not from this machine's "
            "speed; extract.threads is then the processors beside a device.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> Any:
    """Say what extraction and pretraining will take, before anything is spent.

    Counts the images, runs teacher, codecs, store, student and loader on a few of them, and extrapolates: size of the
    store, hours, hours saved against a teacher in every step, load of a cluster's scheduler and of a node, and what
    gives in first. Nothing is left behind.

    Images and devices need not be here: --total and --tflops plan for those of somewhere else.

    --views-from STORE [TARGETS] plans a second teacher.

    Example: milan-pipe plan images targets --total 1000000 --devices 64
    """
    from milan_pipe.planning.tables import recipe_rows, rows, store_table

    images = None if views_from is not None else next(iter(places), None)
    targets, *more = [*places[images is not None :], None]
    if (images is None and views_from is None) or len(more) > 1:
        words = as_typed(views_from, places)
        raise SettingError(f"expected IMAGES [TARGETS], or --views-from STORE [TARGETS]; found {words or 'neither'}")
    settings = milan_pipe.load_params(params, overrides or ())
    with progress("what") as update:
        report = milan_pipe.plan(
            images,
            targets,
            settings,
            views_from=views_from,
            sample=sample,
            total=total,
            devices=devices,
            tflops=tflops,
            on_progress=lambda now: update(now.done, now.total, what=now.what),
        )
    results_on(as_json).print(store_table(report))
    show(
        f"{images or views_from} -> {report.space.folder}",
        {**recipe_rows(settings.about), **rows(report)},
        report,
        as_json,
    )
    for line in report.warnings:
        print_labelled("warning", "bold yellow", line)
    return report
