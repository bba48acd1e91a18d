"""How features become stored codes and codes become features.

Encoding and decoding are torch code, so that they run where the data is: encoding beside the teacher, decoding on the
training device.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from milan_pipe.errors import DataError, ShapeError
from milan_pipe.settings import Settings
from milan_pipe.targets.schema import CodecInfo

_FLOAT16_MAX = 65504.0


class CodecConfig(Settings):
    """How features are stored."""

    name: Literal["int8", "float16"] = Field(
        "int8", description="int8: one byte a dimension and a scale per token; float16: two bytes, nearly exact"
    )


class Codec(Protocol):
    """Lossy code of feature vectors along the last axis."""

    @property
    def info(self) -> CodecInfo:
        """What the store's header says of the codec."""

    @property
    def dtype(self) -> np.dtype[np.int8] | np.dtype[np.float16]:
        """Of the codes."""

    @property
    def has_scale(self) -> bool:
        """Whether a float16 scale per token goes with the codes."""

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes (..., S, T) and scale (..., S) or None of float32 features (..., S, T).

        Raises:
            DataError: a feature is not finite or too large to store.
        """

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        """Float32 features (..., S, T)."""


def _require_finite(feature_ST: Tensor) -> None:
    if not bool(torch.isfinite(feature_ST).all()):
        raise DataError("the teacher gave features that are not finite; check its weights and precision")


class Float16Codec:
    """Half precision, rounded to nearest."""

    info = CodecInfo(name="float16")
    dtype = np.dtype(np.float16)
    has_scale = False

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        _require_finite(feature_ST)
        largest = float(feature_ST.abs().max()) if feature_ST.numel() else 0.0
        if largest > _FLOAT16_MAX:
            raise DataError(f"a feature of {largest:g} does not fit float16 (at most {_FLOAT16_MAX:g}); use codec int8")
        return feature_ST.to(torch.float16), None

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        if scale_S is not None:
            raise ShapeError("float16 codes have no scale, found one")
        return code_ST.float()


class Int8Codec:
    """Uniform steps in -127..127; the step of a token is its largest magnitude / 127, kept in float16.

    The step is rounded before the codes are taken, so that decoding multiplies by the very step that encoding divided
    by. A step below float16's smallest normal number would be coarse itself, hence the floor.
    """

    info = CodecInfo(name="int8")
    dtype = np.dtype(np.int8)
    has_scale = True
    _smallest_step = float(np.finfo(np.float16).tiny)

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        _require_finite(feature_ST)
        step = (feature_ST.abs().amax(dim=-1) / 127).clamp_(min=self._smallest_step)
        if bool((step > _FLOAT16_MAX).any()):
            raise DataError(f"a feature of {float(step.max()) * 127:g} is too large for codec int8")
        scale = step.to(torch.float16)
        code = (feature_ST / scale.float()[..., None]).round_().clamp_(-127, 127)
        return code.to(torch.int8), scale

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        if scale_S is None:
            raise ShapeError("int8 codes need a scale per token, found none")
        return code_ST.float() * scale_S.float()[..., None]


def build_codec(config: CodecConfig) -> Codec:
    """The codec that a configuration names."""
    return Int8Codec() if config.name == "int8" else Float16Codec()


def codec_of(info: CodecInfo) -> Codec:
    """The codec that a store's header names.

    Raises:
        DataError: this version knows no such codec.
    """
    for codec in (Int8Codec(), Float16Codec()):
        if codec.info.name == info.name:
            return codec
    raise DataError(f"the store's codec is {info.name!r}, this version reads int8 and float16; update milan-pipe")


def mean_cosine(left_ST: Tensor, right_ST: Tensor) -> float:
    """Mean over tokens of the cosine between two feature tensors, in float64: 0.999999 must not be lost to rounding."""
    left, right = left_ST.double(), right_ST.double()
    return float(torch.nn.functional.cosine_similarity(left, right, dim=-1, eps=1e-30).mean())
