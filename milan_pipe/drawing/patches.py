"""A patch grid over the pixels of an image: any grid, any size, each pixel under its own patch."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from milan_pipe.extras import needs

_HIDDEN = np.array([112, 112, 112], np.uint8)
_OVERLAY = 0.6
_PERCENTILES = [1.0, 99.0]
_Cell = TypeVar("_Cell", bound=np.generic)


def heat(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of numbers: 0 and below dark, 1 and above bright; (..., 3).

    Raises:
        MissingError: matplotlib is not installed.
    """
    with needs("report", "drawing numbers as colours"):
        import matplotlib as mpl
    return np.asarray(mpl.colormaps["viridis"](np.nan_to_num(share.astype(np.float64)), bytes=True)[..., :3])


def on_pixels(cells_GG: NDArray[_Cell], height: int, width: int) -> NDArray[_Cell]:
    """Each pixel gets the value of its cell; (height, width, ...) from (grid down, grid across, ...)."""
    down, across = cells_GG.shape[:2]
    # By hand: the nearest neighbour of PIL rounds, takes no bool, and one to four channels alone.
    rows, columns = (
        (2 * np.arange(pixels) + 1) * cells // (2 * pixels) for pixels, cells in ((height, down), (width, across))
    )
    large: NDArray[_Cell] = cells_GG[rows][:, columns]
    return large


def only_visible(image_HWC: NDArray[np.uint8], visible_GG: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image with its hidden patches grey."""
    return np.where(on_pixels(visible_GG, *image_HWC.shape[:2])[..., None], image_HWC, _HIDDEN)


def overlaid(image_HWC: NDArray[np.uint8], share_GG: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of `heat` over the image's brightness."""
    grey = Image.fromarray(image_HWC).convert("L").convert("RGB")
    return np.asarray(Image.blend(grey, Image.fromarray(on_pixels(heat(share_GG), *image_HWC.shape[:2])), _OVERLAY))


def _unit(features: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = features.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12))


class FeatureColours:
    """Features as colours: three principal components are red, green and blue. One map for all that is compared.

    The outermost hundredths of each projection are cut, so that a few odd patches do not take all the contrast. A
    component's largest entry is positive: the same features have the same colours everywhere.
    """

    def __init__(self, features_NT: NDArray[np.floating]) -> None:
        """Fit to features, which are brought to unit length first, as in the loss."""
        unit_NT = _unit(features_NT)
        self.mean_T = unit_NT.mean(0)
        centred_NT = unit_NT - self.mean_T
        # By hand: scikit-learn's PCA gives components of noise where fewer than three exist; here they are constant.
        variance, axes = np.linalg.eigh(centred_NT.T @ centred_NT)
        axes_T3 = np.zeros((unit_NT.shape[1], 3))
        chosen = [i for i in np.argsort(variance)[::-1][:3] if variance[i] > 1e-9 * max(1.0, float(variance.sum()))]
        axes_T3[:, : len(chosen)] = axes[:, chosen]
        largest_3 = np.abs(axes_T3).argmax(0)
        self.axes_T3 = axes_T3 * np.where(axes_T3[largest_3, np.arange(3)] < 0, -1.0, 1.0)
        self.low_3, high_3 = np.percentile(centred_NT @ self.axes_T3, _PERCENTILES, axis=0)
        self.span_3 = high_3 - self.low_3

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(..., 3) colours of (..., T) features."""
        projected = (_unit(features) - self.mean_T) @ self.axes_T3
        share = np.where(self.span_3 > 0, (projected - self.low_3) / np.where(self.span_3 > 0, self.span_3, 1), 0.5)
        return np.asarray((255 * np.clip(share, 0, 1)).round().astype(np.uint8))
