"""Commands of the documentation: where they stand, whether they are marked, and how one is run as the shell would."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from milan_pipe.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
_MARKED_PAGE = '!!! warning "Needs other hardware"'


@dataclass(frozen=True)
class Block:
    """A fenced block; `needs`: the line before it that says what it needs and other machines lack, or nothing."""

    kind: str
    text: str
    needs: str


def blocks(page: Path, *kinds: str) -> list[Block]:
    """Blocks of these kinds, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        needs = _MARKED_PAGE if _MARKED_PAGE in text else before if before.startswith("*Needs ") else ""
        if match[1] in kinds:
            found.append(Block(match[1], match[2], needs))
    return found


def shell_lines(text: str) -> list[str]:
    """Commands of a block: continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def commands(page: Path) -> list[str]:
    """Lines of a page's shell blocks that are not marked."""
    return [line for block in blocks(page, "console", "bash") if not block.needs for line in shell_lines(block.text)]


def run(line: str) -> None:
    """Run one `milan-pipe` line in this process, with the home folder, variables and `> file` as a shell has them."""
    words = [
        os.path.expandvars(Path(word).expanduser() if word.startswith("~") else word) for word in shlex.split(line)
    ]
    assert words[0] == "milan-pipe", line
    target = None
    if ">" in words:
        target, words = words[words.index(">") + 1], words[: words.index(">")]
    group: Any = typer.main.get_command(app)
    with contextlib.ExitStack() as stack:
        if target is not None:
            file = stack.enter_context(Path(target).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        group(words[1:], standalone_mode=False)
