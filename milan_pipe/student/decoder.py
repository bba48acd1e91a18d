"""Decoders, under the published key names: from the encoder's visible tokens to a feature at every position.

Shape suffixes are explained in `milan_pipe.student`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from milan_pipe.attention import attend
from milan_pipe.config.student import DecoderSettings
from milan_pipe.errors import SettingError, ShapeError
from milan_pipe.student.encoder import Grid, gather_tokens, init_like_mae, sincos_position_embedding
from milan_pipe.student.masking import MaskSplit

NORM_EPS = 1e-6
"""Epsilon of every layer norm in the student, as in the published code and in timm's ViT."""


class VisibleHead(nn.Module):
    """One linear layer from the encoder's tokens to what is predicted of them; alone, it is the decoder `none`.

    Args:
        encoder_width: D of the encoder's tokens.
        output_width: T.
    """

    def __init__(self, *, encoder_width: int, grid: Grid, output_width: int):
        super().__init__()
        self.grid = grid
        self.encoder_width = encoder_width
        self.checkpoint_activations = False
        self.decoder_blocks = nn.ModuleList()
        self.visible_pred = nn.Linear(encoder_width, output_width)
        init_like_mae(self)

    def forward(self, latent_BSD: Tensor, split: MaskSplit) -> Tensor:
        """(B, L + 1, T) in raster order; zero where the encoder saw nothing. Arguments as `PromptingDecoder.forward`.

        Raises:
            ShapeError: token count is not V + 1, or L is not that of the grid.
        """
        _require_fit(latent_BSD, split, self.grid, self.encoder_width)
        predicted_BST = self.visible_pred(latent_BSD)
        hidden_BMT = predicted_BST.new_zeros(split.batch, split.patches - split.visible, predicted_BST.shape[-1])
        return _in_raster_order(torch.cat([predicted_BST, hidden_BMT], dim=1), split)


class Decoder(nn.Module):
    """What both decoders share: embedding, mask token, positions, the way back to raster order, prediction.

    Args:
        encoder_width, width: D of the encoder's and of the decoder's tokens, a multiple of 4.
        depth, heads: number of blocks, and of each block's heads; they divide `width`.
        output_width: T, the width of the predicted feature.
        visible_width: of what a `VisibleHead` beside the decoder predicts, before the decoder's in the output; 0: there
            is none.
        mlp_width: hidden width of each block's MLP; None is 4 times `width`.

    Raises:
        SettingError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        grid: Grid,
        output_width: int,
        visible_width: int = 0,
        mlp_width: int | None = None,
    ):
        if heads < 1 or width % heads:
            raise SettingError(f"decoder: width {width} is no multiple of heads {heads}; change one of them")
        super().__init__()
        blocks = [self._block(width, heads, mlp_width or 4 * width) for _ in range(depth)]
        self.grid = grid
        self.encoder_width = encoder_width
        self.checkpoint_activations = False
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(width, *grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, output_width)
        init_like_mae(self)
        self.head: VisibleHead | None = None
        if visible_width:
            self.head = VisibleHead(encoder_width=encoder_width, grid=grid, output_width=visible_width)

    _block: Callable[[int, int, int], nn.Module]  # of a width, heads and an MLP's width

    def _embed(self, latent_BSD: Tensor, split: MaskSplit) -> tuple[Tensor, Tensor]:
        """The prompt (CLS and visible tokens) and the masked tokens, both with their positions."""
        _require_fit(latent_BSD, split, self.grid, self.encoder_width)
        position_BLD = self.decoder_pos_embed[:, 1:].expand(split.batch, -1, -1)
        cls_B1D = self.decoder_pos_embed[:, :1].expand(split.batch, -1, -1)
        prompt_position_BSD = torch.cat([cls_B1D, gather_tokens(position_BLD, split.keep_BV)], dim=1)
        prompt_BSD = self.decoder_embed(latent_BSD) + prompt_position_BSD
        masked_BMD = self.mask_token + gather_tokens(position_BLD, split.masked_BM)
        return prompt_BSD, masked_BMD

    def _run(self, block: nn.Module, *tokens_BSD: Tensor) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            updated_BSD: Tensor = checkpoint(block, *tokens_BSD, use_reentrant=False)
        else:
            updated_BSD = block(*tokens_BSD)
        return updated_BSD

    def _predict(self, tokens_BSD: Tensor, latent_BSD: Tensor, split: MaskSplit) -> Tensor:
        """(B, L + 1, T) in raster order, from the decoder's tokens ordered CLS, visible, masked."""
        prediction_BST: Tensor = self.decoder_pred(self.decoder_norm(_in_raster_order(tokens_BSD, split)))
        if self.head is None:
            return prediction_BST
        return torch.cat([self.head(latent_BSD, split), prediction_BST], dim=-1)


def _require_fit(latent_BSD: Tensor, split: MaskSplit, grid: Grid, encoder_width: int) -> None:
    if split.patches != grid[0] * grid[1]:
        raise ShapeError(
            f"split has {split.patches} patches, this decoder {grid[0]} x {grid[1]} = {grid[0] * grid[1]}; "
            "encoder, decoder and mask must share one grid"
        )
    expected = (split.batch, 1 + split.visible, encoder_width)
    if tuple(latent_BSD.shape) != expected:
        raise ShapeError(
            f"latent has shape {tuple(latent_BSD.shape)}, expected {expected}: CLS and the split's visible patches"
        )


