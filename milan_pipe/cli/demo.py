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
from milan_pipe.cli.console import console, plain
from milan_pipe.cli.evaluation import knn, linear_probe
from milan_pipe.cli.images import prepare
from milan_pipe.cli.pretraining import pretrain
from milan_pipe.cli.reports import report
from milan_pipe.cli.targets import extract_targets, verify_targets

_RECIPE = Path("demo")


def _print_command(*words: object) -> None:
    line = shlex.join(["milan-pipe", *map(str, words)])
    console.print(Text.assemble(("\n$ ", "dim"), plain(line, style="bold cyan")), soft_wrap=True)


def _run(command: Callable[..., Any], name: str, *arguments: object, words: tuple[str, ...] = (), **more: Any) -> Any:
    _print_command(name, *arguments, *words, "--params", _RECIPE)
    return command(*map(str, arguments), **more)


def _score(students: dict[str, str], train: str, test: str, kept: Path, features: Path) -> Table:
    table = Table("student", title="On unseen scenes of 12 shapes", title_justify="left", title_style="bold")
    for column in ("k-NN", "linear probe"):
        table.add_column(column, justify="right")
    where = ("--features", str(features), "--keep", str(kept))
    more = {"features": str(features), "keep": str(kept), "params": _RECIPE}
    for student, name in students.items():
        near = _run(knn, "knn", student, train, test, words=where, **more)
        linear = _run(linear_probe, "linear-probe", student, train, test, words=("--quick", *where), quick=True, **more)
        table.add_row(name, f"{100 * near.best:.1f} %", f"{100 * linear.accuracy:.1f} %")
    return table


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="All output goes there.")] = Path("milan-demo"),
) -> Any:
    """Run the whole pipeline small: every stage, in a few minutes, on a CPU.

    Takes the built-in scenes and teacher and the settings of recipe `demo`, and shows each command as you would type
    it. It ends with a table (untrained student, MILAN's, teacher) and the report, FOLDER/report.html.

    The same command goes on after an interruption.

    Example: milan-pipe demo
    """
    images, targets, kept = folder / "images", folder / "targets", folder / "evaluations"
    milan = folder / "milan"
    train, test = str(images / "train-*.tar"), str(images / "test-*.tar")
    if not (images / "index.json").is_file():
        _run(prepare, "prepare", "demo", images, params=_RECIPE)
    _run(extract_targets, "extract-targets", train, targets, params=_RECIPE)
    _run(verify_targets, "verify-targets", targets, params=_RECIPE)
    _run(pretrain, "pretrain", targets, milan, params=_RECIPE)
    students = {"random": "untrained student", str(milan): "MILAN student", "teacher": "teacher (upper bound)"}
    table = _score(students, train, test, kept, folder / "features")
    page = folder / "report.html"
    _print_command("report", milan, "--evaluations", kept, "--out", page)
    report([str(milan)], page, evaluations=[str(kept)])
    console.print()
    console.print(table)
    console.print(plain(f"\nEverything is in {folder}; look at {page}"), soft_wrap=True)
    return page
