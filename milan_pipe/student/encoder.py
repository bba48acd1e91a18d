"""The encoder: a timm ViT under timm's names, run on visible patches. Suffixes: see `milan_pipe.student`."""

from __future__ import annotations

import difflib
import math
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import SettingError, ShapeError
from milan_pipe.student.masking import MaskSplit

Grid = tuple[int, int]
"""Patch rows and columns of an image."""

ENCODER_LAYERS: dict[str, Any] = {
    "stem": r"encoder\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)",
    "blocks": [(r"encoder\.blocks\.(\d+)", None)],
}
"""Of a model with an `encoder`, by timm's names, for its `group_matcher`."""


def grid_of(settings: StudentSettings) -> Grid:
    """Patch rows and columns of a student.

    Raises:
        SettingError: the model is not a fitting timm ViT, or the patch does not divide the image.
    """
    patch = settings.patch_size
    height, width = native_patch(settings.model) if patch is None else (patch, patch)
    if settings.image_size % height or settings.image_size % width:
        found = f"image_size {settings.image_size} is no multiple of the patch, {height} x {width} pixels"
        raise SettingError(f"student: {found}; change image_size or patch_size")
    return settings.image_size // height, settings.image_size // width


def build_encoder(settings: StudentSettings) -> VisionTransformer:
    """Build the timm ViT without a classifier, ready for pretraining from scratch.

    Its `state_dict` loads with `strict=True` in the timm model of the same name and sizes. Weights are drawn as MAE
    does, from torch's global generator. `pos_embed` is a fixed 2-D sin-cos table, which is not trained.

    Raises:
        SettingError: unknown model name, sizes that do not fit each other, or a model that is not a class-token ViT
            without registers.

    Source: initialisation and position embedding: arXiv 2111.06377, section 4 and appendix A.1.
    """
    grid = grid_of(settings)
    heads, width = settings.heads, settings.width
    sizes = {"patch_size": settings.patch_size, "embed_dim": width, "depth": settings.depth, "num_heads": heads}
    given = {name: value for name, value in sizes.items() if value is not None}
    encoder = _create(settings.model, img_size=settings.image_size, **given)
    set_fixed_positions(encoder, grid)
    init_like_mae(encoder)
    return encoder


def set_fixed_positions(encoder: VisionTransformer, grid: Grid) -> None:
    """Put the fixed sin-cos table into `encoder.pos_embed`, and train it no more; SettingError as the table's."""
    table = sincos_position_embedding(encoder.embed_dim, *grid)
    _parameter(encoder, "pos_embed").requires_grad_(False).copy_(table)


