"""Self-contained HTML pages: one file, no script, nothing that is fetched."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from milan_pipe import __version__
from milan_pipe.drawing.sheet import one_line
from milan_pipe.errors import StoreError


def _template(name: str) -> str:
    return (files("milan_pipe.drawing") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Text with its line breaks, and what else does not print escaped; all but text as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(one_line, value.split("\n")))


def render(template: str, **values: Any) -> str:
    """The page of a template in `drawing/templates`; what is put in is escaped, and shown where it does not print."""
    return _environment().get_template(template).render(version=__version__, **values)


def write_page(file: Path, text: str) -> None:
    """Write a page, its folder too.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror or error}; choose another place") from error
