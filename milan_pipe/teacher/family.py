"""What every family of image towers does, and the one attention row that they share.

Shape suffixes: B views, S = 1 + L tokens, L patches, T feature width, N heads, Q queries, E head width, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TowerSizes:
    """Height and width of input and patch in pixels, patches down and across, and T, the width of one feature."""

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    width: int


class TowerFamily(Protocol):
    """One kind of image tower. Methods but `problem` take only towers without one."""

    def problem(self, visual: Any) -> str | None:
        """Why this tower cannot serve, as the middle of a sentence; None where it can."""

    def sizes(self, visual: Any) -> TowerSizes:
        """Sizes as they are now."""

    def resize(self, visual: Any, side: int) -> None:
        """Take another input, `side` pixels square, a whole number of patches.

        Learned position embeddings are interpolated (bicubic, antialiased), rotary ones computed for the new grid.
        """

    def outputs(self, visual: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Run the tower once on normalised pixels of its own size.

        Returns:
            features (B, S, T): CLS or pooled token first, then patches in raster order; not unit length. All tokens are
            past the tower's final norm and its projection, where it has one.
            importance (B, L) float32: the attention of the query that pools over the patch keys, softmax over all keys,
            mean over heads, columns of CLS and register tokens dropped, so that a row sums to at most 1. The query is
            the last block's CLS query, or the one of attention pooling.

        Source: arXiv 2208.06049, sections 3.1 and 3.3.
        """


@dataclass
class Heads:
    """Queries and keys of an attention module after their norms, and the rotary embedding that they do not have yet.

    Keys may have fewer heads (grouped queries).
    """

    query_BNQE: Tensor
    key_BNKE: Tensor
    rope: Tensor | None


@contextmanager
def record_heads(attention: nn.Module, query_norm: nn.Module, key_norm: nn.Module) -> Iterator[Heads]:
    """Record one call of `attention`; queries and keys are what its submodules `query_norm` and `key_norm` give."""
    heads = Heads(torch.empty(0), torch.empty(0), None)

    def keep(name: str, value: Any) -> None:
        setattr(heads, name, value)

    with (
        query_norm.register_forward_hook(lambda _module, _inputs, output: keep("query_BNQE", output)),
        key_norm.register_forward_hook(lambda _module, _inputs, output: keep("key_BNKE", output)),
        attention.register_forward_pre_hook(lambda _m, _i, kwargs: keep("rope", kwargs.get("rope")), with_kwargs=True),
    ):
        yield heads


def attention_row(query_BNE: Tensor, key_BNKE: Tensor) -> Tensor:
    """Attention of one query per view: softmax over all keys, mean over heads; (B, K) float32, each row sums to 1."""
    # In bfloat16 the smallest of some hundred shares would lose their order.
    with torch.autocast(query_BNE.device.type, enabled=False):
        query = query_BNE.float() * query_BNE.shape[-1] ** -0.5
        scores = query[:, :, None] @ key_BNKE.float().transpose(-2, -1)
        row_BK: Tensor = scores.softmax(dim=-1).mean(dim=1)[:, 0]
    return row_BK