def sincos_position_embedding(width: int, grid_h: int, grid_w: int) -> Tensor:
    """The fixed 2-D sine-cosine position embedding of MAE.

    The first half of the channels encodes the column, the second half the row; each half is sines then cosines of
    `width / 4` frequencies from 1 down to nearly 1/10000. The CLS token's row is zero.

    Returns:
        (1, 1 + L, width) float32, CLS first, patches in raster order.

    Raises:
        SettingError: `width` is no multiple of 4.

    Source: arXiv 2111.06377, appendix A.1, and its published code for the order of channels.
    """
    if width % 4:
        raise SettingError(f"width {width} is no multiple of 4, which the sin-cos position embedding needs")
    # float64 until the end: angles reach the grid's size, and float32 sines of them would depend on the machine.
    steps = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    frequency = torch.exp(-math.log(10000.0) * steps)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (grid_h, grid_w)), indexing="ij")
    halves = [torch.outer(axis.flatten(), frequency) for axis in reversed(axes)]
    patches_LD = torch.cat([wave(angle) for angle in halves for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(patches_LD, (0, 0, 1, 0)).float().unsqueeze(0)


@torch.no_grad()
def init_like_mae(module: nn.Module) -> None:
    """Initialise in place: Xavier uniform linears, zero biases, unit norms, tokens normal with deviation 0.02.

    A patch projection counts as the linear map on flattened patches that it is.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))  # a view: the weight itself is written
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for name in ("cls_token", "mask_token"):
        token = getattr(module, name, None)
        if isinstance(token, nn.Parameter):
            nn.init.normal_(token, std=0.02)


def encode_visible(encoder: VisionTransformer, images_BCHW: Tensor, split: MaskSplit) -> Tensor:
    """Encode CLS and the visible patches; masked patches cost nothing, not even their projection.

    Args:
        encoder: any timm ViT with a class token and no registers, as of `build_encoder`.
        images_BCHW: normalised floats of the encoder's input size.
        split: kept and masked patch indices, 0..L-1, CLS not counted.

    Returns:
        (B, 1 + V, D) after the final norm, CLS first, patches in `split.keep_BV` order.

    Raises:
        ShapeError: the images do not have the encoder's input size, or the split is not of this batch and grid.
    """
    _check_images(encoder, images_BCHW)
    embed = encoder.patch_embed
    grid_h, grid_w = embed.grid_size
    if (split.batch, split.patches) != (images_BCHW.shape[0], grid_h * grid_w):
        raise ShapeError(
            f"split is for {split.batch} samples of {split.patches} patches, images are {images_BCHW.shape[0]} of "
            f"{grid_h} x {grid_w} patches; draw the split from this batch and grid"
        )
    # Ordered channel, row, column, as a convolution's weight.
    pixels_BLP = cut_patches(images_BCHW, embed.patch_size).flatten(2)
    # The convolution's stride is its kernel, so it is a linear map of each patch's pixels: gather first, then map.
    visible_BVD = F.linear(gather_tokens(pixels_BLP, split.keep_BV), embed.proj.weight.flatten(1), embed.proj.bias)
    visible_BVD = embed.norm(visible_BVD)
    cls_11D, position_1SD = (_parameter(encoder, name) for name in ("cls_token", "pos_embed"))
    position_BLD = position_1SD[:, 1:].expand(split.batch, -1, -1)
    visible_BVD = visible_BVD + gather_tokens(position_BLD, split.keep_BV)
    cls_B1D = (cls_11D + position_1SD[:, :1]).expand(split.batch, -1, -1)
    latent_BSD = encoder.norm_pre(encoder.pos_drop(torch.cat([cls_B1D, visible_BVD.to(cls_B1D.dtype)], dim=1)))
    if encoder.grad_checkpointing and torch.is_grad_enabled():
        latent_BSD = checkpoint_seq(encoder.blocks, latent_BSD)
    else:
        latent_BSD = encoder.blocks(latent_BSD)
    encoded_BSD: Tensor = encoder.norm(latent_BSD)
    return encoded_BSD


def encode_all(encoder: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """(B, 1 + L, D): CLS and all patches in raster order, after the final norm, as at test time.

    Raises:
        ShapeError: the images do not have the encoder's input size.
    """
    _check_images(encoder, images_BCHW)
    encoded_BSD: Tensor = encoder.forward_features(images_BCHW)
    return encoded_BSD


def gather_tokens(tokens_BLD: Tensor, index_BV: Tensor) -> Tensor:
    """(B, V, D): the tokens that each sample's row of indices names."""
    return tokens_BLD.gather(1, index_BV.unsqueeze(-1).expand(-1, -1, tokens_BLD.shape[-1]))


def require_whole_patches(images_BCHW: Tensor, patch: int) -> None:
    """Raise ShapeError for images without four dimensions, or which square patches do not divide."""
    if images_BCHW.ndim != 4 or images_BCHW.shape[2] % patch or images_BCHW.shape[3] % patch:
        found = tuple(images_BCHW.shape)
        raise ShapeError(f"images have shape {found}, expected (B, C, H, W) with H and W multiples of {patch}")


def cut_patches(images_BCHW: Tensor, patch: Grid) -> Tensor:
    """(B, L, C, patch height, patch width), patches in raster order."""
    batch, channels, height, width = images_BCHW.shape
    cut = images_BCHW.reshape(batch, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _parameter(encoder: VisionTransformer, name: str) -> nn.Parameter:
    found: nn.Parameter | None = getattr(encoder, name)
    if found is None:
        raise SettingError(f"encoder has no {name}, expected a ViT from build_encoder")
    return found


def _check_images(encoder: VisionTransformer, images_BCHW: Tensor) -> None:
    expected = (encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
        found = f"images have shape {tuple(images_BCHW.shape)}, expected (B, {', '.join(map(str, expected))})"
        raise ShapeError(f"{found}; render the views at the student's image_size")


def _create(model: str, **sizes: Any) -> VisionTransformer:
    """`timm.create_model` with errors a user can act on."""
    if not timm.is_model(model):
        known = timm.list_models(module="vision_transformer")
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models('vit_*') lists candidates"
        raise SettingError(f"student: timm has no model {model!r}; {hint}")
    try:
        encoder: Any = timm.create_model(model, pretrained=False, num_classes=0, **sizes)
    # Raised in timm and torch by a model without this argument, or by sizes that do not fit each other.
    except (AssertionError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        listed = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise SettingError(
            f"student: timm cannot build {model!r} with {listed}: {reason}; the model must be a plain ViT, and heads "
            "must divide the width (set both or neither)"
        ) from error
    if fault := _unfit(encoder):
        expected = "a ViT with a class token, no registers, as vit_base_patch16_224"
        raise SettingError(f"student: {model!r} {fault}; expected {expected}")
    built: VisionTransformer = encoder
    return built


def _unfit(encoder: nn.Module) -> str | None:
    """Why this timm model cannot be the student; None if it can."""
    if not isinstance(encoder, VisionTransformer):
        return f"is a {type(encoder).__name__}, not a VisionTransformer"
    if not isinstance(encoder.patch_embed, PatchEmbed):
        return f"embeds its patches with a {type(encoder.patch_embed).__name__}"
    if not encoder.has_class_token or encoder.num_prefix_tokens != 1:
        return f"has {encoder.num_prefix_tokens} tokens before the patches, expected the class token alone"
    if encoder.pos_embed is None or encoder.no_embed_class:
        return "has no position embedding for its class token"
    if isinstance(encoder.norm, nn.Identity):
        return "has no norm after its blocks"
    return None


@lru_cache(maxsize=64)
def native_patch(model: str) -> Grid:
    """Default patch height and width of the named timm model."""
    with torch.device("meta"):  # shapes only: no memory and no random numbers are used
        height, width = _create(model).patch_embed.patch_size
    return height, width
