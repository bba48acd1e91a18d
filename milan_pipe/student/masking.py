"""Semantic aware, random and block-wise masks: arithmetic on (seed, epoch, key). Suffixes: see `milan_pipe.student`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milan_pipe.config.student import MaskSettings
from milan_pipe.errors import DataError, SettingError, ShapeError
from milan_pipe.random_bits import raw_bits, uniform_inside

_NOISE_STREAM = b"milan-mask-1"  # change it when the noise changes: old runs cannot then be resumed by accident
_RECTANGLES = 64  # three to six cover a mask


@dataclass(frozen=True)
class MaskSplit:
    """One batch's patches, divided in two.

    Together the two index rows of a sample are a permutation of 0..L-1, CLS not counted. Shapes and types are
    checked when built; values are not, because reading them back would stall an accelerator.

    Attributes:
        keep_BV: patches the encoder sees, int64.
        masked_BM: patches it does not see, int64.

    Raises:
        ShapeError: not two dimensions, not int64, or the two differ in batch size or device.
    """

    keep_BV: Tensor
    masked_BM: Tensor

    def __post_init__(self) -> None:
        for name, index in vars(self).items():
            if index.ndim != 2 or index.dtype != torch.int64:
                found = f"shape {tuple(index.shape)}, {index.dtype}"
                raise ShapeError(f"MaskSplit.{name}: found {found}, expected two dimensions of torch.int64 indices")
        if self.keep_BV.shape[0] != self.masked_BM.shape[0] or self.keep_BV.device != self.masked_BM.device:
            raise ShapeError(
                f"MaskSplit: keep_BV has {self.keep_BV.shape[0]} rows on {self.keep_BV.device}, masked_BM "
                f"{self.masked_BM.shape[0]} on {self.masked_BM.device}; both must come from the same batch and device"
            )

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return self.keep_BV.shape[0]

    @property
    def visible(self) -> int:
        """V, the number of kept patches."""
        return self.keep_BV.shape[1]

    @property
    def patches(self) -> int:
        """L, the number of all patches."""
        return self.keep_BV.shape[1] + self.masked_BM.shape[1]

    def restore_index(self) -> Tensor:
        """(B, L) int64: where in [kept, masked] each raster position lies; gathering with it restores raster order."""
        order_BL = torch.cat([self.keep_BV, self.masked_BM], dim=1)
        # The inverse of a permutation, by one scatter; argsort gives the same and costs a sort.
        position_BL = torch.arange(self.patches, device=order_BL.device).expand_as(order_BL)
        return torch.zeros_like(order_BL).scatter(1, order_BL, position_BL)

    def masked_map(self) -> Tensor:
        """(B, L) bool in raster order, True where masked."""
        map_BL = torch.zeros(self.batch, self.patches, dtype=torch.bool, device=self.masked_BM.device)
        return map_BL.scatter(1, self.masked_BM, True)


def visible_count(patches: int, ratio: float) -> int:
    """V = floor(L * (1 - ratio)), exact: 10 patches at ratio 0.9 leave 1, not floor(0.9999...) = 0; L at ratio 0.

    Raises:
        SettingError: the ratio is out of range, or leaves no visible patch, or, above 0, no masked one.
    """
    if ratio == 0:
        return patches
    if not 0.0 < ratio < 1.0:
        raise SettingError(f"mask ratio: found {ratio}, expected 0 or more and less than 1")
    # Rounding of `1 - ratio` and of the product stays below 1e-10 for any L in use.
    visible = math.floor(patches * (1.0 - ratio) + 1e-9)
    if not 0 < visible < patches:
        found = f"mask ratio {ratio} leaves {visible} of {patches} patches visible, expected 1 to {patches - 1}"
        raise SettingError(f"{found}; change the ratio, or take smaller patches")
    return visible


def mask_noise(seed: int, epoch: int, keys: Sequence[str], patches: int) -> Tensor:
    """Gumbel noise for each sample's mask: a pure function of (seed, epoch, key).

    It depends on neither batch, order, rank nor process, so a sample gets the same mask wherever it is read.

    Returns:
        (B, L) float32 on the CPU, L = `patches`; standard Gumbel, always finite.
    """
    uniform_BL = _uniform(seed, epoch, keys, patches)
    return torch.from_numpy((-np.log(-np.log(uniform_BL))).astype(np.float32))


def block_noise(seed: int, epoch: int, keys: Sequence[str], grid: tuple[int, int], masked: int) -> Tensor:
    """Noise of block-wise masks: the lowest `masked` of a row are the patches under random rectangles.

    Rectangles are drawn until they cover `masked` patches; of the last one, those that are still missing are taken in
    raster order, so that every sample hides as many. A pure function of (seed, epoch, key), as `mask_noise`.

    Args:
        grid: patch rows and columns.
        masked: M, of L = rows x columns patches.

    Returns:
        (B, L) float32 on the CPU, L = rows x columns: for `draw_split` without importance.

    Source: BEiT, arXiv 2106.08254, algorithm 1: areas of 16 of 196 patches or more, aspect ratios of 0.3 to 1 / 0.3.
    """
    rows, columns = grid
    patches, least = rows * columns, max(1, round(rows * columns * 16 / 196))
    drawn_BN = _uniform(seed, epoch, keys, patches + 4 * _RECTANGLES)
    noise_BL = drawn_BN[:, :patches].astype(np.float32)
    for noise_L, drawn_N4 in zip(noise_BL, drawn_BN[:, patches:].reshape(-1, _RECTANGLES, 4), strict=True):
        free_RC = np.ones(grid, dtype=bool)
        missing = masked
        for area, aspect, top, left in drawn_N4:
            if not missing:
                break
            size, ratio = least + area * max(missing - least, 0), 0.3 ** (1 - 2 * aspect)
            height = min(rows, max(1, round(math.sqrt(size * ratio))))
            width = min(columns, max(1, round(math.sqrt(size / ratio))))
            row, column = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            covered_RC = np.zeros(grid, dtype=bool)
            covered_RC[row : row + height, column : column + width] = True
            new = np.flatnonzero(covered_RC & free_RC)[:missing]
            free_RC.flat[new] = False
            missing -= len(new)
        if missing:  # rectangles have not covered as many: noise chooses the others
            free_N = np.flatnonzero(free_RC)
            free_RC.flat[free_N[np.argsort(noise_L[free_N], kind="stable")[:missing]]] = False
        # What is not hidden lies above what is.
        noise_L[~free_RC.ravel()] -= 2
    return torch.from_numpy(noise_BL)


def _uniform(seed: int, epoch: int, keys: Sequence[str], count: int) -> NDArray[np.float64]:
    texts = (f"{seed}:{epoch}:{key}".encode("utf-8", "surrogatepass") for key in keys)
    digests = (blake2b(text, digest_size=16, person=_NOISE_STREAM).digest() for text in texts)
    return uniform_inside(raw_bits(digests, count))


def noise_for(masking: MaskSettings, epoch: int, keys: Sequence[str], grid: tuple[int, int]) -> Tensor:
    """Noise of the samples' masks in an epoch, for `draw_split`: (B, L) float32 on the CPU.

    Raises:
        SettingError: as `visible_count`.
    """
    patches = grid[0] * grid[1]
    if masking.kind == "block":
        return block_noise(masking.seed, epoch, keys, grid, patches - visible_count(patches, masking.ratio))
    return mask_noise(masking.seed, epoch, keys, patches)


def draw_split(importance_BL: Tensor | None, noise_BL: Tensor, visible: int) -> MaskSplit:
    """Draw the visible patches of each sample, without replacement.

    The `visible` largest of log(importance) + Gumbel noise are distributed as successive draws without replacement,
    each proportional to importance among what is left. Unlike `torch.multinomial` this accepts rows with fewer than
    `visible` non-zero entries: the rest is drawn evenly from the zeros.

    Args:
        importance_BL: non-negative, any scale and any float type, as the teacher's CLS attention; None draws evenly.
        noise_BL: from `noise_for`, moved to the device on which the split is wanted.
        visible: V, see `visible_count`.

    Returns:
        The split on the noise's device, both index rows ascending.

    Raises:
        ShapeError: importance and noise differ in shape, or `visible` is not in 1..L.
        DataError: importance has a NaN, infinite or negative value. Checked on the CPU only, where it costs nothing.

    Source: arXiv 2208.06049, section 3.3; Gumbel top-k: arXiv 1903.06059, section 2.
    """
    if noise_BL.ndim != 2 or not 0 < visible <= noise_BL.shape[1]:
        raise ShapeError(f"noise has shape {tuple(noise_BL.shape)}, expected (B, L) with L not below V = {visible}")
    score_BL = noise_BL.float()
    if importance_BL is not None:
        if importance_BL.shape != noise_BL.shape:
            raise ShapeError(
                f"importance has shape {tuple(importance_BL.shape)}, expected that of the noise, "
                f"{tuple(noise_BL.shape)}; do targets and student have the same grid?"
            )
        weight_BL = importance_BL.to(device=noise_BL.device, dtype=torch.float32)
        if weight_BL.device.type == "cpu" and not bool(((weight_BL >= 0) & weight_BL.isfinite()).all()):
            what = "importance has negative, infinite or NaN values, expected attention weights"
            raise DataError(f"{what}; check the store with `milan-pipe verify-targets`")
        # Attention in half precision underflows to 0. log(tiny) = -87 keeps zeros behind all that is not zero (above
        # -17 in half precision; the noise lies in -3.6 to 36.1) and leaves the order among them to the noise.
        score_BL = score_BL + weight_BL.clamp(min=torch.finfo(torch.float32).tiny).log()
    order_BL = score_BL.sort(dim=1, descending=True, stable=True).indices
    # Ascending rows make gathers read memory forwards, and the split independent of the order of drawing.
    return MaskSplit(order_BL[:, :visible].sort(dim=1).values, order_BL[:, visible:].sort(dim=1).values)
