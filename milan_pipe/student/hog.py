"""The low-level target: histograms of oriented gradients of each patch. Shape suffixes are in `milan_pipe.student`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from milan_pipe.student.encoder import cut_patches, require_whole_patches

BINS = 9


def cell_side(patch: int) -> int:
    """Pixels of a cell's side: 8, or the largest number below it that divides the patch."""
    return next(side for side in range(min(8, patch), 0, -1) if patch % side == 0)


def hog_width(patch: int, channels: int = 3) -> int:
    """Values of one patch: its cells times channels times 9 bins."""
    return (patch // cell_side(patch)) ** 2 * channels * BINS


@torch.no_grad()
def hog_target(images_BCHW: Tensor, patch: int) -> Tensor:
    """Histograms of the gradient's direction in each cell of each patch.

    Gradients are central differences of each channel, zero at the image's border. Directions are unsigned, in 9 bins of
    20 degrees; each pixel adds the length of its gradient to its bin. A cell's histogram is scaled to unit length, one
    channel at a time.

    Args:
        images_BCHW: floats; a scale common to a channel cancels out.
        patch: height and width of a patch in pixels.

    Returns:
        (B, L, cells * C * 9) float32: patches in raster order, in each cells in raster order, then channel, then bin.

    Raises:
        ShapeError: not four dimensions, or the patch does not divide the image.

    Source: arXiv 2112.09133, section 3.2; Dalal and Triggs, CVPR 2005, with blocks of one cell.
    """
    require_whole_patches(images_BCHW, patch)
    image = images_BCHW.float()
    across, down = torch.zeros_like(image), torch.zeros_like(image)
    across[..., 1:-1] = image[..., 2:] - image[..., :-2]
    down[..., 1:-1, :] = image[..., 2:, :] - image[..., :-2, :]
    length = torch.hypot(across, down)
    angle = torch.atan2(down, across).remainder(math.pi)  # a direction and its opposite are one
    number = (angle * (BINS / math.pi)).long().clamp_(max=BINS - 1)
    side = cell_side(patch)
    votes = torch.zeros(*image.shape[:2], BINS, *image.shape[2:], device=image.device)
    votes.scatter_(2, number.unsqueeze(2), length.unsqueeze(2))
    unit = F.normalize(F.avg_pool2d(votes.flatten(0, 1), side), dim=1, eps=1e-6)
    unit = unit.reshape(len(image), image.shape[1] * BINS, *unit.shape[2:])
    cells = cut_patches(unit, (patch // side, patch // side))
    return cells.permute(0, 1, 3, 4, 2).flatten(2)
