"""Codec `klt`: decorrelated directions in uniform steps, one byte each; its one setting is the mean cosine to reach.

The loss compares directions, so a token is coded as a unit vector, with its length beside it. Unit vectors are turned
onto the eigenvectors of their covariance, strongest first, and rounded to multiples of a step. Weak coefficients then
carry nearly no bits in the backends' entropy coder.

Source: Goyal, "Theoretical Foundations of Transform Coding", IEEE Signal Processing Magazine 18(5), 2001.

P images, S tokens of one, N tokens of many, T width; C = T coefficients, strongest first.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milan_pipe.errors import DataError, ShapeError
from milan_pipe.targets.schema import CodecInfo

_LIMIT = 127
FLOAT16_MAX = 65504.0
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_SMALLEST_NORM = float(np.finfo(np.float32).tiny)
# A reconstruction shorter than this has lost its direction; to divide by its length would only blow up the scale.
_SHORTEST = 1e-3

_TOKENS_PER_IMAGE = 64
_MEASURE_EVERY = 4
# Share of the allowed loss that is not spent on the sample, so that other images reach the quality too.
_SPENT = 0.99
# Codes must reach further than the mean's own coefficients, or no vector could be shortened into their range.
_MEAN_ROOM = 1.25
_WIDEST_STEP, _FINEST_STEP, _HALVINGS = 2.0, 1 / 32, 13


class _Matrices(NamedTuple):
    """Factors of a codec on one device, float32."""

    mean_T: Tensor  # of the unit vectors
    synthesis_CT: Tensor  # row c is one step along coefficient c
    analysis_TC: Tensor  # unit vectors to coefficients, in steps
    mean_C: Tensor  # the mean's own coefficients, in steps


class KltCodec:
    """Codes -127..127 of the coefficients of a token's direction, and a float16 scale with its length.

    Codes out of range are not cut off: a shorter vector keeps the direction, coarser, and the scale its length.
    Decoding gives `scale * (codes @ (step * basis) + mean)`.
    """

    dtype = np.dtype(np.int8)
    has_scale = True
    coefficient_major = True

    def __init__(
        self, mean_T: NDArray[np.float32], basis_CT: NDArray[np.float16], step: float, quality: float, zstd_level: int
    ) -> None:
        """A codec from its parts; `fit_klt` makes one from data, `KltCodec.of` from a header.

        Args:
            basis_CT: a row per coefficient; orthogonal, of length 1 or more: wide coefficients take wider steps.
        """
        self.mean_T = mean_T
        self.basis_CT = basis_CT
        self.step = step
        self.quality = quality
        self.zstd_level = zstd_level
        basis = torch.from_numpy(basis_CT.astype(np.float64))
        mean = torch.from_numpy(mean_T.astype(np.float64))
        analysis = (basis / (basis.square().sum(dim=1, keepdim=True) * step)).T
        matrices = (mean, basis * step, analysis, mean @ analysis)
        self._matrices = {torch.device("cpu"): _Matrices(*(matrix.float().contiguous() for matrix in matrices))}

    @classmethod
    def of(cls, info: CodecInfo) -> KltCodec:
        """The codec that a header describes, to the bit the one that wrote it.

        Raises:
            DataError: something is missing or damaged.
        """
        if info.step is None or info.quality is None or info.mean is None or info.basis is None:
            raise _damaged("quality, step, mean and basis must all be present")
        if not (0 < info.quality < 1 and 0 < info.step < math.inf):
            raise _damaged(f"quality {info.quality:g} and step {info.step:g} are out of range")
        mean_T = _unpacked(info.mean, "mean", np.dtype("<f4"))
        basis = _unpacked(info.basis, "basis", np.dtype("<f2"))
        width = mean_T.size
        if basis.size != width**2:
            raise _damaged(f"the basis has {basis.size} numbers, a mean of {width} needs {width**2}")
        basis_CT = basis.astype(np.float16).reshape(width, width)
        if not basis_CT.any(axis=1).all():
            raise _damaged("a row of the basis is zero")
        return cls(mean_T.astype(np.float32), basis_CT, info.step, info.quality, info.zstd_level)

    @cached_property
    def info(self) -> CodecInfo:
        """What the store's header says of the codec."""
        return CodecInfo(
            name="klt",
            zstd_level=self.zstd_level,
            quality=self.quality,
            step=self.step,
            mean=base64.b64encode(self.mean_T.astype("<f4").tobytes()).decode(),
            basis=base64.b64encode(self.basis_CT.astype("<f2").tobytes()).decode(),
        )

    @property
    def least_cosine(self) -> float:
        """See `Codec`. An image may lose four times what the codec was fitted for; see `fit_klt`."""
        return 1 - 4 * (1 - self.quality)

    def _on(self, device: torch.device) -> _Matrices:
        if device not in self._matrices:
            home = self._matrices[torch.device("cpu")]
            self._matrices[device] = _Matrices(*(matrix.to(device) for matrix in home))
        return self._matrices[device]

    def _require_width(self, tensor: Tensor, what: str) -> None:
        width = len(self.mean_T)
        if not tensor.ndim or tensor.shape[-1] != width:
            raise ShapeError(
                f"{what} of shape {tuple(tensor.shape)} do not fit codec klt, fitted to features {width} wide"
            )

    def encode(self, feature_ST: Tensor) -> tuple[Tensor, Tensor | None]:
        """int8 codes (..., S, C) and float16 scale (..., S) of features (..., S, T). A zero vector stays one.

        Raises:
            DataError: a feature is not finite, or a vector is too long for a float16 scale.
            ShapeError: features of another width.
        """
        self._require_width(feature_ST, "features")
        with torch.autocast(feature_ST.device.type, enabled=False):
            return self._encode(feature_ST.float(), self._on(feature_ST.device))

    def _encode(self, feature_ST: Tensor, on: _Matrices) -> tuple[Tensor, Tensor]:
        unit_ST, norm_S = _unit(feature_ST)
        target_SC = unit_ST @ on.analysis_TC
        code = target_SC - on.mean_C
        if bool((code.abs() > _LIMIT).any()):
            # Along each coefficient, how far the direction can be followed before its code leaves the range.
            room_SC = (_LIMIT + on.mean_C * target_SC.sign()) / target_SC.abs().clamp_(min=_SMALLEST_NORM)
            code = target_SC * room_SC.amin(dim=-1, keepdim=True).clamp_(0, 1) - on.mean_C
        code = code.round_().clamp_(-_LIMIT, _LIMIT) * (norm_S > 0)[..., None]
        # The scale makes up for the length that the rounded codes have, so that lengths survive as float16 keeps them.
        rebuilt_S = torch.linalg.vector_norm(code @ on.synthesis_CT + on.mean_T, dim=-1)
        scale = norm_S / rebuilt_S.clamp(min=_SHORTEST)
        if bool((scale > FLOAT16_MAX).any()):
            raise DataError(
                f"a feature vector of length {float(norm_S.max()):g} is too long for codec klt (at most about "
                f"{FLOAT16_MAX:g}); check the teacher, or use codec int8"
            )
        scale = torch.where(norm_S > 0, scale.clamp(min=_SMALLEST_SCALE), 0)
        return code.to(torch.int8), scale.to(torch.float16)

    def decode(self, code_ST: Tensor, scale_S: Tensor | None) -> Tensor:
        """Float32 features (..., S, T) of codes (..., S, C) and scale (..., S).

        Raises:
            ShapeError: the scale is missing, or codes of another width.
        """
        if scale_S is None:
            raise ShapeError("klt codes need a scale per token, found none")
        self._require_width(code_ST, "codes")
        on = self._on(code_ST.device)
        with torch.autocast(code_ST.device.type, enabled=False):
            return (code_ST.float() @ on.synthesis_CT + on.mean_T) * scale_S.float()[..., None]


