"""The encoder: a ViT of timm under timm's names, run on visible patches. Suffixes: see `milan_pipe.student`."""

from __future__ import annotations

import difflib
import math
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import checkpoint, is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import SettingError, ShapeError
from milan_pipe.student.masking import MaskSplit

Grid = tuple[int, int]
"""Patch rows and columns of an image."""

Encoder = VisionTransformer | Eva
"""What a student is. Eva is timm's ViT with rotary positions, as those of EVA-02 and DINOv3."""

ENCODER_LAYERS: dict[str, Any] = {
    "stem": r"encoder\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|rope)",
    "blocks": [(r"encoder\.blocks\.(\d+)", None)],
}
"""Of a model with an `encoder`, by timm's names, for its `group_matcher`."""


def grid_of(settings: StudentSettings) -> Grid:
    """Patch rows and columns of a student.

    Raises:
        SettingError: the model cannot be a student, or the patch does not divide the image.
    """
    patch = settings.patch_size
    height, width = native_patch(settings.model) if patch is None else (patch, patch)
    if settings.image_size % height or settings.image_size % width:
        found = f"image_size {settings.image_size} is no multiple of the patch, {height} x {width} pixels"
        raise SettingError(f"student: {found}; change image_size or patch_size")
    return settings.image_size // height, settings.image_size // width


def timm_options(settings: StudentSettings, *, classifies: bool = False) -> dict[str, Any]:
    """What `timm.create_model` takes beside the name: sizes, and where the last norm is, if the model has it elsewhere.

    A student has that norm after its blocks; a classifier has it after the mean of its patches.

    Raises:
        SettingError: timm has no such model, or it cannot be a student.
    """
    sizes = {
        "img_size": settings.image_size,
        "patch_size": settings.patch_size,
        "embed_dim": settings.width,
        "depth": settings.depth,
        "num_heads": settings.heads,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    return given | _pooling(settings.model, classifies)


def build_encoder(settings: StudentSettings) -> Encoder:
    """Build the timm ViT without a classifier, ready for pretraining from scratch.

    Its `state_dict` loads with `strict=True` in the timm model of the same name and `timm_options`. Weights are drawn
    as MAE does, from torch's global generator; layer scales and rotary frequencies are timm's. `pos_embed`, where there
    is one, is a fixed 2-D sin-cos table, which is not trained.

    Raises:
        SettingError: unknown model name, sizes that do not fit each other, or a model that cannot be a student.

    Source: initialisation and position embedding: arXiv 2111.06377, section 4 and appendix A.1.
    """
    grid = grid_of(settings)
    encoder = _create(settings.model, **timm_options(settings))
    set_fixed_positions(encoder, grid)
    init_like_mae(encoder)
    return encoder


def set_fixed_positions(encoder: Encoder, grid: Grid) -> None:
    """Put the fixed sin-cos table into `encoder.pos_embed`, and train it no more; SettingError as the table's.

    An encoder without absolute positions stays as it is.
    """
    if encoder.pos_embed is not None:
        table = position_table(encoder.embed_dim, grid, positioned_prefix(encoder))
        encoder.pos_embed.requires_grad_(False).copy_(table)


def positioned_prefix(encoder: Encoder) -> int:
    """Rows of `pos_embed` before those of patches: of the class token and registers, if they have positions."""
    return 0 if encoder.no_embed_class else encoder.num_prefix_tokens


def position_table(width: int, grid: Grid, prefix: int) -> Tensor:
    """(1, prefix + L, width): `sincos_position_embedding` with `prefix` rows of zeros before the patches."""
    return F.pad(sincos_position_embedding(width, *grid)[:, 1:], (0, 0, prefix, 0))


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

    A patch projection counts as the linear map on flattened patches that it is. What else there is, as layer scales,
    stays.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))  # a view: the weight itself is written
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for name in ("cls_token", "reg_token", "mask_token"):
        token = getattr(module, name, None)
        if isinstance(token, nn.Parameter):
            nn.init.normal_(token, std=0.02)


