"""Several target stores at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from milan_pipe.config.base import Settings

Standardisation = Literal["none", "scale", "phi-s"]
Importance = Literal["first", "mean"]


class TeachersSettings(Settings):
    """What is made of the features of `pretrain TARGETS_A TARGETS_B ... RUN`; the first two also of one store's."""

    standardise: Standardisation = Field(
        "none",
        description="by statistics of each store. scale: each dimension to mean 0 and deviation 1; phi-s: mean 0, and "
        "a rotation that gives all dimensions one deviation, then scaled to 1 (arXiv 2410.01680)",
    )
    weights: Literal["equal", "balanced"] | tuple[Annotated[float, Field(ge=0)], ...] = Field(
        "equal",
        description="of the teachers' losses, which are scaled to a sum of 1: a number for each store; balanced: in "
        "inverse proportion to how far each teacher's features spread",
    )
    importance: Importance = Field(
        "first", description="whose attention semantic masks follow: the first store's, or the mean of all"
    )
