"""An image of segmentations: the image, the truth and the prediction, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from milan_pipe.drawing.sheet import one_line, write_png

_SIDE, _GAP, _CAPTION = 224, 8, 18
_NONE = np.array([255, 255, 255], np.uint8)


def class_colours(classes: int) -> NDArray[np.uint8]:
    """(classes, 3): hues a golden angle apart, so that neighbours differ, in three lightnesses; class 0 is grey."""
    number = np.arange(classes)
    hue, value = (number * 0.61803399) % 1.0, np.array([0.95, 0.7, 0.5])[number % 3]
    angle = (hue[:, None] + np.array([0.0, 2 / 3, 1 / 3])) % 1.0
    share = np.clip(np.abs(angle * 6 - 3) - 1, 0, 1)
    colours = (255 * value[:, None] * (1 - 0.75 * (1 - share))).round().astype(np.uint8)
    colours[0] = 112
    return np.asarray(colours, dtype=np.uint8)


def _painted(index_HW: NDArray[np.int64], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where((index_HW >= 0)[..., None], colours[np.maximum(index_HW, 0)], _NONE)


def _panel(pixels: NDArray[np.uint8]) -> Image.Image:
    height, width = pixels.shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    panel = Image.new("RGB", (_SIDE, _SIDE), "white")
    panel.paste(small, ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return panel


def draw_segmentations(
    file: Path,
    keys: Sequence[str],
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[NDArray[np.int64]],
    predictions: Sequence[NDArray[np.int64]],
    classes: int,
    title: str,
) -> None:
    """Write a PNG with a row for each image, which may be of any size; -1 is drawn white, as no class.

    Args:
        images: (H, W, 3) each.
        truths, predictions: (H, W) each, class indices.

    Raises:
        StoreError: the file cannot be written.
    """
    colours = class_colours(classes)
    row, column = _SIDE + _CAPTION + _GAP, _SIDE + _GAP
    sheet = Image.new("RGB", (3 * column + _GAP, len(images) * row + _CAPTION + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), title, fill="black")
    for number, (key, image, truth, prediction) in enumerate(zip(keys, images, truths, predictions, strict=True)):
        top = _CAPTION + number * row
        known = truth >= 0
        share = float((prediction == truth)[known].mean()) if known.any() else float("nan")
        panels = (image, _painted(truth, colours), _painted(prediction, colours))
        for place, (panel, caption) in enumerate(
            zip(panels, (key, "truth", f"prediction, {100 * share:.1f} % right"), strict=True)
        ):
            left = _GAP + place * column
            draw.text((left, top + 4), one_line(caption)[-34:], fill="black")
            sheet.paste(_panel(panel), (left, top + _CAPTION))
    write_png(file, sheet)
