"""Losses and the pixel target. Shape suffixes are explained in `milan_pipe.student`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from milan_pipe.errors import ShapeError
from milan_pipe.student.encoder import cut_patches, gather_tokens, require_whole_patches
from milan_pipe.student.masking import MaskSplit


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


def masked_loss(prediction_BST: Tensor, target_BLP: Tensor, split: MaskSplit) -> Tensor:
    """Mean squared error on the masked patches only, a float32 scalar.

    Args:
        prediction_BST: S = L + 1 tokens, CLS first, raster order; T is the number of a patch's values.
        target_BLP: from `pixel_target` or `hog_target`: a target without CLS.

    Raises:
        ShapeError: prediction, target and split do not fit each other, or nothing is masked.

    Source: arXiv 2111.06377, section 3; arXiv 2112.09133, section 3.1.
    """
    batch, patches, values = target_BLP.shape
    if tuple(prediction_BST.shape) != (batch, patches + 1, values) or (split.batch, split.patches) != (batch, patches):
        raise ShapeError(
            f"prediction has shape {tuple(prediction_BST.shape)}, target {tuple(target_BLP.shape)}, the split "
            f"{split.batch} samples of {split.patches} patches; expected one batch and grid, CLS in the prediction only"
        )
    if split.visible == patches:
        raise ShapeError(f"all {patches} patches are visible, expected masked ones to compute the loss on")
    predicted_BMP = gather_tokens(prediction_BST[:, 1:], split.masked_BM)
    return F.mse_loss(predicted_BMP.float(), gather_tokens(target_BLP, split.masked_BM).float())
