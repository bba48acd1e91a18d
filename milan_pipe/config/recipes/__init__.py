"""Params files that ship with the package. Each says by what commands, on what, how long, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from milan_pipe.config.base import Settings

_FOLDER = Path(__file__).parent


class About(Settings):
    """What a params file says of itself; `milan-pipe plan` and `milan-pipe recipes` show it."""

    summary: str = Field(description="student, teacher, data and length")
    commands: tuple[str, ...] = Field(description="what to type, with the names of the data as an example")
    hardware: str = Field(description="that time and score are for")
    time: str = Field(description="how long it takes there")
    time_source: Literal["measured", "estimate"] = Field(description="where the time comes from")
    score: str = Field(description="what comes out")
    score_source: Literal["published", "measured", "none"] = Field(description="where the score comes from")


def recipe_names() -> list[str]:
    """Names of all recipes, as `--params` takes them."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_file(name: str) -> Path | None:
    """The file of a recipe; None where no recipe has that name."""
    return _FOLDER / f"{name}.yaml" if name in recipe_names() else None
