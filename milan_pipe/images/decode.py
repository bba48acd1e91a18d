"""One encoded image to pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from milan_pipe.errors import DataError, one_line

MAX_PIXELS = 89_478_485
"""Height x width above which an image is refused: 2**28 bytes of RGB, the size at which Pillow warns of a bomb."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


_STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def stored_suffix(data: bytes) -> str:
    """The suffix, of `IMAGE_SUFFIXES`, of an encoded image; raises DataError where it is of another format."""
    with _opened(data) as image:
        if image.format not in _STORED:
            raise DataError(f"images of type {image.format} are not read; convert to {', '.join(_STORED.values())}")
        return _STORED[image.format]


def decode_image(data: bytes) -> Image.Image:
    """The image of `decode_pixels`, for Pillow's operations, as Pillow decodes it: sooner than from those pixels."""
    with _opened(data) as image, _plain_errors():
        image.load()
        turn, rgb = _turn(image), _rgb(image)
    return rgb if turn == _AS_IT_IS else Image.fromarray(_turned(np.asarray(rgb), turn))


Shrink = Callable[[int, int], int]
"""Height and width of an image, as it is seen, to the factor by which it may be smaller: 1, 2, 4 or 8."""


def decode_pixels(data: bytes, shrink: Shrink = lambda *_: 1) -> NDArray[np.uint8]:
    """Decode an image to RGB, turned as its EXIF orientation says.

    An animation gives its first frame; transparency becomes white; 16-bit grey keeps its high byte, as 16-bit colour
    does in Pillow; CMYK is converted without a colour profile. All pixels are Pillow's.

    Args:
        data: JPEG, PNG, WebP, GIF or BMP, whatever the suffix of the file.
        shrink: called once; a JPEG is then decoded at that size, sides rounded up, which is sooner done. Others come at
            full size whatever it says, and so does one whose turn would leave the rounded end at its beginning.

    Returns:
        (height, width, 3) uint8, contiguous.

    Raises:
        DataError: empty, of another format, truncated, damaged, or above `MAX_PIXELS`; one short line without the
            image's name.
    """
    with _opened(data) as image:
        with _plain_errors():
            plain_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
            if not plain_jpeg:
                # First, as the EXIF block may lie behind the pixels.
                image.load()
            transposed, down, across = turn = _turn(image)
        height, width = image.size if transposed else image.size[::-1]
        factor = shrink(height, width)
        if (down < 0 and height % factor) or (across < 0 and width % factor):
            factor = 1
        with _plain_errors():
            pixels_HWC = _jpeg_pixels(data, image, factor) if plain_jpeg else None
            if pixels_HWC is None:
                pixels_HWC = np.array(_rgb(image))
    return _turned(pixels_HWC, turn)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read, and not its pixels."""
    with _plain_errors():
        if not data:
            raise DataError("empty file")
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are read")
        yield image


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What goes wrong inside as one line that says why an image cannot be read."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError("not a JPEG, PNG, WebP, GIF or BMP image, or its header is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"more than the {MAX_PIXELS} pixels that are read") from None
    # Pillow's parsers raise SyntaxError, struct.error, IndexError and more on damaged files.
    except Exception as error:
        raise DataError(f"truncated or damaged: {one_line(error)}") from None


def _jpeg_pixels(data: bytes, image: Image.Image, factor: int) -> NDArray[np.uint8] | None:
    """Pixels of a plain JPEG, sooner than Pillow has them; None where Pillow must say what they are."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            fastdct=False,
            fastupsample=False,
            min_height=-(-image.height // factor),
            min_width=-(-image.width // factor),
        )
    # It refuses what Pillow only warns of, as bytes between two parts.
    except ValueError:
        return None
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips these at 255 when it converts; a viewer shows the high byte.
        high_byte = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


# Of EXIF orientations: whether rows and columns change places, and then the steps along rows and along columns.
_AS_IT_IS = (0, 1, 1)
_TURNS = {2: (0, 1, -1), 3: (0, -1, -1), 4: (0, -1, 1), 5: (1, 1, 1), 6: (1, 1, -1), 7: (1, -1, -1), 8: (1, -1, 1)}


def _turn(image: Image.Image) -> tuple[int, int, int]:
    try:
        orientation = image.getexif().get(0x0112)
    # A damaged EXIF block says nothing about the pixels: viewers show such an image as it is stored.
    except Exception:
        orientation = None
    return _TURNS.get(orientation, _AS_IT_IS) if isinstance(orientation, int) else _AS_IT_IS


def _turned(pixels_HWC: NDArray[np.uint8], turn: tuple[int, int, int]) -> NDArray[np.uint8]:
    transposed, down, across = turn
    return np.ascontiguousarray((pixels_HWC.transpose(1, 0, 2) if transposed else pixels_HWC)[::down, ::across])
