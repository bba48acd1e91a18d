"""Settings of preparing images, of what one may cost, and of their views."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from milan_pipe.config.base import Settings

Renderer = Literal["pillow", "torch"]
"""What crops and scales the views of a store: Pillow in its first versions, torch since."""

TEST_SCENE_OFFSET = 10**9
"""Index of the demo's first test scene; train scenes are counted from 0 and stay below."""


MAX_PIXELS = 89_478_485
"""Height x width above which Pillow warns of a bomb: 2**28 bytes of RGB. Above twice that it refuses."""


class ImageSettings(Settings):
    """What one image may cost; one that would cost more is skipped."""

    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=2 * MAX_PIXELS,
        description=f"height x width, 1 to {2 * MAX_PIXELS}; to decode one takes up to 16 bytes of memory",
    )
    max_scans: int = Field(100, ge=1, le=100_000, description="of a JPEG; a usual progressive one has about 10")
    max_seconds: float = Field(30.0, gt=0, le=3600, description="of one processor, to decode it")


IMAGE_LIMITS = ImageSettings()
"""The defaults."""


class PrepareSettings(Settings):
    """How shards are made."""

    seed: int = Field(0, ge=0, lt=2**64, description="of the demo's scenes, 0 to 2**64 - 1")
    train_scenes: int = Field(8000, ge=1, le=TEST_SCENE_OFFSET, description="demo scenes in split `train`, 1 to 10**9")
    test_scenes: int = Field(1000, ge=0, le=TEST_SCENE_OFFSET, description="others, in split `test`, 0 to 10**9")
    samples_per_shard: int = Field(500, ge=1, le=1_000_000, description="most images in one shard")
    split: str = Field("train", pattern=r"^[A-Za-z0-9_]+$", description="of a source that names no splits")
    image_column: str | None = Field(None, description="of tables: bytes, paths or URLs; null: found by name")
    label_column: str | Literal[False] | None = Field(
        None, description="of tables: labels; null: found by name; false: none"
    )
    caption_column: str | Literal[False] | None = Field(
        None, description="of tables: captions; null: found by name; false: none"
    )
    downloads: int = Field(32, ge=1, le=1024, description="URLs that each process fetches at once, 1 to 1024")
    download_seconds: float = Field(20.0, gt=0, le=3600, description="for one try to fetch a URL; there are three")


class ViewSettings(Settings):
    """How views are drawn and stored."""

    count: int = Field(2, ge=1, lt=2**31, description="views per image (K), at least 1")
    scale: tuple[float, float] = Field((0.5, 1.0), description="least and greatest share of the area that is cropped")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="least and greatest width / height of a crop")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a mirrored view, 0 to 1")
    seed: int = Field(0, ge=0, lt=2**64, description="0 to 2**64 - 1")
    jpeg_quality: int = Field(95, ge=1, le=100, description="of the stored view, 1 to 100")

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale is the least and the greatest share of the area, above 0 and at most 1, found {self.scale}"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio is the least and the greatest width / height, above 0, found {self.ratio}")
        return self