def _in_raster_order(tokens_BSD: Tensor, split: MaskSplit) -> Tensor:
    """(B, L + 1, D) from tokens ordered CLS, visible, masked."""
    cls_B1 = torch.zeros(split.batch, 1, dtype=torch.int64, device=tokens_BSD.device)
    return gather_tokens(tokens_BSD, torch.cat([cls_B1, split.restore_index() + 1], dim=1))


class PromptAttention(nn.Module):
    """Multi-head attention from the masked tokens to prompt and masked tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, query_BMD: Tensor, context_BSD: Tensor) -> Tensor:
        """(B, M, D): each query's mixture of the context's values."""
        q_BNMK = self.q(query_BMD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BNSK, v_BNSK = self.kv(context_BSD).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BNMK = attend(q_BNMK, k_BNSK, v_BNSK)
        projected_BMD: Tensor = self.proj(mixed_BNMK.transpose(1, 2).flatten(2))
        return projected_BMD


class PromptBlock(nn.Module):
    """One block of the prompting decoder: only masked tokens are normalised, updated and passed on."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = PromptAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, masked_BMD: Tensor, prompt_BSD: Tensor) -> Tensor:
        """(B, M, D): the masked tokens after attention and MLP."""
        query_BMD = self.norm1(masked_BMD)
        # The prompt skips norm1. Attention does not depend on the order of keys, so none is restored here.
        context_BSD = torch.cat([prompt_BSD.to(query_BMD.dtype), query_BMD], dim=1)
        masked_BMD = masked_BMD + self.attn(query_BMD, context_BSD)
        updated_BMD: Tensor = masked_BMD + self.mlp(self.norm2(masked_BMD))
        return updated_BMD


class PromptingDecoder(Decoder):
    """MILAN's decoder: CLS and visible tokens are a fixed prompt, masked tokens are the only queries."""

    _block = PromptBlock

    def forward(self, latent_BSD: Tensor, split: MaskSplit) -> Tensor:
        """Predict the teacher's feature at every position.

        Only masked positions are queries. CLS and visible tokens are projected once and held fixed as the prompt
        that every block reads.

        Args:
            latent_BSD: encoder output, S = V + 1 tokens, CLS first, patches in `split.keep_BV` order.
            split: kept and masked patch indices, 0..L-1, CLS not counted.

        Returns:
            (B, L + 1, T), CLS first, patches in raster order; not unit length.

        Raises:
            ShapeError: token count is not V + 1, or L is not this decoder's patch count.

        Source: arXiv 2208.06049, section 3.2.
        """
        prompt_BSD, masked_BMD = self._embed(latent_BSD, split)
        for block in self.decoder_blocks:
            masked_BMD = self._run(block, masked_BMD, prompt_BSD)
        return self._predict(torch.cat([prompt_BSD.to(masked_BMD.dtype), masked_BMD], dim=1), latent_BSD, split)


class PlainDecoder(Decoder):
    """MAE's decoder: mask tokens take the masked places and all tokens attend to all. Its blocks are timm's."""

    @staticmethod
    def _block(width: int, heads: int, mlp_width: int) -> nn.Module:
        norm: Any = partial(nn.LayerNorm, eps=NORM_EPS)
        # timm wants the MLP's width as a ratio and rounds the product down: the half keeps it from losing one.
        return Block(width, heads, mlp_ratio=(mlp_width + 0.5) / width, qkv_bias=True, norm_layer=norm)

    def forward(self, latent_BSD: Tensor, split: MaskSplit) -> Tensor:
        """Predict the target at every position; arguments, result and errors as `PromptingDecoder.forward`.

        Source: arXiv 2111.06377, section 3.
        """
        prompt_BSD, masked_BMD = self._embed(latent_BSD, split)
        tokens_BSD = torch.cat([prompt_BSD, masked_BMD.to(prompt_BSD.dtype)], dim=1)
        for block in self.decoder_blocks:
            tokens_BSD = self._run(block, tokens_BSD)
        return self._predict(tokens_BSD, latent_BSD, split)


AnyDecoder = PromptingDecoder | PlainDecoder | VisibleHead


def build_decoder(
    settings: DecoderSettings, encoder_width: int, grid: Grid, output_width: int, visible_width: int = 0
) -> AnyDecoder:
    """Build the decoder of the settings; the other arguments and errors are those of `Decoder`.

    Raises:
        SettingError: the decoder is `none` and has something to predict, or another one has nothing.
    """
    if settings.kind == "none":
        if output_width or not visible_width:
            raise SettingError(
                "decoder 'none' predicts visible tokens alone, and the target has others; name a decoder"
            )
        return VisibleHead(encoder_width=encoder_width, grid=grid, output_width=visible_width)
    if not output_width:
        raise SettingError(f"decoder {settings.kind!r} has nothing to predict in this target; set decoder=none")
    kind = PromptingDecoder if settings.kind == "prompting" else PlainDecoder
    sizes = settings.model_dump(exclude={"kind", "init"})
    return kind(encoder_width=encoder_width, grid=grid, output_width=output_width, visible_width=visible_width, **sizes)
