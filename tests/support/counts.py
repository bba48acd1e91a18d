"""How often a fault was tried, for the table of docs/reliability.md."""

from __future__ import annotations

from typing import Protocol


class Counted(Protocol):
    """Note what was done to what, how often, and what held each time."""

    def __call__(self, fault: str, times: int, held: str) -> None: ...
