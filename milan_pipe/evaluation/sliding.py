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
"""(B, 3, W, W) pixels to (B, G, W, W) logits, W the window's side."""


def usual_stride(window: int) -> int:
    """Two thirds of the window: 341 of 512."""
    return max(1, round(window * 341 / 512))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride` pixels, the last one at the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def window_corners(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Top and left of the windows of an image, row by row."""
    tall, wide = (window_starts(length, window, stride) for length in (height, width))
    return [(top, left) for top in tall for left in wide]


def sliding_logits(
    classify: Classifier, images: Sequence[Tensor], window: int, stride: int, batch: int
) -> list[Tensor]:
    """Of each (3, H, W) image (G, H, W), the mean over the windows that cover each pixel.

    Pixels are what `classify` takes. A side shorter than the window is padded with zeros. Each call of `classify` has
    up to `batch` windows, of as many images as it takes.
    """
    padded, corners = [], []
    for number, pixels_CHW in enumerate(images):
        height, width = pixels_CHW.shape[-2:]
        padded.append(F.pad(pixels_CHW, (0, max(0, window - width), 0, max(0, window - height))))
        corners += [(number, *corner) for corner in window_corners(height, width, window, stride)]
    totals: dict[int, Tensor] = {}
    counts = [torch.zeros(pixels_CHW.shape[-2:], device=pixels_CHW.device) for pixels_CHW in padded]
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        cut = [padded[image][:, top : top + window, left : left + window] for image, top, left in some]
        # Sums of several windows need more digits than a device may compute in.
        for (image, top, left), logits_GWW in zip(some, classify(torch.stack(cut)).float(), strict=True):
            if image not in totals:
                totals[image] = logits_GWW.new_zeros((len(logits_GWW), *padded[image].shape[-2:]))
            totals[image][:, top : top + window, left : left + window] += logits_GWW
            counts[image][top : top + window, left : left + window] += 1
    return [
        (totals[image] / counts[image])[:, : pixels_CHW.shape[-2], : pixels_CHW.shape[-1]]
        for image, pixels_CHW in enumerate(images)
    ]


def scaled_size(size: tuple[int, int], short: float, long: float) -> tuple[int, int]:
    """Height and width in proportion: the shorter side `short`, unless the longer would pass `long`."""
    factor = min(short / min(size), long / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def predict(
    classify: Classifier,
    images: Sequence[Image.Image],
    *,
    window: int,
    stride: int,
    short: int,
    scales: Sequence[float],
    flip: bool,
    device: torch.device,
    batch: int,
) -> list[Tensor]:
    """(H, W) class indices of each RGB image, at its own size.

    At each scale an image is resized (bilinear, antialiased), its shorter side to `short` x scale and its longer to
    four times that at most; logits come from windows, `batch` at a time, are resized to the image, and their softmax is
    averaged over scales and, with `flip`, mirrors.
    """
    totals: list[Tensor] = []
    for scale in scales:
        given = [_scaled(image, short * scale, device) for image in images]
        for mirrored in (False, True) if flip else (False,):
            turned = [pixels_CHW.flip(-1) for pixels_CHW in given] if mirrored else given
            shares = []
            for image, found_GHW in zip(images, sliding_logits(classify, turned, window, stride, batch), strict=True):
                size = image.height, image.width
                logits_GHW = F.interpolate(found_GHW[None], size=size, mode="bilinear", align_corners=False)[0]
                shares.append((logits_GHW.flip(-1) if mirrored else logits_GHW).softmax(dim=0))
            totals = [a + b for a, b in zip(totals, shares, strict=True)] if totals else shares
    return [total_GHW.argmax(dim=0) for total_GHW in totals]


def _scaled(image: Image.Image, short: float, device: torch.device) -> Tensor:
    height, width = scaled_size((image.height, image.width), short, 4 * short)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return normalise(torch.from_numpy(np.array(scaled))[None].to(device))[0]
