"""AdamW with the parameter groups of masked pretraining."""

from __future__ import annotations

import torch
from torch import nn

_NO_DECAY = ("pos_embed", "cls_token", "mask_token")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, norms, position embeddings, CLS and mask tokens."""
    return parameter.ndim > 1 and not any(part in name for part in _NO_DECAY)


def build_adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in two groups, with and without weight decay."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
