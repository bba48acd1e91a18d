"""How stored pixels become the student's input. Shape suffixes are explained in `milan_pipe.student`."""

from __future__ import annotations

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor


def normalise(pixels_BHWC: Tensor) -> Tensor:
    """(B, 3, H, W) float32 by ImageNet's mean and deviation from (B, H, W, 3) uint8, on the input's device."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=pixels_BHWC.device).mul_(255)
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=pixels_BHWC.device).mul_(255)
    return ((pixels_BHWC.float() - mean) / std).permute(0, 3, 1, 2).contiguous()
