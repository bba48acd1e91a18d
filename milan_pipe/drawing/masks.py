"""An image of views, masks and how well each patch was predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from milan_pipe.drawing.grids import heat, on_pixels, only_visible
from milan_pipe.drawing.sheet import one_line, write_png

_SIDE, _GAP, _CAPTION = 192, 8, 18


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
        panels = (
            view,
            only_visible(view, visible_NL[number].reshape(grid)),
            on_pixels(heat(cosine_NL[number].reshape(grid)), height, width),
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
            draw.text((left, top + 4), one_line(caption)[-28:], fill="black")
    write_png(file, sheet)
