"""A picture of views, masks and how well each patch was predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from milan_pipe.errors import StoreError

_SIDE, _GAP, _CAPTION = 192, 8, 18
_HIDDEN = np.array([112, 112, 112])
# From dark blue over green to yellow, as eyes that cannot tell red from green also see it.
_HEAT = np.array([[0.27, 0.0, 0.33], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.37, 0.79, 0.38], [0.99, 0.91, 0.14]])


def heat(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of numbers: 0 and below dark, 1 and above bright; (..., 3)."""
    position = np.clip(np.nan_to_num(share.astype(np.float64)), 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(position.astype(np.int64), len(_HEAT) - 2)
    part = (position - low)[..., None]
    colours: NDArray[np.uint8] = (255 * (_HEAT[low] * (1 - part) + _HEAT[low + 1] * part)).round().astype(np.uint8)
    return colours


def _enlarged(cells: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Each cell of a grid as a rectangle; the image's size must be a multiple of the grid's."""
    large: NDArray[np.uint8] = cells.repeat(height // cells.shape[0], 0).repeat(width // cells.shape[1], 1)
    return large


def draw_masks(
    file: Path,
    keys: tuple[str, ...],
    pixels_NHWC: NDArray[np.uint8],
    visible_NL: NDArray[np.bool_],
    cosine_NL: NDArray[np.floating],
    grid: tuple[int, int],
    title: str,
) -> None:
    """Write a PNG with a row for each of N samples: the view, what the student saw of it, and the cosine map.

    Args:
        cosine_NL: between prediction and target; drawn from 0, dark, to 1, bright.
        grid: patches down and across, in raster order.

    Raises:
        StoreError: the file cannot be written.
    """
    count, height, width = pixels_NHWC.shape[:3]
    row, column = _SIDE + _CAPTION + _GAP, _SIDE + _GAP
    sheet = Image.new("RGB", (3 * column + _GAP, count * row + _CAPTION + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), title, fill="black")
    for number in range(count):
        view = pixels_NHWC[number]
        seen = _enlarged(visible_NL[number].reshape(*grid, 1).astype(np.uint8), height, width).astype(bool)
        panels = (
            view,
            np.where(seen, view, _HIDDEN).astype(np.uint8),
            _enlarged(heat(cosine_NL[number].reshape(grid)), height, width),
        )
        top = _CAPTION + number * row
        captions = (
            keys[number],
            f"{int(visible_NL[number].sum())} patches seen",
            f"cosine {cosine_NL[number].mean():.3f}",
        )
        for place, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
            left = _GAP + place * column
            sheet.paste(Image.fromarray(panel).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top + _CAPTION))
            draw.text((left, top + 4), caption[-28:], fill="black")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror or error}") from error
