"""Sizes of the student and its decoder, and how patches are masked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from milan_pipe.config.base import Settings


class StudentSettings(Settings):
    """The backbone that is pretrained. None means the timm model's own value."""

    model: str = Field(
        "vit_tiny_patch16_224",
        description="name of a ViT that timm's VisionTransformer or Eva builds, also with registers, rotary "
        "positions or no class token",
    )
    image_size: int = Field(64, ge=1, le=65536, description="height and width of the input in pixels")
    patch_size: int | None = Field(8, ge=1, description="side of a patch in pixels; must divide `image_size`")
    width: int | None = Field(128, ge=4, description="of the tokens; a multiple of 4, for the position embedding")
    depth: int | None = Field(4, ge=1, le=1000, description="number of blocks")
    heads: int | None = Field(4, ge=1, description="of each block; must divide the width")
    init: str | None = Field(
        None,
        description="weights that pretraining begins with: a run, a checkpoint, a folder or a file of weights in "
        "timm's layout, timm:NAME[.TAG] or hf-hub:ORG/NAME; none: random ones",
    )


class DecoderSettings(Settings):
    """The decoder, used in pretraining alone. The published ViT-B and ViT-L have 512 / 8 / 16."""

    kind: Literal["prompting", "plain", "none"] = Field(
        "prompting",
        description="prompting: updates the masked tokens alone; plain: MAE's, all tokens attend to all; none: for "
        "objectives that predict what the encoder sees",
    )
    width: int = Field(64, ge=4, description="of the decoder's tokens; a multiple of 4, for the position embedding")
    depth: int = Field(1, ge=1, le=1000, description="number of blocks")
    heads: int = Field(4, ge=1, description="of each block; must divide the width")
    init: str | None = Field(
        None, description="run or checkpoint of pretraining whose decoder a run begins with; none: random weights"
    )


class MaskSettings(Settings):
    """How patches are hidden."""

    kind: Literal["semantic", "random", "block"] = Field(
        "semantic",
        description="semantic: patches are kept in proportion to the teacher's importance; random: evenly; block: "
        "rectangles are hidden",
    )
    ratio: float = Field(
        0.75, ge=0.0, lt=1.0, description="share of patches that are masked; 0: the student sees all of them"
    )
    seed: int = Field(0, description="of the masks, beside epoch and sample key")
