"""How stored pixels become the student's input. Shape suffixes are explained in `milan_pipe.student`."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pixels_BHWC: Tensor) -> Tensor:
    """(B, 3, H, W) float32 by ImageNet's mean and deviation from (B, H, W, 3) uint8, on the input's device."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels_BHWC.device).mul_(255)
    std = torch.tensor(IMAGENET_STD, device=pixels_BHWC.device).mul_(255)
    return ((pixels_BHWC.float() - mean) / std).permute(0, 3, 1, 2).contiguous()
