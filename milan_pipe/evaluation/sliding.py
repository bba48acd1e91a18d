"""An image of any size through a model of one input size: windows, scales and mirrors, averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from milan_pipe.student.pixels import normalise

Classifier = Callable[[Tensor], Tensor]
"""(B, 3, W, W) pixels to (B, G, W, W) logits, W the window's side."""

# Most images are one strip.
_STRIP_VALUES = 2**26


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


Strip = tuple[slice, slice]
"""Rows and columns of an image, all of one of them."""


def strips(classes: int, size: tuple[int, int], most: int = _STRIP_VALUES) -> Iterator[Strip]:
    """Parts of an image of a height and width, of up to `most` scores or of one line along its shorter side."""
    height, width = size
    # Rows lie together in memory: of columns only where a row is long.
    by_columns = width > height and classes * width > most
    length = width if by_columns else height
    step = max(1, most * length // (classes * height * width))
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        yield (slice(0, height), part) if by_columns else (part, slice(0, width))


def resized_strip(logits_Ghw: Tensor, size: tuple[int, int], strip: Strip) -> Tensor:
    """The part `strip` of the (G, H, W) logits that `interpolate` gives for a height and width, bilinear."""
    if strip == (slice(0, size[0]), slice(0, size[1])):
        return F.interpolate(logits_Ghw[None], size=size, mode="bilinear", align_corners=False)[0]
    cut = int(strip[1] != slice(0, size[1]))
    length, part = logits_Ghw.shape[1 + cut], strip[cut]
    # As `interpolate` does, which takes no part: centres of pixels on each other, and the first and last line go on.
    at_N = (torch.arange(part.start, part.stop) + 0.5) * (length / size[cut]) - 0.5
    at_N = at_N.clamp(0, length - 1)
    before_N, after_N, share_N = (n.to(logits_Ghw.device) for n in (at_N.long(), at_N.ceil().long(), at_N.frac()))
    lines_Ghw = logits_Ghw.index_select(1 + cut, before_N).lerp(
        logits_Ghw.index_select(1 + cut, after_N), share_N if cut else share_N[:, None]
    )
    height, width = (side.stop - side.start for side in strip)
    return F.interpolate(lines_Ghw[None], size=(height, width), mode="bilinear", align_corners=False)[0]


class _Shares:
    """The sum of softmaxes at an image's size: held as logits of the model's size, unless those are larger."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._logits: list[Tensor] = []
        self._strips: list[Strip] = []
        self._sum_GHW: Tensor | None = None

    def add(self, logits_Ghw: Tensor) -> None:
        classes = len(logits_Ghw)
        self._logits.append(logits_Ghw)
        self._strips = list(strips(classes, self._size))
        if sum(map(Tensor.numel, self._logits)) > classes * prod(self._size):
            sum_GHW = logits_Ghw.new_empty((classes, *self._size)) if self._sum_GHW is None else self._sum_GHW
            for strip in self._strips:
                sum_GHW[:, *strip] = self._of(strip)
            self._logits, self._sum_GHW = [], sum_GHW

    def _of(self, strip: Strip) -> Tensor:
        start = torch.zeros(()) if self._sum_GHW is None else self._sum_GHW[:, *strip]
        return sum((resized_strip(each, self._size, strip).softmax(dim=0) for each in self._logits), start)

    def classes(self) -> Tensor:
        """(H, W) the class of the largest sum."""
        found_HW = torch.empty(self._size, dtype=torch.int64)
        for strip in self._strips:
            found_HW[strip] = self._of(strip).argmax(dim=0)
        return found_HW


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
    """(H, W) class indices of each RGB image, at its own size, on the CPU.

    At each scale an image is resized (bilinear, antialiased), its shorter side to `short` x scale and its longer to
    four times that at most; logits come from windows, `batch` at a time, are resized to the image, and their softmax is
    averaged over scales and, with `flip`, mirrors. Memory holds logits of the windows' size, and a strip of
    the image's own.
    """
    shares = [_Shares((image.height, image.width)) for image in images]
    for scale in scales:
        given = [_scaled(image, short * scale, device) for image in images]
        for mirrored in (False, True) if flip else (False,):
            turned = [pixels_CHW.flip(-1) for pixels_CHW in given] if mirrored else given
            for share, found_Ghw in zip(shares, sliding_logits(classify, turned, window, stride, batch), strict=True):
                share.add(found_Ghw.flip(-1) if mirrored else found_Ghw)
    return [share.classes() for share in shares]


def _scaled(image: Image.Image, short: float, device: torch.device) -> Tensor:
    height, width = scaled_size((image.height, image.width), short, 4 * short)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return normalise(torch.from_numpy(np.array(scaled))[None].to(device))[0]
