"""The whole pipeline with one command, command by command."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from milan_pipe.cli.base import app
from milan_pipe.cli.console import plain, results
from milan_pipe.cli.evaluation import knn, linear_probe
from milan_pipe.cli.images import prepare
from milan_pipe.cli.pretraining import pretrain
from milan_pipe.cli.reports import report
from milan_pipe.cli.targets import extract_targets, verify_targets
from milan_pipe.config.subjects import BOUNDS, MILAN, RANDOM, TEACHER, UNTRAINED
from milan_pipe.errors import MissingError
from milan_pipe.extras import needs

_RECIPE = Path("demo")


def _print_command(*words: object) -> None:
    line = shlex.join(["milan-pipe", *map(str, words)])
    results.print(Text.assemble(("\n$ ", "dim"), plain(line, style="bold cyan")), soft_wrap=True)


def _run(command: Callable[..., Any], *arguments: object, **options: Any) -> Any:
    flags = [word for name, value in options.items() for word in (f"--{name}", value) if word is not True]
    words = [word for one in arguments for word in (one if isinstance(one, list) else [one])]
    _print_command(command.__name__.replace("_", "-"), *words, *flags)
    return command(*([*map(str, one)] if isinstance(one, list) else str(one) for one in arguments), **options)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="All output goes there.")] = Path("milan-demo"),
) -> Any:
    """Run the whole pipeline small: every stage, in a few minutes, on a CPU.

    Takes the built-in scenes and teacher and the settings of recipe `demo`, and shows each command as you would type
    it. It ends with a table (untrained student, MILAN's, teacher) and, where extra `report` is installed, the report,
    FOLDER/report.html.

    The same command goes on after an interruption.

    Example: milan-pipe demo
    """
    images, targets, kept = folder / "images", folder / "targets", folder / "evaluations"
    milan = folder / "milan"
    train, test = str(images / "train-*.tar"), str(images / "test-*.tar")
    if not (images / "index.json").is_file():
        _run(prepare, "demo", images, params=_RECIPE)
    _run(extract_targets, [train], targets, params=_RECIPE)
    _run(verify_targets, targets, params=_RECIPE)
    _run(pretrain, [targets], milan, params=_RECIPE)
    students = {RANDOM: UNTRAINED, str(milan): MILAN, TEACHER: BOUNDS[TEACHER]}
    table = Table("student", title="On unseen scenes of 12 things", title_justify="left", title_style="bold")
    for column in ("k-NN", "linear probe"):
        table.add_column(column, justify="right")
    options = {"features": str(folder / "features"), "keep": str(kept), "params": _RECIPE}
    for student, name in students.items():
        near = _run(knn, student, train, test, **options)
        linear = _run(linear_probe, student, train, test, quick=True, **options)
        table.add_row(name, f"{100 * near.best:.1f} %", f"{100 * linear.accuracy:.1f} %")
    page = folder / "report.html"
    try:
        with needs("report", str(page)):
            import matplotlib  # noqa: F401
    except MissingError as missing:
        results.print(plain(f"\nwithout a report: {missing}"), soft_wrap=True)
        look = ""
    else:
        _print_command("report", milan, "--evaluations", kept, "--out", page)
        report([str(milan)], page, evaluations=[str(kept)])
        look = f"; look at {page}"
    results.print()
    results.print(table)
    results.print(plain(f"\nEverything is in {folder}{look}"), soft_wrap=True)
    return page
