"""Cells of a patch grid laid over the pixels of an image: of any grid and any size, each pixel under its own patch."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# From dark blue over green to yellow, as eyes that cannot tell red from green also see it.
_HEAT = np.array([[0.27, 0.0, 0.33], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.37, 0.79, 0.38], [0.99, 0.91, 0.14]])
_HIDDEN = np.array([112, 112, 112], np.uint8)
_OVERLAY = 0.6
_Cell = TypeVar("_Cell", bound=np.generic)
_LUMA = np.array([0.299, 0.587, 0.114])


def heat(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of numbers: 0 and below dark, 1 and above bright; (..., 3)."""
    position = np.clip(np.nan_to_num(share.astype(np.float64)), 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(position.astype(np.int64), len(_HEAT) - 2)
    part = (position - low)[..., None]
    colours: NDArray[np.uint8] = (255 * (_HEAT[low] * (1 - part) + _HEAT[low + 1] * part)).round().astype(np.uint8)
    return colours


def _cell_of(pixels: int, cells: int) -> NDArray[np.int64]:
    """The cell that the middle of each pixel lies in."""
    return (2 * np.arange(pixels) + 1) * cells // (2 * pixels)


def on_pixels(cells_GG: NDArray[_Cell], height: int, width: int) -> NDArray[_Cell]:
    """Each pixel gets the value of its cell; (height, width, ...) from (grid down, grid across, ...)."""
    down, across = cells_GG.shape[:2]
    large: NDArray[_Cell] = cells_GG[_cell_of(height, down)][:, _cell_of(width, across)]
    return large


def only_visible(image_HWC: NDArray[np.uint8], visible_GG: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image with its hidden patches grey."""
    seen = on_pixels(visible_GG, *image_HWC.shape[:2])[..., None]
    return np.where(seen, image_HWC, _HIDDEN)


def overlaid(image_HWC: NDArray[np.uint8], share_GG: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of `heat` over the image's brightness."""
    brightness_HW1 = (image_HWC @ _LUMA)[..., None]
    colours_HWC = on_pixels(heat(share_GG), *image_HWC.shape[:2])
    mixed = (1 - _OVERLAY) * brightness_HW1 + _OVERLAY * colours_HWC.astype(np.float64)
    return np.asarray(mixed.round().astype(np.uint8))
