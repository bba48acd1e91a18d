"""Sizes of the student and its decoder, and how patches are masked."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from milan_pipe.config.base import Settings
from milan_pipe.errors import SettingError

Grid = tuple[int, int]
"""Patch rows and columns of an image."""


class StudentSettings(Settings):
    """The backbone that is pretrained. None means the timm model's own value."""

    model: str = Field("vit_tiny_patch16_224", description="name of a timm ViT with a class token and no registers")
    image_size: int = Field(64, ge=1, description="height and width of the input in pixels")
    patch_size: int | None = Field(
        8, ge=1, description="height and width of a patch in pixels; must divide `image_size`"
    )
    width: int | None = Field(128, ge=4, description="of the tokens; a multiple of 4, for the position embedding")
    depth: int | None = Field(4, ge=1, description="number of blocks")
    heads: int | None = Field(4, ge=1, description="of each block; must divide the width")

    @property
    def grid(self) -> Grid:
        """Patch rows and columns.

        Raises:
            SettingError: the model is not a fitting timm ViT, or the patch does not divide the image.
        """
        if self.patch_size is None:
            # Settings are read without timm, which takes seconds to import; only this answer needs it.
            from milan_pipe.student.encoder import native_patch

        height, width = (self.patch_size,) * 2 if self.patch_size is not None else native_patch(self.model)
        if self.image_size % height or self.image_size % width:
            raise SettingError(
                f"student: image_size {self.image_size} is no multiple of the patch, {height} x {width} pixels; "
                "change image_size or patch_size"
            )
        return self.image_size // height, self.image_size // width

    @property
    def patches(self) -> int:
        """L, the number of patches; raises as `grid`."""
        return math.prod(self.grid)


class DecoderSettings(Settings):
    """The decoder, which is thrown away after pretraining. The published ViT-B and ViT-L have 512 / 8 / 16."""

    kind: Literal["prompting", "plain"] = Field(
        "prompting",
        description="`prompting` updates the masked tokens only; `plain` is MAE's, where all tokens attend to all",
    )
    width: int = Field(64, ge=4, description="of the decoder's tokens; a multiple of 4, for the position embedding")
    depth: int = Field(2, ge=1, description="number of blocks")
    heads: int = Field(4, ge=1, description="of each block; must divide the width")


class MaskSettings(Settings):
    """How patches are hidden."""

    kind: Literal["semantic", "random"] = Field(
        "semantic",
        description="`semantic` keeps patches with probability proportional to the teacher's importance; `random` ignores it",
    )
    ratio: float = Field(0.75, gt=0.0, lt=1.0, description="share of patches that are masked, strictly between 0 and 1")
    seed: int = Field(0, description="of the masks, beside epoch and sample key")
