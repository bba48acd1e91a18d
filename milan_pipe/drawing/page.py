"""Self-contained HTML pages: one file, no script, nothing fetched from a network; its own policy forbids both."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from milan_pipe import __version__
from milan_pipe.drawing.sheet import data_url, printable_line, printable_lines
from milan_pipe.extras import needs

with needs("report", "writing a page"):
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


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
    environment.filters |= {"data_url": data_url, "printable_line": printable_line}
    style = (templates / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # The policy names the hash of exactly what stands between the tags. It is a file of the package.
    environment.globals |= {"style": Markup(style), "style_hash": f"sha256-{digest}"}  # noqa: S704
    return environment


def render(template: str, **values: Any) -> str:
    """The page of a template in `drawing/templates`; values are escaped."""
    return _environment().get_template(template).render(version=__version__, **values)
