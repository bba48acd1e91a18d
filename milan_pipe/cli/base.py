"""The application that commands are added to, the options that they share, and how settings are read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from milan_pipe import __version__
from milan_pipe.cli import json_log
from milan_pipe.cli.console import as_command, errors_as_one_line
from milan_pipe.errors import SettingError, printable

# Newer versions of typer bring their own.
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        # It quotes what was given, which may be a URL with a password.
        error.message = printable(error.message)
        if "unexpected extra argument" in error.message and ".tar" in error.message:
            error.message += " Quote a pattern, as 'images/train-*.tar', or the shell names every file."
        if json_log.wanted():
            # Without a command it has no message: it shows the help.
            found = error.format_message().rstrip(".") or "No command was given"
            raise SettingError(f"{found}; see `{error.ctx.command_path} --help`") from None
        raise


class _Commands(typer.core.TyperGroup):
    """Commands whose errors are one line; outside of them typer turns Ctrl-C into silence."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with errors_as_one_line(), _usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="milan-pipe",
    cls=_Commands,
    help="Pretrain vision transformers on stored CLIP features.\n\n"
    "Stage 1 (extract-targets) runs a CLIP image tower over your images once and stores patch features, attention "
    "and rendered views. Stage 2 (pretrain) trains a masked student on them, with no teacher in memory.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def as_typed(views_from: str | None, places: Sequence[str]) -> str:
    """`--views-from` and places of a command, as one would type them."""
    return shlex.join([*(["--views-from", views_from] if views_from is not None else []), *places])


def _complete_params(incomplete: str) -> list[str]:
    from milan_pipe.config.recipes import recipe_names

    files = [str(path) for path in Path().glob("*.yaml")]
    return [name for name in [*recipe_names(), *files] if name.startswith(incomplete)]


ParamsOption = Annotated[
    Path | None,
    typer.Option(
        "--params",
        metavar="FILE",
        autocompletion=_complete_params,
        help="Settings in YAML, or a recipe's name. Default: ./params.yaml if there, else built in.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given several times."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object with the results as the last line.")]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1.")]
TargetsArgument = Annotated[str, typer.Argument(metavar="TARGETS", help="Folder or URL of the target store.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Local folder for checkpoints and metrics.")]
_CHECKPOINT = "Checkpoint folder, or run folder (its last checkpoint)"
CheckpointArgument = Annotated[str, typer.Argument(metavar="CHECKPOINT", help=f"{_CHECKPOINT}.")]
StudentArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help=f"{_CHECKPOINT}, or `random` (untrained student).")
]
SubjectArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help=f"{_CHECKPOINT}, `random` (untrained student), `teacher`, `timm:NAME`, `timm:hf-hub:ORG/NAME`, or a "
        "folder in timm's layout, as of `export`.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"milan-pipe {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json",
            help="Tell progress, warnings, errors and the report on stderr as one JSON object a line "
            "(or set MILAN_PIPE_LOG_JSON=1).",
        ),
    ] = False,
) -> None:
    del version, log_json
    json_log.command = ctx.invoked_subcommand or ""


def main() -> None:
    """Entry point of `milan-pipe`."""
    with json_log.asked_by(sys.argv[1:]), as_command():
        app()
