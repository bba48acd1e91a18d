"""Parameter groups: with and without weight decay, and with a learning rate that falls from the head to the input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_NO_DECAY = ("pos_embed", "cls_token", "mask_token")
_FIRST = ("cls_token", "pos_embed", "patch_embed")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, norms, position embeddings, CLS and mask tokens."""
    return parameter.ndim > 1 and not any(part in name for part in _NO_DECAY)


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Share of the learning rate that a ViT's parameter gets: decay ** (depth + 1 - layer).

    Layer 0 holds tokens, positions and patch embedding, layer 1 to `depth` the blocks, layer `depth` + 1 the rest.

    Args:
        name: of the parameter, as timm's ViT has it.

    Source: arXiv 2106.08254 (BEiT), as arXiv 2111.06377 takes it over.
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    layer = int(block[1]) + 1 if block is not None else 0 if name.startswith(_FIRST) else depth + 1
    return float(decay ** (depth + 1 - layer))


def build_adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    scale_of: Callable[[str], float] = lambda _: 1.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in groups of one weight decay and one `lr_scale`.

    Args:
        scale_of: factor on the learning rate, by the parameter's name.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if decays(name, parameter) else 0.0
            scale = scale_of(name)
            group = groups.setdefault(
                (decay, scale), {"params": [], "weight_decay": decay, "lr": lr * scale, "lr_scale": scale}
            )
            group["params"].append(parameter)
    # Those with weight decay first, as the groups of a model without scales have always been.
    ordered = sorted(groups.values(), key=lambda group: (group["weight_decay"] == 0.0, group["lr_scale"]))
    return torch.optim.AdamW(ordered, lr=lr, betas=betas, fused=True)


def cosine_lr(step: int, *, steps: int, warmup_steps: int, peak: float, final: float = 0.0) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up from 0, then half a cosine from `peak` to `final`.

    Source: arXiv 2111.06377, appendix A.1 (per step, not per epoch).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def polynomial_lr(step: int, *, steps: int, warmup_steps: int, peak: float, power: float = 1.0) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up from 0, then `peak` x (1 - step / steps) ** power.

    Source: the ADE20K recipe of arXiv 2106.08254, as MMSegmentation runs it: the decay counts from the first step.
    """
    decayed = float(peak * (1 - step / steps) ** power)
    return decayed * step / warmup_steps if step < warmup_steps else decayed
