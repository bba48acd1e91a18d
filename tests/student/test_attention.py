"""Attention is the same number by either way, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.nn import functional as F

from milan_pipe.attention import attend, choose_attention, fused_is_faster

CPU = torch.device("cpu")


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 7, 16), (2, 4, 11, 16), (2, 4, 11, 16)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_fused_kernel(dtype: torch.dtype) -> None:
    ours, theirs = inputs(dtype), inputs(dtype)
    weight = torch.randn(2, 4, 7, 16, generator=torch.Generator().manual_seed(1))
    for attention, given in ((attend, ours), (F.scaled_dot_product_attention, theirs)):
        (attention(*given).float() * weight).sum().backward()
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(attend(*ours), F.scaled_dot_product_attention(*theirs), **tolerance)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)


def test_bfloat16_on_a_processor_goes_by_products() -> None:
    block = Block(16, 2)
    choose_attention(block, CPU, torch.bfloat16)
    assert not block.attn.fused_attn
    choose_attention(block, CPU, torch.float32)
    assert block.attn.fused_attn
    assert fused_is_faster(torch.device("cuda"), torch.bfloat16)
