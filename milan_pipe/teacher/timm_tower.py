"""timm's vision transformers: EVA02, DINO and their kin by their CLS token, SigLIP by its attention pooling.

The trunk runs its own forward pass; only the queries and keys of one attention module are recorded as they pass.

Shape suffixes: B views, L patches, S = 1 + L, D trunk width, N heads, E head width, K keys, prefix tokens included.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan_pipe.teacher.family import Heads, TowerSizes, attention_row, record_heads

_TRUNKS = (VisionTransformer, Eva)
_ATTENTIONS = (Attention, AttentionRope, EvaAttention)


def _keys_as_attended(attention: Any, heads: Heads) -> Tensor:
    """Keys after what the attention does between their norm and the scores.

    Prefix tokens have no place in the image and are not rotated; the CLS query, a prefix token, needs no rotation.
    """
    key_BNKE = heads.key_BNKE
    if heads.rope is not None:
        prefix = attention.num_prefix_tokens
        rotated = apply_rot_embed_cat(key_BNKE[:, :, prefix:], heads.rope, half=attention.rotate_half)
        key_BNKE = torch.cat([key_BNKE[:, :, :prefix], rotated], dim=2)
    groups = heads.query_BNQE.shape[1] // key_BNKE.shape[1]
    return key_BNKE.repeat_interleave(groups, dim=1) if groups > 1 else key_BNKE


def _project(visual: Any, x_BSD: Tensor) -> Tensor:
    """What follows pooling, which is pointwise, on every token: to the width and space of the image embedding."""
    projected: Tensor = visual.head(visual.trunk.head(visual.trunk.fc_norm(x_BSD)))
    return projected


class TimmTower(nn.Module):
    """A model of timm alone, as `open_clip.timm_model.TimmModel` holds those of CLIP.

    One that was pretrained with a class token and is used by the mean of its patches, as DINOv3, pools by the token.
    """

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Identity()
        by_mean = getattr(trunk, "global_pool", None) == "avg" and getattr(trunk, "cls_token", None) is not None
        # With a norm of its own, the mean is what was trained, and the query of the class token was not.
        if by_mean and type(trunk) in _TRUNKS and isinstance(trunk.fc_norm, nn.Identity):
            trunk.reset_classifier(0, "token")

    def set_input_size(self, side: int) -> None:
        self.trunk.set_input_size(img_size=(side, side))


class TimmFamily:
    """`TimmTower`, or `open_clip.timm_model.TimmModel`, around a plain vision transformer."""

    def problem(self, visual: Any) -> str | None:
        trunk = visual.trunk
        if type(trunk) not in _TRUNKS:
            return f"its image tower is timm's {type(trunk).__name__}"
        if trunk.global_pool == "map":
            pool = trunk.attn_pool
            if type(pool) is not AttentionPoolLatent or pool.latent_len != 1 or pool.pos_embed is not None:
                return f"it pools by {type(pool).__name__}, not by one query over the plain tokens"
            return None
        if trunk.global_pool != "token":
            return f"its timm tower pools by {trunk.global_pool or 'nothing that timm has'}"
        attention = getattr(trunk.blocks[-1], "attn", None)
        if type(attention) not in _ATTENTIONS:
            kind = type(attention if attention is not None else trunk.blocks[-1]).__name__
            return f"its last block attends by timm's {kind}"
        return None

    @torch.no_grad()
    def sizes(self, visual: Any) -> TowerSizes:
        embed = visual.trunk.patch_embed
        weight = next(visual.trunk.parameters())
        return TowerSizes(
            image_size=tuple(embed.img_size),
            patch_size=tuple(embed.feat_ratio(as_scalar=False)),
            grid=tuple(embed.grid_size),
            width=int(_project(visual, weight.new_zeros(1, 1, visual.trunk.embed_dim)).shape[-1]),
        )

    @torch.no_grad()
    def resize(self, visual: Any, side: int) -> None:
        # Rotary embeddings: over the extent that the trunk was trained on.
        visual.set_input_size(side)

    def outputs(self, visual: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        trunk, pool = visual.trunk, visual.trunk.attn_pool
        if pool is None:
            attention = trunk.blocks[-1].attn
            with record_heads(attention, attention.q_norm, attention.k_norm) as heads:
                tokens_BKD = trunk.forward_features(pixels_BCHW)
            summary_BD, key_BNKE = tokens_BKD[:, 0], _keys_as_attended(attention, heads)
        else:
            tokens_BKD = trunk.forward_features(pixels_BCHW)
            with record_heads(pool, pool.q_norm, pool.k_norm) as heads:
                summary_BD = trunk.pool(tokens_BKD)
            key_BNKE = heads.key_BNKE  # of all tokens or of the patches alone, as the trunk pools
        row_BK = attention_row(heads.query_BNQE[:, :, 0], key_BNKE)
        patches_BLD = tokens_BKD[:, trunk.num_prefix_tokens :]
        x_BSD = torch.cat([summary_BD[:, None], patches_BLD], dim=1)
        return _project(visual, x_BSD), row_BK[:, -patches_BLD.shape[1] :]
