"""The command that writes features for other tools."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

import milan_pipe
from milan_pipe.cli.base import JsonOption, ParamsOption, SetOption, SubjectArgument, app
from milan_pipe.cli.console import progress, show


@app.command()
def embed(
    checkpoint: SubjectArgument,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="Shards (folder, braces or glob; labels are not needed), or a folder of class folders.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the embeddings; local, s3:// or gs://.")],
    patches: Annotated[bool, typer.Option("--patches", help="Write the embeddings of patches as well.")] = False,
    out_format: Annotated[
        str | None, typer.Option("--format", metavar="parquet|zarr", help="Of what is written (embed.format).")
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option("--shards", metavar="i/n", help="Do only every n-th shard, from number i on: for a batch queue."),
    ] = None,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Write embeddings of images, with keys and labels, to parquet or zarr.

    One file for each shard, OUT/000000.parquet: key, label (-1 for none), embedding, and with --patches patches.
    Section embed says what is embedded and how it is written (pool, crop, dtype). The same command goes on after an
    interruption. Images that cannot be read are skipped and listed in OUT/bad_samples.jsonl.

    Example: milan-pipe embed run images embeddings
    """
    given = [f"embed.format={out_format}"] if out_format is not None else []
    settings = milan_pipe.load_params(params, [*(overrides or []), *given])
    with progress("what", "images", "images_per_second", "bad") as update:
        began = time.monotonic()

        def on_progress(now: Any) -> None:
            speed = now.images / max(time.monotonic() - began, 1e-9)
            update(now.shards_done, now.shards, what="shards", images=now.images, images_per_second=speed, bad=now.bad)

        report = milan_pipe.embed(
            checkpoint, images, out, settings, patches=patches, shards=shards, on_progress=on_progress
        )
    listed = f", see {out}/bad_samples.jsonl" if report.bad else ""
    rows = {
        "shards": f"{report.shards} ({report.skipped} were there)" + ("" if report.complete else ", not all yet"),
        "images": f"{report.images} ({report.bad} skipped{listed})",
        "embedding": f"{report.width} x {settings.embed.dtype}, {settings.embed.pool}",
        "speed": f"{report.images_per_second:.1f} images a second",
    }
    if report.patches is not None:
        rows["patches"] = f"{report.patches[0]} x {report.patches[1]} an image"
    return show(f"{report.subject} -> {out}", rows, report, as_json)