def encode_visible(encoder: Encoder, images_BCHW: Tensor, split: MaskSplit) -> Tensor:
    """Encode CLS and the visible patches; masked patches cost nothing, not even their projection.

    Registers take part in the blocks and are left out of the output. Of an encoder without class token, the mean of the
    visible patches' outputs stands in CLS's place.

    Args:
        encoder: as of `build_encoder`.
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
    position_1SD, prefix = encoder.pos_embed, positioned_prefix(encoder)
    if position_1SD is not None:
        position_BLD = position_1SD[:, prefix:].expand(split.batch, -1, -1)
        visible_BVD = visible_BVD + gather_tokens(position_BLD, split.keep_BV)
    # Autocast makes the projection's output half precision; the residual stream is not.
    tokens = [visible_BVD.to(embed.proj.weight.dtype)]
    first: list[Tensor] = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if first:
        first_1KD = torch.cat(first, dim=1)
        if position_1SD is not None and prefix:
            first_1KD = first_1KD + position_1SD[:, :prefix]
        tokens.insert(0, first_1KD.expand(split.batch, -1, -1))
    latent_BSD = encoder.norm_pre(encoder.pos_drop(torch.cat(tokens, dim=1)))
    return _class_first(encoder, encoder.norm(_through_blocks(encoder, latent_BSD, split.keep_BV)))


def encode_all(encoder: Encoder, images_BCHW: Tensor) -> Tensor:
    """(B, 1 + L, D): CLS and all patches in raster order, after the final norm, as at test time.

    Registers are left out. Of an encoder without class token, the mean of the patches' outputs stands in CLS's place.

    Raises:
        ShapeError: the images do not have the encoder's input size.
    """
    _check_images(encoder, images_BCHW)
    return _class_first(encoder, encoder.forward_features(images_BCHW))


def _through_blocks(encoder: Encoder, latent_BSD: Tensor, keep_BV: Tensor) -> Tensor:
    """The blocks' output; rotary positions are those of each sample's patches."""
    rope = getattr(encoder, "rope", None)
    # (L, E), or of each block and head: (depth, heads, L, E).
    rotary = None if rope is None else rope.get_embed(shape=encoder.patch_embed.grid_size)
    remembers = not (encoder.grad_checkpointing and torch.is_grad_enabled())
    for number, block in enumerate(encoder.blocks):
        given: dict[str, Any] = {}
        if rotary is not None:
            # To (B, 1 or heads, V, E), as timm's attention takes them.
            given["rope"] = (rotary[number] if encoder.rope_mixed else rotary[None])[:, keep_BV].transpose(0, 1)
        latent_BSD = block(latent_BSD, **given) if remembers else checkpoint(block, latent_BSD, **given)
    return latent_BSD


def _class_first(encoder: Encoder, encoded_BSD: Tensor) -> Tensor:
    """Prefix tokens and patches to one token, which stands for the image, and patches."""
    prefix = encoder.num_prefix_tokens
    if encoder.cls_token is None:
        patches_BVD = encoded_BSD[:, prefix:]
        return torch.cat([patches_BVD.mean(dim=1, keepdim=True), patches_BVD], dim=1)
    return encoded_BSD if prefix == 1 else torch.cat([encoded_BSD[:, :1], encoded_BSD[:, prefix:]], dim=1)


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


def _check_images(encoder: Encoder, images_BCHW: Tensor) -> None:
    expected = (encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
        found = f"images have shape {tuple(images_BCHW.shape)}, expected (B, {', '.join(map(str, expected))})"
        raise ShapeError(f"{found}; render the views at the student's image_size")


def _create(model: str, **options: Any) -> Encoder:
    """`timm.create_model` with errors a user can act on."""
    if not timm.is_model(model):
        known = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="eva")]
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models('vit_*') lists candidates"
        raise SettingError(f"student: timm has no model {model!r}; {hint}")
    try:
        encoder: Any = timm.create_model(model, pretrained=False, num_classes=0, **options)
    # Raised in timm and torch by a model without this argument, or by sizes that do not fit each other.
    except (AssertionError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        raise SettingError(
            f"student: timm cannot build {model!r} with {listed}: {reason}; heads must divide the width (set both or "
            "neither), with rotary positions into multiples of 4"
        ) from error
    if fault := _unfit(encoder):
        raise SettingError(f"student: {model!r} {fault}; expected a ViT as vit_base_patch16_224")
    if isinstance(encoder, Eva):
        # timm builds such a model, and it fails at the first image.
        attention: Any = encoder.blocks[0].attn
        heads, rotary = attention.num_heads, encoder.rope is not None
        if encoder.embed_dim % (4 * heads if rotary else heads):
            parts = f"{heads} multiples of 4, for rotary positions" if rotary else f"{heads} heads"
            raise SettingError(f"student: width {encoder.embed_dim} is not divided into {parts}; change width or heads")
    built: Encoder = encoder
    return built


def _unfit(encoder: nn.Module) -> str | None:
    """Why this timm model cannot be the student; None if it can."""
    # A class that is derived from them has more tokens, or adds positions its own way.
    if type(encoder) not in (VisionTransformer, Eva):
        return f"is a {type(encoder).__name__}, not a VisionTransformer or Eva"
    embed: Any = encoder.patch_embed
    if not isinstance(embed, PatchEmbed):
        return f"embeds its patches with a {type(embed).__name__}, which sees more than one patch at a time"
    if embed.proj.kernel_size != embed.proj.stride or any(embed.proj.padding):
        return "has patches that overlap"
    if isinstance(encoder.norm, nn.Identity) and isinstance(encoder.fc_norm, nn.Identity):
        return "has no norm after its blocks"
    return None


@lru_cache(maxsize=64)
def _outline(model: str, **options: Any) -> Encoder:
    """The named timm model of its own sizes, without memory and without random numbers."""
    # Drawing weights that are not there takes most of the time; Eva has no such option.
    undrawn = {"weight_init": "skip"} if is_model_in_modules(model, "vision_transformer") else {}
    with torch.device("meta"):
        return _create(model, **undrawn, **options)


def _pooling(model: str, classifies: bool) -> dict[str, Any]:
    """Options that move the last norm and leave out other ways to pool; none for a student that has it in place."""
    asked = {"global_pool": "avg"} if classifies else {}
    outline = _outline(model, **asked)
    has_norm, has_pooled_norm = (not isinstance(norm, nn.Identity) for norm in (outline.norm, outline.fc_norm))
    if (has_norm, has_pooled_norm) == (not classifies, classifies) and outline.attn_pool is None:
        return asked
    pool = "avg" if classifies or outline.cls_token is None else "token"
    if isinstance(outline, Eva):
        return {"global_pool": pool, "use_fc_norm": classifies, "use_post_transformer_norm": not classifies}
    return {"global_pool": pool, "fc_norm": classifies}


def native_patch(model: str) -> Grid:
    """Default patch height and width of the named timm model."""
    height, width = _outline(model).patch_embed.patch_size
    return height, width
