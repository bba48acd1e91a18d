"""Self-contained HTML pages: one file, no script, nothing fetched from a network."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from milan_pipe import __version__
from milan_pipe.drawing.sheet import data_url, one_line
from milan_pipe.extras import needs

with needs("report", "writing a page"):
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup


def _printable(value: Any) -> Any:
    """Text with its line breaks, other characters that do not print escaped; other values as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(one_line, value.split("\n")))


@cache
def _environment() -> Environment:
    templates = files("milan_pipe.drawing") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_url": data_url, "one_line": one_line}
    return environment


def render(template: str, **values: Any) -> str:
    """The page of a template in `drawing/templates`; values are escaped."""
    return _environment().get_template(template).render(version=__version__, **values)
