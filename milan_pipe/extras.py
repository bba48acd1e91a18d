"""Packages of an extra: imported where they are used, and named where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from milan_pipe.errors import MissingError

Extra = Literal["cluster", "dvc", "hub", "report", "segment", "sinks"]


@contextmanager
def needs(extra: Extra, what: str) -> Iterator[None]:
    """Import packages of an extra inside of this.

    Args:
        what: which feature needs them, as `segmentation`.

    Raises:
        MissingError: one is not installed; names it, and the command that installs the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{what} needs the package {error.name}, which is not installed: pip install 'milan-pipe[{extra}]'"
        ) from error
