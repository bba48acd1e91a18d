"""The same student and teacher computed as published code does, over the same weights: what ours is timed against.

Student: every patch is projected by the convolution, the visible ones are picked afterwards; the encoder's attention is
torch's fused one, as in timm's blocks; the decoder's is a matrix product, a softmax over the whole map, and another
product, and each of its blocks puts all tokens back into raster order first. Teacher: the last block's attention map of
all tokens, averaged over heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.student.masking import MaskSplit
from milan_pipe.student.model import MaskedStudent


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, heads, Q, E) from queries, keys and values of that shape."""
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return weights @ value


def _heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _encoder_block(block: Any, tokens: Tensor) -> Tensor:
    attention = block.attn
    query, key, value = (_heads(part, attention.num_heads) for part in attention.qkv(block.norm1(tokens)).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    tokens = tokens + attention.proj(mixed)
    return tokens + block.mlp(block.norm2(tokens))


def _decoder_block(block: Any, masked: Tensor, prompt: Tensor, order: Tensor) -> Tensor:
    attention = block.attn
    normed = block.norm1(masked)
    everything = _pick(torch.cat([prompt, normed], dim=1), order)
    query = _heads(attention.q(normed), attention.heads)
    key, value = (_heads(part, attention.heads) for part in attention.kv(everything).chunk(2, -1))
    masked = masked + attention.proj(_attend(query, key, value).transpose(1, 2).flatten(2))
    return masked + block.mlp(block.norm2(masked))


class PlainStudent(nn.Module):
    """Takes the place of a `MaskedStudent` with the prompting decoder, and shares its parameters."""

    def __init__(self, student: MaskedStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, images_BCHW: Tensor, split: MaskSplit) -> Tensor:
        """As `MaskedStudent.forward`."""
        encoder: Any = self.student.encoder
        decoder: Any = self.student.decoder
        batch = len(images_BCHW)
        patches = encoder.patch_embed(images_BCHW) + encoder.pos_embed[:, 1:]
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(batch, -1, -1)
        tokens = torch.cat([cls, _pick(patches, split.keep_BV)], dim=1)
        for block in encoder.blocks:
            tokens = _encoder_block(block, tokens)
        tokens = encoder.norm(tokens)

        first = torch.zeros(batch, 1, dtype=torch.int64, device=tokens.device)
        shuffled = torch.cat([split.keep_BV, split.masked_BM], dim=1)
        order = torch.cat([first, shuffled.argsort(dim=1) + 1], dim=1)
        hidden = decoder.mask_token.expand(batch, split.masked_BM.shape[1], -1)
        everything = torch.cat([decoder.decoder_embed(tokens), hidden], dim=1)
        everything = _pick(everything, order) + decoder.decoder_pos_embed
        back = torch.cat([first, shuffled + 1], dim=1)
        seen = tokens.shape[1]
        prompt, masked = _pick(everything, back).split([seen, everything.shape[1] - seen], dim=1)
        for block in decoder.decoder_blocks:
            masked = _decoder_block(block, masked, prompt, order)
        everything = _pick(torch.cat([prompt, masked], dim=1), order)
        prediction: Tensor = decoder.decoder_pred(decoder.decoder_norm(everything))
        return prediction


class PlainTeacher(nn.Module):
    """An open_clip image tower of the native kind with the whole map of its last block."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    @torch.inference_mode()
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, T) features and (B, L) importance."""
        visual = self.visual
        tokens = visual._embeds(images_BCHW)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            tokens = block(tokens)
        normed = last.ln_1(tokens)
        mixed, weights = last.attn(normed, normed, normed, need_weights=True)
        tokens = tokens + last.ls_1(mixed)
        tokens = tokens + last.ls_2(last.mlp(last.ln_2(tokens)))
        return visual.ln_post(tokens) @ visual.proj, weights[:, 0, 1:]
