"""Views: crop and flip of an image, as pure arithmetic; how one is rendered and encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from milan_pipe.config.images import Renderer, ViewSettings
from milan_pipe.errors import DataError, SettingError, ShapeError
from milan_pipe.random_bits import raw_bits, uniform

_TRIES = 10
_DRAWS = 1 + 4 * _TRIES


@dataclass(frozen=True, kw_only=True)
class View:
    """One view: a crop box in source pixels (EXIF turn applied) and whether it is mirrored after the crop."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_view(settings: ViewSettings, key: str, index: int, height: int, width: int) -> View:
    """Draw view `index` of an image: a pure function of settings, key, index and the image's size.

    Area is uniform over `scale`, width / height log-uniform over `ratio`, the position uniform; after ten crops that do
    not fit, the largest centred crop within `ratio`. The flip does not depend on the size, nothing on `settings.count`.

    Args:
        key: the sample's key.
        index: 0 to 2**64 - 1.
        height, width: of the source image in pixels, at least 1.

    Raises:
        ShapeError: height or width is below 1.
        SettingError: index is out of its range.

    Source: RandomResizedCrop, arXiv 1409.4842, with torchvision's arithmetic.
    """
    if height < 1 or width < 1:
        raise ShapeError(f"an image needs height and width of at least 1, found {height} x {width}")
    if not 0 <= index < 2**64:
        raise SettingError(f"a view index must be 0 to 2**64 - 1, found {index}")
    digest = blake2b(settings.seed.to_bytes(8, "little") + key.encode(), digest_size=16).digest()
    draws = uniform(raw_bits([digest], _DRAWS, sequence=index)[0]).tolist()
    flip = draws[0] < settings.flip
    low, high = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    for attempt in range(_TRIES):
        u_area, u_ratio, u_top, u_left = draws[1 + 4 * attempt : 5 + 4 * attempt]
        area = height * width * (settings.scale[0] + u_area * (settings.scale[1] - settings.scale[0]))
        ratio = math.exp(low + u_ratio * (high - low))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(u_top * (height - crop_height + 1)), int(u_left * (width - crop_width + 1))
            return View(top=top, left=left, height=crop_height, width=crop_width, flip=flip)
    crop_height, crop_width = height, width
    if width / height < settings.ratio[0]:
        crop_height = min(height, max(1, round(width / settings.ratio[0])))
    elif width / height > settings.ratio[1]:
        crop_width = min(width, max(1, round(height * settings.ratio[1])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return View(top=top, left=left, height=crop_height, width=crop_width, flip=flip)


def shrink_factor(views: Sequence[View], size: int) -> int:
    """How much smaller an image may be decoded: each view has twice the pixels along a side then that it is given."""
    least = min(min(view.height, view.width) for view in views)
    return next((factor for factor in (8, 4, 2) if least >= 2 * size * factor), 1)


def aligned(view: View, factor: int) -> View:
    """The view with its borders on multiples of `factor`, no farther out at the bottom and on the right."""
    top, left = view.top // factor * factor, view.left // factor * factor
    bottom, right = (view.top + view.height) // factor * factor, (view.left + view.width) // factor * factor
    return View(top=top, left=left, height=bottom - top, width=right - left, flip=view.flip)


def shrunk(view: View, factor: int) -> View:
    """An aligned view in the image that was decoded smaller by `factor`."""
    top, left, height, width = (length // factor for length in (view.top, view.left, view.height, view.width))
    return View(top=top, left=left, height=height, width=width, flip=view.flip)


RENDERER: Renderer = "torch"
"""Which one `render_view` is; stores name the one that drew their views."""


def render_view(pixels_HWC: NDArray[np.uint8], view: View, size: int) -> NDArray[np.uint8]:
    """Crop, then scale (bicubic, antialiased) and mirror: no pixel outside of the crop is read.

    The bytes are the same on every processor: torch scales uint8 in whole numbers.

    Args:
        pixels_HWC: uint8, RGB, as `decode_pixels` gives them.
        size: height and width of the result in pixels.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        ShapeError: the image is not RGB, the view does not lie inside it, or size is below 1.
    """
    bottom, right = view.top + view.height, view.left + view.width
    rgb = pixels_HWC.dtype == np.uint8 and pixels_HWC.ndim == 3 and pixels_HWC.shape[2] == 3
    inside = rgb and 0 <= view.top < bottom <= pixels_HWC.shape[0] and 0 <= view.left < right <= pixels_HWC.shape[1]
    if not inside or size < 1:
        raise ShapeError(
            f"expected an RGB image with the view inside and a size of at least 1, found {pixels_HWC.dtype} of "
            f"{pixels_HWC.shape}, {view} and size {size}"
        )
    # A batch of one with channels innermost in every stride is scaled fastest. Copies and mirrors are numpy's: torch
    # would share them out to processors, and each of many rendering threads would start threads for all of these.
    crop_1HWC = torch.from_numpy(np.ascontiguousarray(pixels_HWC[view.top : bottom, view.left : right]))[None]
    scaled_1CHW = F.interpolate(
        crop_1HWC.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True, align_corners=False
    )
    scaled_HWC = np.ascontiguousarray(scaled_1CHW[0].permute(1, 2, 0).numpy())
    if not view.flip:
        return scaled_HWC
    mirrored_HWC = np.empty_like(scaled_HWC)
    for channel in range(3):  # several times as fast as all at once
        mirrored_HWC[:, :, channel] = scaled_HWC[:, ::-1, channel]
    return mirrored_HWC


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode a view as JPEG with 4:2:0 colour; the same pixels give the same bytes.

    Args:
        pixels: (height, width, 3) uint8, RGB, at most 65500 on a side.
        quality: 1 to 100.

    Raises:
        ShapeError: pixels of another shape or type.
        DataError: quality out of range, or the encoder refused.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ShapeError(f"expected (height, width, 3) uint8, found {pixels.shape} {pixels.dtype}")
    if not 1 <= quality <= 100:
        raise DataError(f"JPEG quality must be 1 to 100, found {quality}")
    try:
        encoded: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
        )
        return encoded
    except ValueError as error:
        raise DataError(f"JPEG cannot be encoded: {error}") from None


def decode_jpeg(
    data: bytes | memoryview, into: NDArray[np.uint8] | None = None, *, side: int | None = None
) -> NDArray[np.uint8]:
    """Decode a stored view, faster than Pillow and to the same pixels.

    Args:
        data: an RGB or grey JPEG. EXIF is not read.
        into: memory for the pixels of a square view, of their shape.
        side: height and width, where they are known; a JPEG that says others is not decoded.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        DataError: empty, truncated, damaged, or of another size than `into` or `side`.
    """
    if not data:
        raise DataError("JPEG cannot be decoded: empty")
    try:
        if side is not None:
            _require_size(simplejpeg.decode_jpeg_header(data), side)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True, buffer=into
        )
    except KeyError as error:
        raise DataError(f"JPEG cannot be decoded: subsampling {error}, which no stored view has") from None
    except ValueError as error:
        raise DataError(f"JPEG cannot be decoded: {error}") from None
    if into is not None:
        _require_size(pixels.shape, into.shape[0])
    return pixels


def _require_size(found: Sequence[int | str], side: int) -> None:
    if (found[0], found[1]) != (side, side):
        raise DataError(f"JPEG has {found[0]} x {found[1]} pixels, expected {side} x {side}")
