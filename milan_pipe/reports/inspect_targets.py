"""Images of what a target store holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from milan_pipe.config.student import MaskSettings
from milan_pipe.drawing.patches import FeatureColours, on_pixels, only_visible, overlaid
from milan_pipe.drawing.sheet import Panel, Row, Sheet
from milan_pipe.loader.dataset import Target, Targets, open_targets
from milan_pipe.reports.gallery import write_gallery
from milan_pipe.reports.samples import choose_samples
from milan_pipe.reports.store_facts import header_facts
from milan_pipe.storage import local_folder
from milan_pipe.student.masking import draw_split, noise_for, visible_count


@dataclass(frozen=True, kw_only=True)
class InspectTargetsReport:
    """What was drawn: `page` is self-contained, `images` has one PNG for each of `keys`."""

    page: str
    images: tuple[str, ...]
    keys: tuple[str, ...]
    views: int


def _visible(view: Target, masking: MaskSettings, epoch: int, grid: tuple[int, int]) -> NDArray[np.bool_]:
    noise_BL = noise_for(masking, epoch, [view.key], grid)
    importance_BL = torch.from_numpy(view.attention_L)[None] if masking.kind == "semantic" else None
    split = draw_split(importance_BL, noise_BL, visible_count(noise_BL.shape[1], masking.ratio))
    return np.asarray(~split.masked_map()[0].numpy())


def _panels(
    number: int, view: Target, visible_L: NDArray[np.bool_], grid: tuple[int, int], colours: FeatureColours
) -> list[Panel]:
    """One view's panel of each row."""
    pixels_HWC, attention_L = view.pixels_HWC, view.attention_L
    top, left, height, width = view.crop
    largest, patches = float(attention_L.max()), len(attention_L)
    share_GG = np.sqrt(attention_L / max(largest, 1e-12)).reshape(grid)
    features_GG3 = colours(view.features_ST[1:]).reshape(*grid, 3)
    mirrored = ", mirrored" if view.flip else ""
    seen = (
        f"{int(visible_L.sum())} of {patches} patches, {100 * float(attention_L[visible_L].sum()):.0f} % of attention"
    )
    features = f"{grid[0]} x {grid[1]} patches of {view.features_ST.shape[1]}"
    return [
        Panel(pixels_HWC, f"view {number}: {width} x {height} at {left}, {top}{mirrored}"),
        Panel(overlaid(pixels_HWC, share_GG), f"largest {largest * patches:.1f} times the mean"),
        Panel(only_visible(pixels_HWC, visible_L.reshape(grid)), seen),
        Panel(on_pixels(features_GG3, *pixels_HWC.shape[:2]), features),
    ]


def target_sheets(
    targets: Targets,
    samples: Sequence[int],
    masking: MaskSettings,
    epoch: int,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Sheet]:
    """Sheets of samples, all in the same colours.

    Raises:
        DataError: the store is damaged.
        SettingError: the mask ratio leaves no patch.
    """
    views = []
    for number, sample in enumerate(samples):
        views.append([targets[sample, view] for view in range(targets.views)])
        on_progress(number + 1, len(samples))
    colours = FeatureColours(np.concatenate([view.features_ST[1:] for row in views for view in row]))
    titles = (
        "stored view",
        "CLS attention, its square root, brightest at the largest weight",
        f"what a student sees in epoch {epoch + 1} ({masking.kind} masking, seed {masking.seed})",
        "patch features, three principal components as red, green and blue",
    )
    sheets = []
    for row in views:
        columns = [
            _panels(number, view, _visible(view, masking, epoch, targets.grid), targets.grid, colours)
            for number, view in enumerate(row)
        ]
        sheets.append(Sheet(row[0].key, [Row(*pair) for pair in zip(titles, zip(*columns, strict=True), strict=True)]))
    return sheets


def inspect_targets(
    targets: str | Path,
    out: str | Path,
    *,
    masking: MaskSettings,
    keys: Sequence[str] = (),
    count: int = 4,
    epoch: int = 0,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> InspectTargetsReport:
    """Draw all views of a few samples: attention, a mask, features.

    Args:
        out: local folder; OUT/index.html is one self-contained page, OUT/KEY.png one image a sample.
        masking: masks are those of a run with the same settings.
        keys: of the samples; none takes `count` of them, spread over the store.
        epoch: of the masks, counted from 0.

    Raises:
        MissingError: no such store or key.
        DataError: the store is damaged.
        SettingError: the mask ratio leaves no patch, or OUT is a URL.
        StoreError: OUT cannot be written.
    """
    folder = local_folder(out, "images")
    opened = open_targets(targets)
    sheets = target_sheets(opened, choose_samples(opened, keys, count), masking, epoch, on_progress)
    facts = header_facts(opened.store) | {"samples": f"{len(opened)} in {len(opened.store.shards)} shards"}
    page, images = write_gallery(folder, "Targets", facts, sheets)
    keys = tuple(sheet.title for sheet in sheets)
    return InspectTargetsReport(page=page, images=images, keys=keys, views=opened.views)
