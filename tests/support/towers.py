"""What a teacher's family gives for an image tower."""

from __future__ import annotations

from torch import Tensor, nn

from milan_pipe.teacher.family import TowerSizes
from milan_pipe.teacher.tower import family_of


def sizes_of(visual: nn.Module) -> TowerSizes:
    return family_of(visual, "x").sizes(visual)


def tower_outputs(visual: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    return family_of(visual, "x").outputs(visual, pixels_BCHW)
