"""A folder of images with a page that holds all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from milan_pipe.drawing.page import render, write_page
from milan_pipe.drawing.sheet import Sheet, data_url, draw_sheet, one_line, write_png

PAGE = "index.html"
_LONGEST = 160


@dataclass(frozen=True)
class Gallery:
    """What a page shows: facts by name, and a sheet for each of `keys`."""

    title: str
    facts: Mapping[str, str]
    keys: Sequence[str]
    sheets: Sequence[Sheet]


def embedded(sheet: Sheet) -> dict[str, Any]:
    """A sheet as the templates take it, images included."""
    return {
        "title": one_line(sheet.title),
        "rows": [
            {
                "title": row.title,
                "panels": [{"url": data_url(panel.pixels), "caption": panel.caption} for panel in row.panels],
            }
            for row in sheet.rows
        ],
    }


def _file_name(key: str) -> str:
    """A key as the name of a file: keys may hold slashes, and must not lead out of the folder."""
    name = quote(key, safe=" ()[]{}+,=@")
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return f"{name}.png"


def write_gallery(folder: Path, gallery: Gallery) -> tuple[Path, list[Path]]:
    """Write FOLDER/index.html, self-contained, and a PNG for each sheet; returns both.

    Raises:
        StoreError: they cannot be written.
    """
    images = []
    for key, sheet in zip(gallery.keys, gallery.sheets, strict=True):
        images.append(folder / _file_name(key))
        write_png(images[-1], draw_sheet(sheet))
    sheets = [embedded(sheet) for sheet in gallery.sheets]
    page = folder / PAGE
    write_page(page, render("gallery.html.j2", title=gallery.title, facts=gallery.facts, sheets=sheets))
    return page, images
