"""How features are stored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from milan_pipe.config.base import Settings

StoreFormat = Literal["zarr", "webdataset"]


class CodecSettings(Settings):
    """How features are stored."""

    name: Literal["int8", "float16", "klt"] = Field(
        "int8", description="int8: a byte a dimension, a scale a token; float16: nearly exact; klt: fitted, smallest"
    )
    quality: float = Field(0.999, gt=0, lt=1, description="klt: mean cosine to reach")
    fit_samples: int = Field(512, ge=1, description="klt: images that it is fitted to")
    zstd_level: int | None = Field(
        None,
        ge=0,
        le=19,
        description="entropy coder of the codes; 0: as they are; none: 1 for klt, 0 for the others, where it "
        "spares a tenth at several times the cost",
    )

    @property
    def level(self) -> int:
        """`zstd_level`, or what it stands for."""
        return int(self.name == "klt") if self.zstd_level is None else self.zstd_level

    def header_fields(self) -> dict[str, Any]:
        """What a store's header must say of the codec for a run with this setting to go on in it."""
        quality = self.quality if self.name == "klt" else None
        return {"name": self.name, "zstd_level": self.level, "quality": quality}
