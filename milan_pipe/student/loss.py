"""Losses, the tokens that they are taken over, and the pixel target. Suffixes: see `milan_pipe.student`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from milan_pipe.errors import ShapeError
from milan_pipe.student.encoder import cut_patches, gather_tokens, require_whole_patches
from milan_pipe.student.masking import MaskSplit

Tokens = Literal["all", "visible", "masked"]
"""all: CLS and every patch; visible: CLS and the patches that the student saw; masked: the others, without CLS."""


def feature_loss(prediction_BST: Tensor, target_BST: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(prediction, target) over all tokens: CLS, visible and masked; a float32 scalar in 0..4.

    It equals the squared distance of the two unit vectors, so neither side's length matters. Computed in float32
    whatever the inputs' type: squares of half-precision features overflow.

    Args:
        prediction_BST, target_BST: S = L + 1 tokens, CLS first, raster order.

    Raises:
        ShapeError: the two differ in shape.

    Source: arXiv 2208.06049, section 3.1.
    """
    if prediction_BST.shape != target_BST.shape:
        found = f"prediction has shape {tuple(prediction_BST.shape)}, target {tuple(target_BST.shape)}"
        raise ShapeError(f"{found}; the decoder's output width and grid must be the teacher's")
    cosine_BS = F.cosine_similarity(prediction_BST.float(), target_BST.float(), dim=-1)
    return 2.0 - 2.0 * cosine_BS.mean()


def pixel_target(images_BCHW: Tensor, patch: int) -> Tensor:
    """MAE's target: each patch's pixels, shifted and scaled to mean 0 and deviation 1 over the patch.

    Args:
        images_BCHW: floats in any normalisation; shift and scale common to all channels cancel out.
        patch: height and width of a patch in pixels.

    Returns:
        (B, L, patch * patch * C) float32, patches in raster order, values ordered row, column, channel.

    Raises:
        ShapeError: not four dimensions, or the patch does not divide the image.

    Source: arXiv 2111.06377, section 3; the variance is the unbiased one, plus 1e-6, as in its published code.
    """
    require_whole_patches(images_BCHW, patch)
    pixels_BLP = cut_patches(images_BCHW.float(), (patch, patch)).permute(0, 1, 3, 4, 2).flatten(2)
    centred_BLP = pixels_BLP - pixels_BLP.mean(dim=-1, keepdim=True)
    return centred_BLP / (pixels_BLP.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def mse(prediction_BNT: Tensor, target_BNT: Tensor) -> Tensor:
    """Mean squared error, a float32 scalar."""
    return F.mse_loss(prediction_BNT.float(), target_BNT.float())


def smooth_l1(prediction_BNT: Tensor, target_BNT: Tensor) -> Tensor:
    """Half the squared error where it is below 1, the absolute error less a half beyond; the mean, a float32 scalar."""
    return F.smooth_l1_loss(prediction_BNT.float(), target_BNT.float())


def chosen_tokens(prediction_BST: Tensor, target: Tensor, split: MaskSplit, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Prediction and target of the tokens that a loss is taken over, (B, N, T) both.

    Args:
        prediction_BST: S = L + 1 tokens, CLS first, raster order.
        target: (B, S, T), or (B, L, T) where it has no CLS; then CLS is not chosen.

    Raises:
        ShapeError: prediction, target and split do not fit each other, or nothing is masked.
    """
    batch, count, width = target.shape
    has_cls = count == split.patches + 1
    expected = (split.batch, split.patches + 1, width)
    if tuple(prediction_BST.shape) != expected or batch != split.batch or not (has_cls or count == split.patches):
        raise ShapeError(
            f"prediction has shape {tuple(prediction_BST.shape)}, target {tuple(target.shape)}, the split "
            f"{split.batch} samples of {split.patches} patches; expected one batch and grid, CLS in the prediction, "
            "and the decoder's output width and grid to be the target's"
        )
    if tokens == "masked" and split.visible == split.patches:
        raise ShapeError(f"all {split.patches} patches are visible, expected masked ones to compute the loss on")
    if tokens == "all":
        return prediction_BST if has_cls else prediction_BST[:, 1:], target
    index_BN = split.masked_BM if tokens == "masked" else split.keep_BV
    predicted = gather_tokens(prediction_BST[:, 1:], index_BN)
    wanted = gather_tokens(target[:, 1:] if has_cls else target, index_BN)
    if tokens == "masked" or not has_cls:
        return predicted, wanted
    return torch.cat([prediction_BST[:, :1], predicted], dim=1), torch.cat([target[:, :1], wanted], dim=1)
