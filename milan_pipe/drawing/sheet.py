"""Panels with captions, laid out in rows: as one PNG, and as the images of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from milan_pipe.errors import StoreError

_GAP, _LINE, _LEAST_SIDE = 8, 14, 192
_SMALL = 128
_QUALITY = 92


@dataclass(frozen=True)
class Panel:
    """An image (H, W, 3) uint8 with what is said of it."""

    pixels: NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class Row:
    """Panels of one kind, side by side."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Sheet:
    """What is shown of one sample."""

    title: str
    rows: Sequence[Row]


def one_line(text: str) -> str:
    """Text as it may be drawn or shown: what does not print, line breaks too, is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _enlargement(panel: Panel) -> int:
    """Whole pixels only, so that a patch's border stays a border."""
    return max(1, -(-_LEAST_SIDE // int(max(panel.pixels.shape[:2]))))


def _fitting(
    text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    text = one_line(text)
    if len(text) <= width and draw.textlength(text, font) <= width:
        return text
    # A character has a pixel at least, and a key may have many thousands.
    text = text[-width:]
    while text and draw.textlength(f"...{text}", font) > width:
        text = text[1:]
    return f"...{text}"


def write_png(file: Path, image: Image.Image) -> None:
    """Write an image, its folder too.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, format="PNG")
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror or error}") from error


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The sheet as one image: panels enlarged by a whole number, a caption over each."""
    large = [
        [panel.pixels.repeat(_enlargement(panel), 0).repeat(_enlargement(panel), 1) for panel in row.panels]
        for row in sheet.rows
    ]
    sides = [(max(p.shape[0] for p in row), max(p.shape[1] for p in row)) for row in large]
    column = max(width for _, width in sides) + _GAP
    width = _GAP + column * max(len(row.panels) for row in sheet.rows)
    height = _GAP + _LINE + sum(down + 2 * _LINE + _GAP for down, _ in sides)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)

    def write(left: int, top: int, text: str, room: int) -> None:
        draw.text((left, top), _fitting(text, room, draw, font), fill="black", font=font)

    write(_GAP, _GAP // 2, sheet.title, width - 2 * _GAP)
    top = _GAP + _LINE
    for row, panels, (down, _) in zip(sheet.rows, large, sides, strict=True):
        write(_GAP, top, row.title, width - 2 * _GAP)
        for number, (panel, pixels) in enumerate(zip(row.panels, panels, strict=True)):
            left = _GAP + number * column
            write(left, top + _LINE, panel.caption, column - _GAP)
            image.paste(Image.fromarray(pixels), (left, top + 2 * _LINE))
        top += down + 2 * _LINE + _GAP
    return image


def data_url(pixels: NDArray[np.uint8]) -> str:
    """An image as part of a page: a small one without loss, a larger one as JPEG."""
    small = max(pixels.shape[:2]) <= _SMALL
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return file_url(buffer.getvalue())


def file_url(data: bytes) -> str:
    """A PNG or JPEG file as part of a page."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
