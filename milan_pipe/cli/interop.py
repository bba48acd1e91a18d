"""Commands that give weights to other tools and take them from there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import milan_pipe
from milan_pipe.cli.base import CheckpointArgument, JsonOption, app
from milan_pipe.cli.console import show
from milan_pipe.units import size, some


@app.command()
def export(
    checkpoint: CheckpointArgument,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="New folder for model.safetensors, config.json and a card.")
    ],
    as_json: JsonOption = False,
) -> Any:
    """Write the student as timm reads it, from a folder or from its hub.

    The weights have timm's own names, so that any tool that builds on timm can fine-tune them. The decoder is left out.
    Of a run of finetune the classifier is part of it; RUN/best names the best weights. README.md is its card: teacher,
    data, recipe, and the scores that are kept in the run.

    Example: milan-pipe export run vit-milan
    """
    report = milan_pipe.export(checkpoint, out)
    sizes = "".join(f", {name}={value!r}" for name, value in report.model_args.items())
    rows = {
        "parameters": f"{report.parameters:,}",
        "step": str(report.step),
        "by folder": f"timm.create_model('local-dir:{report.folder}', pretrained=True)",
        "by name": f"timm.create_model('{report.model}'{sizes}, num_classes={report.classes}, "
        f"checkpoint_path='{report.weights}')",
    }
    return show(f"{checkpoint} -> {out}", rows, report, as_json)


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Run, checkpoint, folder that `export` wrote, or target store.")
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="For its owners only.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Default: the main branch.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="Of what is pushed, as the hub names it: apache-2.0."),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--scores",
            metavar="RUN",
            help="Run that began with this student, for the card; may be given several times.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card, list the files, ask no network.")] = False,
    as_json: JsonOption = False,
) -> Any:
    """Upload a student or a target store to a model hub, with a card.

    A student becomes a repository of a model, which timm loads by hf-hub:ORG/NAME; a store one of a dataset, which
    commands read as hf://datasets/ORG/NAME. The card says data, teacher and its licence, recipe, and scores with the
    commands that give them; it leaves out where on this machine things lie. The token comes from HF_TOKEN or from
    `hf auth login`.

    Example: milan-pipe push run ORG/vit-milan --scores tuned --dry-run
    """
    report = milan_pipe.push(
        source,
        repository,
        private=private,
        revision=revision,
        license=license,
        scores=scores or (),
        dry_run=dry_run,
    )
    if dry_run and not as_json:
        sys.stdout.write(report.card)
    most = sorted(report.files, key=lambda path: -report.files[path])
    rows = {
        "repository": report.url,
        "files": f"{len(most)}, {size(sum(report.files.values()))}: {some(most)}",
        "commit": report.commit or "none, as this was a dry run",
    }
    if report.kind == "model":
        rows["load"] = f"timm.create_model('hf-hub:{repository}', pretrained=True)"
    else:
        rows["read"] = f"milan-pipe pretrain hf://datasets/{repository}{f'@{revision}' if revision else ''} RUN"
    return show(f"{source} -> {repository}", rows, report, as_json)


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
    report = milan_pipe.import_published(
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
    return show(f"{file} -> {out}", rows, report, as_json)
