"""Statistics of a teacher's features, and targets that are standardised by them. Suffixes: see `milan_pipe.student`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from milan_pipe.config.teachers import Standardisation
from milan_pipe.errors import DataError, MismatchError, SettingError

_LEAST_VARIANCE = 1e-12


def _paley(prime: int) -> NDArray[Any]:
    """Paley's matrices: of prime + 1 rows where the prime leaves 3 when divided by 4, of 2 (prime + 1) where 1."""
    squares = {number * number % prime for number in range(1, prime)}
    character = np.array([0] + [1 if number in squares else -1 for number in range(1, prime)], np.float64)
    jacobsthal = character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    core = np.zeros((prime + 1, prime + 1))
    core[0, 1:], core[1:, 1:] = 1, jacobsthal
    if prime % 4 == 3:
        core[1:, 0] = -1
        return core + np.eye(prime + 1)
    core[1:, 0] = 1
    return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])


@cache
def hadamard(size: int) -> NDArray[Any] | None:
    """A matrix of 1 and -1 with orthogonal rows, by Sylvester's and Paley's constructions; None where they give none.

    By hand: scipy has powers of two alone, and features are 384, 768 or 1152 wide as often.
    """
    if size == 1:
        return np.ones((1, 1))
    for prime in (size - 1, size // 2 - 1):
        is_prime = prime > 2 and all(prime % divisor for divisor in range(2, math.isqrt(prime) + 1))
        if is_prime and size == (prime + 1) * (1 if prime % 4 == 3 else 2):
            return _paley(prime)
    half = hadamard(size // 2) if size % 2 == 0 else None
    return None if half is None else np.kron([[1, 1], [1, -1]], half)


class Standardise(nn.Module):
    """Features to (features - mean) @ matrix, by statistics that do not change.

    Attributes:
        spread: 2 - 2 cos of standardised features with their own mean direction: the loss of who knows nothing else.
    """

    spread: Tensor
    mean_T: Tensor
    scale_T: Tensor
    matrix_TT: Tensor

    def __init__(self, kind: Standardisation, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("spread", torch.ones(()))
        if kind != "none":
            self.register_buffer("mean_T", torch.zeros(width))
        if kind == "scale":
            self.register_buffer("scale_T", torch.ones(width))
        if kind == "phi-s":
            self.register_buffer("matrix_TT", torch.eye(width))

    def forward(self, features_BST: Tensor) -> Tensor:
        """(B, S, T) float32."""
        if self.kind == "none":
            return features_BST
        centred_BST = features_BST.float() - self.mean_T
        if self.kind == "scale":
            return centred_BST * self.scale_T
        # Outside autocast: targets keep their precision.
        with torch.autocast(centred_BST.device.type, enabled=False):
            rotated_BST: Tensor = centred_BST @ self.matrix_TT
        return rotated_BST


def fit_statistics(features: Iterable[Tensor], width: int) -> dict[str, Tensor]:
    """Statistics of all kinds, from (..., T) features, read twice.

    Returns:
        `mean_T`, `scale_T`, `matrix_TT` (absent where no Hadamard matrix of T rows is known), `spread.KIND`; float32.

    Raises:
        DataError: there are too few tokens, or they do not vary.

    Source: PHI-S, arXiv 2410.01680, section 3: with the covariance U diag(L) U^T and a Hadamard matrix H of unit rows,
        H U^T (x - mean) / sqrt(mean(L)).
    """
    parts = [part.reshape(-1, width).double() for part in features]
    tokens_NT = torch.cat(parts) if parts else torch.empty(0, width, dtype=torch.float64)
    mean_T = tokens_NT.mean(dim=0)
    centred_NT = tokens_NT - mean_T
    if len(tokens_NT) < 2 or not bool((centred_NT.square().mean(dim=0) > _LEAST_VARIANCE).all()):
        raise DataError(
            f"{len(tokens_NT)} stored tokens do not vary in all of their {width} dimensions; standardising needs that: "
            "set teachers.standardise=none"
        )
    covariance_TT = centred_NT.T @ centred_NT / len(tokens_NT)
    scale_T = covariance_TT.diagonal().rsqrt()
    found = {"mean_T": mean_T, "scale_T": scale_T}
    standardised = {"none": tokens_NT, "scale": centred_NT * scale_T}
    if (signs := hadamard(width)) is not None:
        values_T, vectors_TT = torch.linalg.eigh(covariance_TT)
        # An eigenvector's sign is the solver's choice: its largest entry is made positive.
        largest_T = vectors_TT.abs().argmax(dim=0)
        vectors_TT = vectors_TT * vectors_TT.gather(0, largest_T[None]).sign()
        rotation_TT = torch.from_numpy(signs).double() / math.sqrt(width) @ vectors_TT.T
        found["matrix_TT"] = rotation_TT.T / values_T.mean().sqrt()
        standardised["phi-s"] = centred_NT @ found["matrix_TT"]
    for kind, values_NT in standardised.items():
        direction_T = torch.nn.functional.normalize(values_NT, dim=-1).mean(dim=0)
        found[f"spread.{kind}"] = 2 - 2 * direction_T.norm()
    return {name: value.float().contiguous() for name, value in found.items()}


def standardise_of(kind: Standardisation, statistics: Mapping[str, Tensor], width: int) -> Standardise:
    """A module with the statistics of a kind.

    Raises:
        SettingError: no Hadamard matrix of this width is known.
        MismatchError: the statistics are of other features.
    """
    if kind == "phi-s" and "matrix_TT" not in statistics:
        raise SettingError(
            f"teachers.standardise is 'phi-s', and no Hadamard matrix of {width} rows is known; use 'scale'"
        )
    module = Standardise(kind, width)
    for name, buffer in module.named_buffers():
        kept = f"spread.{kind}" if name == "spread" else name
        if kept not in statistics or statistics[kept].shape != buffer.shape:
            shape = f"of shape {tuple(statistics[kept].shape)}" if kept in statistics else "missing"
            raise MismatchError(
                f"statistics of features {width} wide: {kept} is {shape}, expected {tuple(buffer.shape)}; remove their "
                "file, and they are fitted anew"
            )
        buffer.copy_(statistics[kept])
    return module
