"""Attention by torch's fused kernel, or by products and a softmax: whichever is faster where it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fused_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernel wins, forward and backward; docs/performance.md has the measurements."""
    return device.type != "cpu" or dtype != torch.bfloat16


def attend(query_BNQE: Tensor, key_BNKE: Tensor, value_BNKE: Tensor) -> Tensor:
    """(B, N, Q, E): values, mixed by the softmax over the keys of query x key / sqrt(E)."""
    if fused_is_faster(query_BNQE.device, query_BNQE.dtype):
        return F.scaled_dot_product_attention(query_BNQE, key_BNKE, value_BNKE)
    return attend_by_products(query_BNQE, key_BNKE, value_BNKE)


def attend_by_products(query_BNQE: Tensor, key_BNKE: Tensor, value_BNKE: Tensor) -> Tensor:
    """`attend` without the fused kernel."""
    scaled_BNQE = query_BNQE * query_BNQE.shape[-1] ** -0.5
    mixed_BNQE: Tensor = (scaled_BNQE @ key_BNKE.transpose(-2, -1)).softmax(dim=-1) @ value_BNKE
    return mixed_BNQE


def choose_attention(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Set the switch that timm's attention layers have; what calls `attend` needs none."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_is_faster(device, dtype)
