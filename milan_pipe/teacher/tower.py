"""All token features and the CLS attention row of open_clip's own vision transformer, without any S x S map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from milan_pipe.errors import SettingError


def check_tower(visual: nn.Module, name: str) -> None:
    """Refuse a tower whose forward pass is not the one written here.

    Raises:
        SettingError: not a plain open_clip vision transformer with a CLS token.
    """
    problem = None
    if not isinstance(visual, VisionTransformer):
        problem = f"its image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None or visual.pool_type != "tok":
        problem = f"it pools by {'attention' if visual.attn_pool is not None else visual.pool_type}"
    elif visual.proj is None:
        problem = "its image tower has no output projection"
    elif not all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks):
        problem = "its blocks are not open_clip's plain residual attention blocks"
    if problem:
        raise SettingError(
            f"teacher {name!r} cannot be used: {problem}; expected a ViT of open_clip's own kind with a CLS token, "
            "as ViT-B-32, ViT-B-16, ViT-L-14 or ViT-H-14"
        )


def _attend(block: Any, x_BSD: Tensor, want_cls_row: bool) -> tuple[Tensor, Tensor | None]:
    attention = block.attn
    batch, tokens, width = x_BSD.shape
    heads = attention.num_heads
    qkv = F.linear(x_BSD, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value)
    out = attention.out_proj(out.transpose(1, 2).reshape(batch, tokens, width))
    if not want_cls_row:
        return out, None
    scores = (query[:, :, :1] * (width // heads) ** -0.5) @ key.transpose(-2, -1)
    return out, scores.float().softmax(dim=-1).mean(dim=1)[:, 0]


def tower_outputs(visual: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Run the image tower once.

    Args:
        visual: a tower that `check_tower` accepts.
        pixels_BCHW: normalised input at the tower's own size.

    Returns:
        features (B, S, T): all tokens after `ln_post` and `proj`, CLS first, not unit length.
        importance (B, L): the last block's CLS query over the patch keys: softmax over all S keys, mean over heads,
        CLS column dropped, so that a row sums to less than 1.

    Source: arXiv 2208.06049, sections 3.1 and 3.3.
    """
    tower: Any = visual
    x = tower._embeds(pixels_BCHW)
    row = None
    blocks = tower.transformer.resblocks
    for position, block in enumerate(blocks):
        attended, row = _attend(block, block.ln_1(x), want_cls_row=position == len(blocks) - 1)
        x = x + block.ls_1(attended)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    if row is None:
        raise SettingError("the image tower has no blocks, expected at least one")
    return tower.ln_post(x) @ tower.proj, row[:, 1:]


def grid_of(visual: nn.Module) -> tuple[int, int]:
    """Patches down and across."""
    rows, columns = visual.grid_size  # type: ignore[misc]
    return int(rows), int(columns)


def input_size_of(visual: nn.Module, name: str) -> int:
    """Side of the tower's square input in pixels.

    Raises:
        SettingError: the input is not square.
    """
    height, width = visual.image_size  # type: ignore[misc]
    if height != width:
        raise SettingError(f"teacher {name!r} reads {height} x {width} pixels, expected a square input")
    return int(height)


@torch.no_grad()
def output_width_of(visual: nn.Module) -> int:
    """T, the width of one feature."""
    return int(visual.proj.shape[1])  # type: ignore[index]
