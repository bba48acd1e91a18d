"""What every kind of image tower is asked, and the record of its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TowerSizes:
    """Sizes of an image tower.

    Attributes:
        image_size: input height and width in pixels.
        patch_size: height and width of a patch in pixels.
        grid: patches down and across.
        width: T, the width of one feature.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    width: int


class TowerFamily(Protocol):
    """One kind of image tower. Methods but `problem` take only towers without one."""

    def problem(self, visual: Any) -> str | None:
        """Why this tower cannot serve, as the middle of a sentence; None where it can."""

    def sizes(self, visual: Any) -> TowerSizes:
        """Sizes as they are now."""

    def resize(self, visual: Any, side: int) -> None:
        """Take another input, `side` pixels square: position embeddings are interpolated, bicubic and antialiased."""

    def outputs(self, visual: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, S, T) and importance (B, L); see `milan_pipe.teacher.tower.tower_outputs`."""
