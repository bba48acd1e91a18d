"""An image of any size through a model of one input size: windows, scales and mirrors, averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from milan_pipe.student.pixels import normalise

Classifier = Callable[[Tensor], Tensor]
"""(B, 3, W, W) normalised floats to (B, G, W, W) logits, W the window's side."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride` pixels, the last one at the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def sliding_logits(classify: Classifier, pixels_CHW: Tensor, window: int, stride: int, batch: int = 4) -> Tensor:
    """(G, H, W): mean over the windows that cover each pixel. A side shorter than the window is padded with zeros."""
    height, width = pixels_CHW.shape[-2:]
    padded_CHW = F.pad(pixels_CHW, (0, max(0, window - width), 0, max(0, window - height)))
    tall, wide = padded_CHW.shape[-2:]
    corners = [
        (top, left) for top in window_starts(tall, window, stride) for left in window_starts(wide, window, stride)
    ]
    total_GHW: Tensor | None = None
    count_HW = pixels_CHW.new_zeros((tall, wide))
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        windows = torch.stack([padded_CHW[:, top : top + window, left : left + window] for top, left in some])
        for (top, left), logits_GWW in zip(some, classify(windows), strict=True):
            if total_GHW is None:
                total_GHW = logits_GWW.new_zeros((len(logits_GWW), tall, wide))
            total_GHW[:, top : top + window, left : left + window] += logits_GWW
            count_HW[top : top + window, left : left + window] += 1
    assert total_GHW is not None
    return (total_GHW / count_HW)[:, :height, :width]


def scaled_size(size: tuple[int, int], short: float, long: float) -> tuple[int, int]:
    """Height and width in proportion: the shorter side `short`, unless the longer would pass `long`."""
    factor = min(short / min(size), long / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def predict(
    classify: Classifier,
    image: Image.Image,
    *,
    window: int,
    stride: int,
    short: int,
    scales: Sequence[float],
    flip: bool,
    device: torch.device,
) -> Tensor:
    """(H, W) class indices of an RGB image, at its own size.

    At each scale the image is resized (bilinear, antialiased), its shorter side to `short` x scale and its longer to
    four times that at most; logits come from windows, are resized to the image, and their softmax is averaged over
    scales and, with `flip`, mirrors.
    """
    size = image.height, image.width
    total_GHW: Tensor | None = None
    for scale in scales:
        height, width = scaled_size(size, short * scale, 4 * short * scale)
        scaled = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels_CHW = normalise(torch.from_numpy(np.array(scaled))[None].to(device))[0]
        for mirrored in (False, True) if flip else (False,):
            given_CHW = pixels_CHW.flip(-1) if mirrored else pixels_CHW
            logits_GHW = sliding_logits(classify, given_CHW, window, stride).float()
            logits_GHW = F.interpolate(logits_GHW[None], size=size, mode="bilinear", align_corners=False)[0]
            share_GHW = (logits_GHW.flip(-1) if mirrored else logits_GHW).softmax(dim=0)
            total_GHW = share_GHW if total_GHW is None else total_GHW + share_GHW
    assert total_GHW is not None
    return total_GHW.argmax(dim=0)
