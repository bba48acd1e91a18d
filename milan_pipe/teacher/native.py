"""open_clip's own vision transformer: all token features and the CLS attention row, without any S x S map.

Shape suffixes: B views, S = 1 + L tokens (CLS first), L patches, D tower width, N heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn

from milan_pipe.attention import attend
from milan_pipe.teacher.family import TowerSizes, attention_row, record_heads


def _run_block(block: Any, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens after the block, its queries and its keys (B, N, S, E)."""
    if isinstance(block, CustomResidualAttentionBlock):
        with record_heads(block.attn, block.attn.ln_q, block.attn.ln_k) as heads:
            x_BSD = block(x_BSD)
        return x_BSD, heads.query_BNQE, heads.key_BNKE
    attention, (batch, tokens, width) = block.attn, x_BSD.shape
    qkv = F.linear(block.ln_1(x_BSD), attention.in_proj_weight, attention.in_proj_bias)
    qkv_3BNSE = qkv.view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    attended = attend(*qkv_3BNSE).transpose(1, 2).reshape(batch, tokens, width)
    x_BSD = x_BSD + block.ls_1(attention.out_proj(attended))
    return x_BSD + block.ls_2(block.mlp(block.ln_2(x_BSD))), qkv_3BNSE[0], qkv_3BNSE[1]


class NativeFamily:
    """`open_clip.transformer.VisionTransformer`, as in ViT-B-32, ViT-B-16, ViT-L-14 and ViT-H-14."""

    def problem(self, visual: Any) -> str | None:
        if visual.attn_pool is not None:
            return "it pools by attention of CoCa's kind, over many queries"
        if visual.pool_type != "tok":
            return f"it pools by {visual.pool_type}, so that the query of its CLS token was never trained"
        if visual.proj is None:
            return "its image tower has no output projection"
        blocks = visual.transformer.resblocks
        if not len(blocks):
            return "its image tower has no blocks"
        if not all(type(block) in (ResidualAttentionBlock, CustomResidualAttentionBlock) for block in blocks):
            return f"its blocks are of kind {type(blocks[0]).__name__}"
        if getattr(blocks[-1].attn, "logit_scale", None) is not None:
            return "its blocks attend by scaled cosine"
        return None

    def sizes(self, visual: Any) -> TowerSizes:
        return TowerSizes(
            image_size=tuple(visual.image_size),
            patch_size=tuple(visual.patch_size),
            grid=tuple(visual.grid_size),
            width=int(visual.proj.shape[1]),
        )

    @torch.no_grad()
    def resize(self, visual: Any, side: int) -> None:
        grid = (side // visual.patch_size[0], side // visual.patch_size[1])
        if grid != tuple(visual.grid_size):
            embedding_SD = visual.positional_embedding
            patches = embedding_SD[1:].T.reshape(1, -1, *visual.grid_size)
            patches = F.interpolate(patches, grid, mode="bicubic", antialias=True).flatten(2)[0].T
            visual.positional_embedding = nn.Parameter(torch.cat([embedding_SD[:1], patches]), requires_grad=False)
        visual.image_size, visual.grid_size = (side, side), grid

    def outputs(self, visual: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        # Under autocast the embedding would leave in bfloat16, and open_clip would then keep the whole residual
        # stream there; from float32 the stream stays in float32.
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            x_BSD = visual._embeds(pixels_BCHW)
        query_BNSE = key_BNSE = x_BSD
        for block in visual.transformer.resblocks:
            x_BSD, query_BNSE, key_BNSE = _run_block(block, x_BSD)
        row_BS = attention_row(query_BNSE[:, :, 0], key_BNSE)
        return visual.ln_post(x_BSD) @ visual.proj, row_BS[:, 1:]
