"""One row of an attention map, from the very queries and keys that an attention module computed.

Shape suffixes: B views, N heads, E head width, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Heads:
    """What an attention module computed on its way.

    Attributes:
        query_BNQE: queries per head after their norm, before any rotation.
        key_BNKE: keys likewise; their heads may be fewer (grouped queries).
        rope: the rotary embedding that the module was called with.
    """

    query_BNQE: Tensor
    key_BNKE: Tensor
    rope: Tensor | None


@contextmanager
def record_heads(attention: nn.Module, query_norm: nn.Module, key_norm: nn.Module) -> Iterator[Heads]:
    """Keep queries and keys of one call of `attention`, whatever projections and biases they come from.

    Args:
        query_norm, key_norm: its submodules that queries and keys pass last, identities where it has no such norm.

    Yields:
        Filled in once the module has run.
    """
    heads = Heads(torch.empty(0), torch.empty(0), None)

    def keep_query(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        heads.query_BNQE = output

    def keep_key(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        heads.key_BNKE = output

    def keep_rope(_module: nn.Module, _inputs: Any, keywords: dict[str, Any]) -> None:
        heads.rope = keywords.get("rope")

    hooks = [
        query_norm.register_forward_hook(keep_query),
        key_norm.register_forward_hook(keep_key),
        attention.register_forward_pre_hook(keep_rope, with_kwargs=True),
    ]
    try:
        yield heads
    finally:
        for hook in hooks:
            hook.remove()


def attention_row(query_BNE: Tensor, key_BNKE: Tensor) -> Tensor:
    """Attention of one query per view: softmax over all keys, mean over heads.

    Costs O(K * width). Scores and softmax are float32 in any precision: the smallest of some hundred shares would
    lose their order in bfloat16.

    Returns:
        (B, K) float32, each row sums to 1.
    """
    with torch.autocast(query_BNE.device.type, enabled=False):
        query = query_BNE.float() * query_BNE.shape[-1] ** -0.5
        scores = query[:, :, None] @ key_BNKE.float().transpose(-2, -1)
        row_BK: Tensor = scores.softmax(dim=-1).mean(dim=1)[:, 0]
    return row_BK
