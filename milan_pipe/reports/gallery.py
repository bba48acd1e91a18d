"""A folder of images with a page that holds all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from milan_pipe.drawing.page import render
from milan_pipe.drawing.sheet import Sheet, draw_sheet
from milan_pipe.reports.own import require_own
from milan_pipe.storage.local import write_file

_LONGEST = 160


def _file_name(key: str) -> str:
    """A key as the name of a file: keys may hold slashes, and must not lead out of the folder."""
    name = quote(key, safe=" ()[]{}+,=@", errors="surrogatepass")
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return f"{name}.png"


def write_gallery(
    folder: Path, title: str, facts: Mapping[str, str], sheets: Sequence[Sheet]
) -> tuple[str, tuple[str, ...]]:
    """Write FOLDER/index.html, self-contained, and a PNG for each sheet, which is titled by its key; returns both.

    Raises:
        StoreError: they cannot be written, or would replace files of something else.
    """
    images, page = [folder / _file_name(sheet.title) for sheet in sheets], folder / "index.html"
    require_own((page, *images))
    for image, sheet in zip(images, sheets, strict=True):
        write_file(image, draw_sheet(sheet))
    write_file(page, render("gallery.html.j2", title=title, facts=facts, sheets=sheets))
    return str(page), tuple(map(str, images))
