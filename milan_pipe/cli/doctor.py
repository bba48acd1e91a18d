"""What the machine has to work with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

import milan_pipe
from milan_pipe.cli.base import JsonOption, app
from milan_pipe.cli.console import plain, print_labelled, results_on, show
from milan_pipe.units import size


def _listed(packages: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()) or "unknown"


@app.command()
def doctor(
    locations: Annotated[
        list[str] | None, typer.Argument(metavar="[LOCATION...]", help="Folders or URLs to check.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Also write a small file to each location, and remove it.")
    ] = False,
    as_json: JsonOption = False,
) -> Any:
    """Report what this machine has to work with, and whether locations can be reached.

    Versions by extra, devices with their memory, the codec pipeline, the params file in use, and for each LOCATION what
    is there, free disk, and problems. Exit code 1 if there are any.

    Example: milan-pipe doctor . s3://bucket/targets --write
    """
    report = milan_pipe.doctor(locations or (), write=write)
    rows = {
        "python": report.python,
        "system": report.system,
        "milan-pipe": report.version,
        **{
            "packages" if extra == "core" else f"extra {extra}": _listed(found)
            for extra, found in report.packages.items()
        },
        "threads": str(report.threads),
        "memory": size(report.memory),
        **{
            device.name: f"{device.what}, {size(device.memory)}"
            + ("" if device.bfloat16 is None else f", bfloat16 {'yes' if device.bfloat16 else 'no'}")
            for device in report.devices
        },
        "zarr codecs": report.pipeline,
        "params": report.params or "built in: no params.yaml here",
    }
    if report.locations:
        table = Table("location", "found", "free")
        for check in report.locations:
            free = size(check.free_bytes) if check.free_bytes is not None else "-"
            table.add_row(*(plain(text, overflow="fold") for text in (check.location, check.found, free)))
        results_on(as_json).print(table)
    show("doctor", rows, report, as_json)
    for problem in report.problems:
        print_labelled("problem", "bold red", problem)
    if report.problems:
        raise typer.Exit(1)
    return report