def _damaged(what: str) -> DataError:
    return DataError(f"the store's codec klt is damaged: {what}; restore the store's header, or extract again")


def _unpacked(text: str, name: str, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _damaged(f"its {name} is not base64") from None
    if not data or len(data) % dtype.itemsize:
        raise _damaged(f"its {name} has {len(data)} bytes, which are no {dtype.itemsize}-byte numbers")
    values: NDArray[np.floating] = np.frombuffer(data, dtype)
    if not np.isfinite(values).all():
        raise _damaged(f"its {name} has numbers that are not finite")
    return values


def require_finite(feature_ST: Tensor) -> None:
    """Refuse what a broken teacher gives.

    Raises:
        DataError: a value is not finite.
    """
    if not bool(torch.isfinite(feature_ST).all()):
        raise DataError("the teacher gave features that are not finite; check its weights and precision")


def _unit(feature_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, and lengths; a zero vector stays zero."""
    largest_S = feature_ST.abs().amax(dim=-1)
    require_finite(largest_S)
    # Squares of very small or large values would leave the range of float32.
    largest_S = largest_S.clamp(min=_SMALLEST_NORM)
    scaled_ST = feature_ST / largest_S[..., None]
    norm_S = torch.linalg.vector_norm(scaled_ST, dim=-1)
    return scaled_ST / norm_S.clamp(min=_SMALLEST_NORM)[..., None], norm_S * largest_S


def _images(features: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Up to 64 tokens (N, T) of each image, spread evenly."""
    images: list[Tensor] = []
    for batch_PST in [features] if isinstance(features, Tensor) else features:
        if batch_PST.ndim != 3:
            raise ShapeError(f"codec klt is fitted to features (P, S, T), found shape {tuple(batch_PST.shape)}")
        stride = max(1, math.ceil(batch_PST.shape[1] / _TOKENS_PER_IMAGE))
        for image_ST in batch_PST.detach().to("cpu", torch.float32):
            # Not the same tokens of each, so that CLS counts for as much as it does in the loss.
            first = len(images) // _MEASURE_EVERY % stride
            images.append(image_ST[first::stride].clone())
    if len({image.shape[-1] for image in images}) > 1:
        raise ShapeError("codec klt is fitted to features of one width, found several")
    return images


def _split(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) for the basis, and others to measure with, of other images where there are enough of them.

    A basis flatters the tokens that it was fitted to. Zero vectors have no direction and are left out.
    """
    tokens_NT = torch.cat(images) if images else torch.empty(0, 1)
    owner_N = torch.cat([torch.full((len(p),), i) for i, p in enumerate(images)]) if images else torch.empty(0)
    non_zero = tokens_NT.abs().amax(dim=-1) != 0
    tokens_NT, owner_N = tokens_NT[non_zero], owner_N[non_zero]
    if not len(tokens_NT):
        raise DataError("codec klt has no features but zeros to be fitted to; check the teacher, or use codec int8")
    owners, rank_N = torch.unique(owner_N, return_inverse=True)
    if len(owners) < _MEASURE_EVERY:
        rank_N = torch.arange(len(tokens_NT))
    held_out = rank_N % _MEASURE_EVERY == _MEASURE_EVERY - 1
    return tokens_NT[~held_out], tokens_NT[held_out] if bool(held_out.any()) else tokens_NT


def _spectrum(tokens_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (T) and eigenvectors (C, T) of unit vectors, float64, and how far codes must reach, (C)."""
    unit_NT = _unit(tokens_NT.double())[0]
    mean_T = unit_NT.mean(dim=0)
    centred_NT = unit_NT - mean_T
    _, vectors_TC = torch.linalg.eigh(centred_NT.T @ centred_NT)
    axes_CT = vectors_TC.flip(1).T.contiguous()
    # An eigenvector's sign is the solver's whim.
    largest_C = axes_CT.gather(1, axes_CT.abs().argmax(dim=1, keepdim=True))
    axes_CT *= largest_C.sign()
    reach_C = torch.maximum((centred_NT @ axes_CT.T).abs().amax(dim=0), _MEAN_ROOM * (axes_CT @ mean_T).abs())
    return mean_T, axes_CT, reach_C


def fit_klt(features: Tensor | Iterable[Tensor], quality: float, zstd_level: int = 1) -> KltCodec:
    """Fit the codec to a sample of the data: the same features give the same codec.

    Errors of T coefficients with a variance of step²/12 each give a mean cosine of about 1 - T step² / 24; coefficients
    that round to zero err less, so bisection looks for a wider step, up to twice as wide: where the sample is flat and
    other images are not, they lose at most four times as much.

    Args:
        features: (P, S, T) of P images, or batches of them. Images should lie spread over the data.
        quality: mean cosine over tokens, in (0, 1).
        zstd_level: kept in the header, for the backends.

    Raises:
        DataError: features are not finite or all zero, or codes of one byte cannot reach the quality.
        ShapeError: features are not (P, S, T).
    """
    if not 0 < quality < 1:
        raise DataError(f"codec klt reaches a mean cosine above 0 and below 1, asked for {quality}")
    basis_NT, measure_NT = _split(_images(features))
    mean_T, axes_CT, reach_C = _spectrum(basis_NT)

    def with_step(logarithm: float) -> tuple[KltCodec, float]:
        """A codec, and the mean cosine that it reaches."""
        step = 2.0**logarithm
        # Where 127 steps do not reach far enough, that coefficient's step is wider.
        basis_CT = (axes_CT * (reach_C / (_LIMIT * step)).clamp(min=1)[:, None]).numpy().astype(np.float16)
        codec = KltCodec(mean_T.numpy().astype(np.float32), basis_CT, step, quality, zstd_level)
        decoded_NT = codec.decode(*codec.encode(measure_NT)).double()
        return codec, float(torch.nn.functional.cosine_similarity(measure_NT.double(), decoded_NT, dim=-1).mean())

    target = 1 - _SPENT * (1 - quality)
    plain = math.sqrt(24 * (1 - quality) / len(mean_T))
    fine, wide = math.log2(plain * _FINEST_STEP), math.log2(plain * _WIDEST_STEP)
    best, reached = with_step(fine)
    if reached < target:
        raise DataError(
            f"codec klt reaches a mean cosine of {reached:.7f} on these features, asked for {quality}; lower "
            "codec.quality, or use codec int8 or float16"
        )
    widest, reached = with_step(wide)
    if reached >= target:
        return widest
    for _ in range(_HALVINGS):
        trial = (fine + wide) / 2
        codec, reached = with_step(trial)
        if reached >= target:
            fine, best = trial, codec
        else:
            wide = trial
    return best
