"""AdamW's parameter groups, and learning rates by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]
from torch import nn

_NO_DECAY = ("*pos_embed*", "*cls_token*", "*reg_token*", "*mask_token*", "*rope*")


def build_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases, norms, positions, CLS, registers and mask tokens do not decay.

    Args:
        layer_decay: factor on the learning rate from each block to the one below; `model.group_matcher` gives the
            layers, as timm's models have it. Groups then have an `lr_scale`.

    Source: layer decay: arXiv 2106.08254 (BEiT), as arXiv 2111.06377 uses it.
    """
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_NO_DECAY)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=_NO_DECAY, layer_decay=layer_decay)
    # The gradient's norm is summed in this order: changing it changes the last bits of a run that clips.
    groups.sort(key=lambda group: (group["weight_decay"] == 0.0, group.get("lr_scale", 1.0)))
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


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
