"""How stored pixels become the student's input. Shape suffixes are explained in `milan_pipe.student`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

_Channels = Sequence[float]


def normalise(
    pixels_BHWC: Tensor, mean: _Channels = IMAGENET_DEFAULT_MEAN, std: _Channels = IMAGENET_DEFAULT_STD
) -> Tensor:
    """(B, 3, H, W) float32 by mean and deviation, of values 0 to 1, from (B, H, W, 3) uint8, on the input's device."""
    mean_C11, std_C11 = (torch.tensor(v, device=pixels_BHWC.device).mul_(255).view(3, 1, 1) for v in (mean, std))
    # In place, channels outermost: a quarter of the time of the same arithmetic with channels innermost.
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images_BCHW.sub_(mean_C11).div_(std_C11)
