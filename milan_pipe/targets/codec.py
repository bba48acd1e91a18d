"""How features become stored codes and codes become features.

Encoding and decoding are torch code, so that they run where the data is: encoding beside the teacher, decoding on the
training device. Entropy coding is the backends': they know how codes lie in their files.

S tokens of an image, T width of the teacher; C = T coefficients of codec `klt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from milan_pipe.config.targets import CodecSettings
from milan_pipe.errors import DataError, ShapeError
from milan_pipe.targets.klt import FLOAT16_MAX, KltCodec, fit_klt, require_finite
from milan_pipe.targets.schema import CodecInfo, ViewRun


class Codec(Protocol):
    """Lossy code of feature vectors along the last axis."""

    @property
    def info(self) -> CodecInfo:
        """What the store's header says of the codec."""

    @property
    def dtype(self) -> np.dtype[np.int8] | np.dtype[np.float16]:
        """Of the codes."""

    @property
    def coefficient_major(self) -> bool:
        """Whether codes shrink further where those of one dimension, or of a few, lie together."""

    @property
    def has_scale(self) -> bool:
        """Whether a float16 scale per token goes with the codes."""

    @property
    def least_cosine(self) -> float:
        """Mean cosine of an image's decoded with its given tokens, below which they are not what was encoded."""

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes (..., S, T) and scale (..., S) or None of float32 features (..., S, T).

        Raises:
            DataError: a feature is not finite or too large to store.
        """

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        """Float32 features (..., S, T)."""


class Float16Codec:
    """Half precision, rounded to nearest."""

    dtype = np.dtype(np.float16)
    has_scale = False
    coefficient_major = False
    least_cosine = 0.9999

    def __init__(self, zstd_level: int = 1) -> None:
        self.info = CodecInfo(name="float16", zstd_level=zstd_level)

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        require_finite(feature_ST)
        largest = float(feature_ST.abs().max()) if feature_ST.numel() else 0.0
        if largest > FLOAT16_MAX:
            raise DataError(f"a feature of {largest:g} does not fit float16 (at most {FLOAT16_MAX:g}); use codec int8")
        return feature_ST.to(torch.float16), None

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        if scale_S is not None:
            raise ShapeError("float16 codes have no scale, found one")
        return code_ST.float()


class Int8Codec:
    """Uniform steps in -127..127; the step of a token is its largest magnitude / 127, rounded to float16."""

    dtype = np.dtype(np.int8)
    has_scale = True
    coefficient_major = False
    least_cosine = 0.999
    # Smaller ones are coarse themselves.
    _smallest_step = float(np.finfo(np.float16).tiny)

    def __init__(self, zstd_level: int = 1) -> None:
        self.info = CodecInfo(name="int8", zstd_level=zstd_level)

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        require_finite(feature_ST)
        step = (feature_ST.abs().amax(dim=-1) / 127).clamp_(min=self._smallest_step)
        if bool((step > FLOAT16_MAX).any()):
            raise DataError(f"a feature of {float(step.max()) * 127:g} is too large for codec int8")
        scale = step.to(torch.float16)
        # By the very step that decoding multiplies by.
        code = (feature_ST / scale.float()[..., None]).round_().clamp_(-127, 127)
        return code.to(torch.int8), scale

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        if scale_S is None:
            raise ShapeError("int8 codes need a scale per token, found none")
        return code_ST.float() * scale_S.float()[..., None]


_UNFITTED: dict[str, Callable[[int], Codec]] = {"int8": Int8Codec, "float16": Float16Codec}


def build_codec(settings: CodecSettings, features: Tensor | Iterable[Tensor] | None = None) -> Codec:
    """The codec that a configuration names, for a store that begins; one that goes on has its codec in its header.

    Args:
        features: (P, S, T) of `settings.fit_samples` images, or batches of them; codec `klt` is fitted to them, the
            others need none.

    Raises:
        DataError: codec `klt` cannot be fitted.
    """
    if settings.name in _UNFITTED:
        return _UNFITTED[settings.name](settings.level)
    if features is None:
        raise DataError("codec klt is fitted to features, found none; give some, or use codec int8 or float16")
    return fit_klt(features, settings.quality, settings.level)


# Shards are opened one by one, and a large basis takes a while to be unpacked.
_klt_of = lru_cache(maxsize=4)(KltCodec.of)


def codec_of(info: CodecInfo) -> Codec:
    """The codec that a store's header names, as it was when it wrote.

    Raises:
        DataError: this version knows no such codec, or what the header says of it is damaged.
    """
    if info.name in _UNFITTED:
        return _UNFITTED[info.name](info.zstd_level)
    if info.name == "klt":
        return _klt_of(info)
    raise DataError(f"the store's codec is {info.name!r}, this version reads int8, float16 and klt; update milan-pipe")


def decode_run(info: CodecInfo, run: ViewRun, rows: slice | Sequence[int] = slice(None)) -> Tensor:
    """Features (N, S, T) float32 of a stored run, or of some of its rows."""
    scale_NS = None if run.scale_NS is None else torch.from_numpy(run.scale_NS[rows])
    return codec_of(info).decode(torch.from_numpy(run.code_NST[rows]), scale_NS)


def token_cosines(left_ST: Tensor, right_ST: Tensor) -> Tensor:
    """Cosines (..., S) between the tokens of two feature tensors, in float64: 0.999999 must not be lost to rounding."""
    left, right = left_ST.double(), right_ST.double()
    return torch.nn.functional.cosine_similarity(left, right, dim=-1, eps=1e-30)


def mean_cosine(left_ST: Tensor, right_ST: Tensor) -> float:
    """Mean over tokens of `token_cosines`."""
    return float(token_cosines(left_ST, right_ST).mean())
