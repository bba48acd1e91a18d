"""Panels with captions in rows: one PNG, or the images of a page."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from milan_pipe.drawing.patches import heat, on_pixels, only_visible

_GAP, _LINE = 8, 14
_LEAST_SIDE, _MOST_SIDE, _SMALL = 192, 224, 128
_QUALITY = 92
_WHITE = np.array([255, 255, 255], np.uint8)


class Panel(NamedTuple):
    """An image (H, W, 3) uint8 and its caption."""

    pixels: NDArray[np.uint8]
    caption: str


class Row(NamedTuple):
    """Panels side by side."""

    title: str
    panels: Sequence[Panel]


class Sheet(NamedTuple):
    """Rows under one title."""

    title: str
    rows: Sequence[Row]


def printable_line(text: str) -> str:
    """Text with line breaks and other characters that do not print escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Text with its line breaks; other characters that do not print escaped."""
    return "\n".join(map(printable_line, text.split("\n")))


def _enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # By a whole number, so that a patch's border stays a border.
    factor = max(1, -(-_LEAST_SIDE // max(pixels.shape[:2])))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def draw_sheet(sheet: Sheet) -> bytes:
    """The sheet as a PNG: panels enlarged by a whole number, a caption over each."""
    # By hand: matplotlib resamples panels, and takes seconds for a sheet.
    large = [[_enlarged(panel.pixels) for panel in row.panels] for row in sheet.rows]
    sides = [(max(p.shape[0] for p in row), max(p.shape[1] for p in row)) for row in large]
    column = max(width for _, width in sides) + _GAP
    width = _GAP + column * max(len(row.panels) for row in sheet.rows)
    height = _GAP + _LINE + sum(down + 2 * _LINE + _GAP for down, _ in sides)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)

    def write(left: int, top: int, text: str, room: int) -> None:
        shown = text = printable_line(text)
        # A character has a pixel at least, and a key may have many thousands.
        text = text[-room:]
        while text and (len(shown) > room or draw.textlength(shown, font) > room):
            shown, text = f"...{text}", text[1:]
        draw.text((left, top), shown, fill="black", font=font)

    write(_GAP, _GAP // 2, sheet.title, width - 2 * _GAP)
    top = _GAP + _LINE
    for row, panels, (down, _) in zip(sheet.rows, large, sides, strict=True):
        write(_GAP, top, row.title, width - 2 * _GAP)
        for number, (panel, pixels) in enumerate(zip(row.panels, panels, strict=True)):
            left = _GAP + number * column
            write(left, top + _LINE, panel.caption, column - _GAP)
            image.paste(Image.fromarray(pixels), (left, top + 2 * _LINE))
        top += down + 2 * _LINE + _GAP
    buffer, said = io.BytesIO(), PngInfo()
    said.add_text("Software", "milan-pipe")
    image.save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()


def mask_sheet(
    title: str,
    keys: Sequence[str],
    pixels_NHWC: NDArray[np.uint8],
    visible_NL: NDArray[np.bool_],
    cosine_NL: NDArray[np.floating],
    grid: tuple[int, int],
) -> Sheet:
    """A row for each of N samples: the view, what the student saw of it, and the cosine of each patch.

    Args:
        cosine_NL: between prediction and target; drawn from 0, dark, to 1, bright.
        grid: patches down and across, in raster order.
    """
    rows = []
    for key, pixels_HWC, visible_L, cosine_L in zip(keys, pixels_NHWC, visible_NL, cosine_NL, strict=True):
        seen = Panel(only_visible(pixels_HWC, visible_L.reshape(grid)), f"{int(visible_L.sum())} patches seen")
        cosines = on_pixels(heat(cosine_L.reshape(grid)), *pixels_HWC.shape[:2])
        rows.append(Row(key, [Panel(pixels_HWC, "view"), seen, Panel(cosines, f"cosine {cosine_L.mean():.3f}")]))
    return Sheet(title, rows)


class Segmentation(NamedTuple):
    """An image (H, W, 3) of any size, and class indices (H, W) that are true and predicted; -1 is no class."""

    key: str
    image: NDArray[np.uint8]
    truth: NDArray[np.int64]
    prediction: NDArray[np.int64]


def segmentation_sheet(title: str, segmentations: Sequence[Segmentation], classes: int) -> Sheet:
    """A row for each: image, truth and prediction; no class is white, class 0 grey.

    Hues of classes are a golden angle apart, so that neighbours differ, in three lightnesses.
    """
    number = np.arange(classes)
    value = np.array([0.95, 0.7, 0.5])[number % 3]
    shares = np.array([colorsys.hsv_to_rgb(n * 0.61803399 % 1.0, 0.75, v) for n, v in enumerate(value)])
    colours = (255 * shares).round().astype(np.uint8)
    colours[0] = 112

    def panel(pixels: NDArray[np.uint8], caption: str) -> Panel:
        image = Image.fromarray(pixels)
        padded = ImageOps.pad(image, (_MOST_SIDE, _MOST_SIDE), Image.Resampling.NEAREST, color="white")
        return Panel(np.asarray(padded), caption)

    def painted(index_HW: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.where((index_HW >= 0)[..., None], colours[np.maximum(index_HW, 0)], _WHITE)

    rows = []
    for key, image, truth, prediction in segmentations:
        known = truth >= 0
        share = float((prediction == truth)[known].mean()) if known.any() else float("nan")
        predicted = panel(painted(prediction), f"prediction, {100 * share:.1f} % right")
        rows.append(Row(key, [panel(image, "image"), panel(painted(truth), "truth"), predicted]))
    return Sheet(title, rows)


def data_url(pixels: NDArray[np.uint8]) -> str:
    """An image as part of a page: a small one without loss, a larger one as JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if max(pixels.shape[:2]) <= _SMALL:
        image.save(buffer, format="PNG", optimize=True)
        return file_url(buffer.getvalue(), "png")
    image.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return file_url(buffer.getvalue(), "jpeg")


def file_url(data: bytes, kind: str) -> str:
    """The file of an image as part of a page; `kind`: `png`, `jpeg` or `svg+xml`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
