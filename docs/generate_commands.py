"""Writes docs/commands.md from the command line itself: `python docs/generate_commands.py`."""

from inspect import cleandoc
from pathlib import Path

import typer.main

from milan_pipe.cli import app


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def commands_page() -> str:
    """The page, from the commands' own help."""
    group = typer.main.get_command(app)
    lines = ["# Commands", "", "Written by `docs/generate_commands.py` from the command line's own help.", ""]
    lines += ["Before a command, as in `milan-pipe --log-json knn ...`:", "", "| | |", "|---|---|"]
    own = [part for part in group.params if part.opts[0] in ("--version", "--log-json")]
    lines += [f"| `{part.opts[0]}` | {_cell(part.help or '')} |" for part in own] + [""]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        arguments = [part for part in command.params if part.param_type_name == "argument"]
        options = [part for part in command.params if part.param_type_name == "option" and part.name != "help"]
        shown = " ".join(
            [part.metavar or part.name.upper() for part in arguments]
            + [f"{part.opts[0]} {part.metavar}" for part in options if part.required]
        )
        lines += [f"## {name}", "", "```text", f"milan-pipe {name} {shown}".rstrip(), "```", ""]
        text, _, example = cleandoc(command.help or "").partition("Example: ")
        lines += [text.rstrip(), ""]
        if example:
            lines += ["```console", " ".join(example.split()), "```", ""]
        lines += ["| | |", "|---|---|"]
        lines += [f"| `{part.metavar or part.name.upper()}` | {_cell(part.help or '')} |" for part in arguments]
        for part in options:
            words = [*part.opts, *([part.metavar] if part.metavar and not part.is_flag else [])]
            lines.append(f"| `{_cell(' '.join(words))}` | {_cell(part.help or '')} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "commands.md").write_text(commands_page(), encoding="utf-8")
