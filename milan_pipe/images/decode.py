"""One encoded image to pixels."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from milan_pipe.config.images import IMAGE_LIMITS, ImageSettings
from milan_pipe.errors import DataError, one_line

# What is odd in a file's metadata is told by thousands of lines, which do not name it. Not while each is read, as
# filters are of all threads.
warnings.filterwarnings("ignore", module=r"PIL\.\w+Plugin")

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# MPO: a JPEG with further pictures behind the first, as of many cameras.
_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

# In how many bytes Pillow's decoder gets a JPEG of more scans than usual: a hundred may be a scan of the whole image.
_USUAL_SCANS = 20
_SMALL_BLOCK = 4096
# Of how many pixels modes are converted at a time, which takes several copies: a photograph of 512 x 512.
_PIECE_PIXELS = 2**18

# Pillow has no room for rows of more than 2**31 bits, and calls that a lack of memory: a pixel has up to 64.
_MOST_SIDE = 2**24

# Each of the parts before the pixels takes up to four, and what Pillow keeps of it more memory than the file.
_MOST_HEADER_READS = 400_000
_SCAN, _END = b"\xda", b"\xd9"
# Not what stands for a byte 255 of the pixels, nor what restarts their code.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_TIFF_TILE = (322, 323)

_FIRST_WITH_LENGTH = b"\xc0"
_BARE_MARKERS = (b"\xd8",)


def stored_suffix(data: bytes, limits: ImageSettings = IMAGE_LIMITS) -> str:
    """The suffix, of `IMAGE_SUFFIXES`, of an encoded image; raises DataError where it is of another format."""
    with opened_image(data, limits) as image:
        if image.format not in _STORED:
            raise DataError(f"images of type {image.format} are not read; convert to jpg, png or webp")
        return _STORED[image.format]


def decode_image(data: bytes, limits: ImageSettings = IMAGE_LIMITS) -> Image.Image:
    """The image of `decode_pixels`, for Pillow's operations, as Pillow decodes it: sooner than from those pixels."""
    with opened_image(data, limits) as image, plain_errors(limits):
        image.load()
        turn = _turn(image)
        if turn == _AS_IT_IS:
            return _whole_rgb(image)
        pixels_HWC = _pixels(image, turn)
    # Its memory is free for what follows.
    del image
    return Image.fromarray(pixels_HWC)


Shrink = Callable[[int, int], int]
"""Height and width of an image, as it is seen, to the factor by which it may be smaller: 1, 2, 4 or 8."""


def decode_pixels(
    data: bytes, shrink: Shrink = lambda *_: 1, limits: ImageSettings = IMAGE_LIMITS
) -> NDArray[np.uint8]:
    """Decode an image to RGB, turned as its EXIF orientation says.

    An animation gives its first frame; transparency becomes white; 16-bit grey keeps its high byte, as 16-bit colour
    does in Pillow; CMYK is converted without a colour profile. All pixels are Pillow's.

    It takes up to 12 bytes of memory a pixel, a WebP 16, with those that are returned and beside the file and some MB;
    one row or column of pixels takes up to 24. `limits` bound them, and the time: PNG, GIF, BMP and JPEGs that Pillow
    decodes are stopped soon after `max_seconds` of their thread. Plain JPEGs and WebPs are not: their pixels and scans
    bound them.

    Args:
        data: JPEG, PNG, WebP, GIF or BMP, whatever the suffix of the file.
        shrink: called once; a JPEG is then decoded at that size, sides rounded up, which is sooner done. Others come at
            full size whatever it says, and so does one whose turn would leave the rounded end at its beginning.

    Returns:
        (height, width, 3) uint8, contiguous.

    Raises:
        DataError: empty, of another format, truncated, damaged, or above `limits`; one short line without the image's
            name.
    """
    with opened_image(data, limits) as image:
        with plain_errors(limits):
            plain_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
            if not plain_jpeg:
                # First, as the EXIF block may lie behind the pixels.
                image.load()
            transposed, down, across = turn = _turn(image)
        height, width = image.size if transposed else image.size[::-1]
        factor = shrink(height, width)
        if (down < 0 and height % factor) or (across < 0 and width % factor):
            factor = 1
        with plain_errors(limits):
            pixels_HWC = _jpeg_pixels(data, image, factor) if plain_jpeg else None
            return _pixels(image, turn) if pixels_HWC is None else _turned(pixels_HWC, turn)


class _TimedFile(io.BytesIO):
    """A file that ends in an error when its thread has worked for too long: only between reads is a decoder stopped.

    So it does after `most_reads`, unless they are None.
    """

    def __init__(self, data: bytes, limits: ImageSettings) -> None:
        super().__init__(data)
        self._limits, self._began, self._reads = limits, time.thread_time(), 0
        self.most_reads: int | None = _MOST_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        # Of the many short reads of a header few: the clock takes longer than they do.
        if (size or 0) >= _SMALL_BLOCK or self._reads % 64 == 0:
            taken = time.thread_time() - self._began
            if taken > self._limits.max_seconds:
                most = f"images.max_seconds {self._limits.max_seconds:g}"
                raise DataError(f"not decoded after {taken:.3g} s of one processor, more than {most}")
        if self.most_reads is not None and self._reads > self.most_reads:
            raise DataError(f"a header of more than {_MOST_HEADER_READS // 4} parts")
        return super().read(size)


@contextmanager
def opened_image(data: bytes, limits: ImageSettings, formats: tuple[str, ...] = _FORMATS) -> Iterator[Image.Image]:
    """The image with its header read, and not its pixels; raises DataError as `decode_pixels`."""
    with plain_errors(limits, formats):
        if not data:
            raise DataError("empty file")
        file = _TimedFile(data, limits)
        image = Image.open(file, formats=formats)
        file.most_reads = None
    with image:
        _require_size(*image.size, limits)
        if isinstance(image, TiffImageFile):
            # Its decoder makes room for whole tiles, however small the image is.
            width, height = (image.tag_v2.get(tag, 0) for tag in _TIFF_TILE)
            if not isinstance(width, int) or not isinstance(height, int):
                raise DataError("the size of its tiles is no number")
            _require_size(width, height, limits, "a tile of ")
        # A scan whose data is missing costs as much time as any other.
        if image.format in ("JPEG", "MPO"):
            scans = _scans_at_most(data)
            if scans > limits.max_scans:
                _require_few_scans(data, limits)
            if scans > _USUAL_SCANS:
                image.decodermaxblock = _SMALL_BLOCK
        yield image


def _require_size(width: int, height: int, limits: ImageSettings, what: str = "") -> None:
    if width * height > limits.max_pixels:
        raise DataError(f"{what}{width} x {height} pixels, more than images.max_pixels {limits.max_pixels}")
    if max(width, height) > _MOST_SIDE:
        raise DataError(f"{what}{width} x {height} pixels, a side of more than {_MOST_SIDE}")


def _scans_at_most(data: bytes) -> int:
    # Those of a thumbnail and of further images too. Faster than `bytes.count`.
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(pair == 0xDAFF)) for pair in pairs)


def _require_few_scans(data: bytes, limits: ImageSettings) -> None:
    scans, place = 0, 2
    while (marker := _JPEG_MARKER.search(data, place)) and marker[1] != _END:
        scans += marker[1] == _SCAN
        place = marker.end()
        # Decoders look for the next marker behind those that do not belong there, and skip no length.
        if marker[1] >= _FIRST_WITH_LENGTH and marker[1] not in _BARE_MARKERS:
            place += int.from_bytes(data[place : place + 2])
    if scans > limits.max_scans:
        raise DataError(f"a JPEG of {scans} scans, more than images.max_scans {limits.max_scans}")


@contextmanager
def plain_errors(limits: ImageSettings, formats: tuple[str, ...] = _FORMATS) -> Iterator[None]:
    """What goes wrong inside as one line that says why an image cannot be read."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        kinds = " or ".join((", ".join(formats[:-1]), formats[-1])).replace("WEBP", "WebP")
        raise DataError(f"not a {kinds} image, or its header is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+ pixels", str(error))
        raise DataError(f"{found[0] if found else error}, more than images.max_pixels {limits.max_pixels}") from None
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


def _boxes(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of pieces that make up the image; a small one is one piece."""
    width, height = image.size
    across = min(width, _PIECE_PIXELS)
    down = _PIECE_PIXELS // across
    return [
        (left, top, min(left + across, width), min(top + down, height))
        for top in range(0, height, down)
        for left in range(0, width, across)
    ]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips these at 255 when it converts; a viewer shows the high byte.
        high_byte = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _whole_rgb(image: Image.Image) -> Image.Image:
    boxes = _boxes(image)
    if len(boxes) == 1 or (image.mode == "RGB" and "transparency" not in image.info):
        return _rgb(image)
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        rgb.paste(_rgb(image.crop(box)), box)
    return rgb


def _pixels(image: Image.Image, turn: tuple[int, int, int]) -> NDArray[np.uint8]:
    """(height, width, 3) of an image, turned; piece by piece."""
    transposed, down, across = turn
    width, height = image.size
    seen_HWC = np.empty((width, height, 3) if transposed else (height, width, 3), np.uint8)
    # Where each pixel of the file goes.
    stored_HWC = seen_HWC[::down, ::across]
    if transposed:
        stored_HWC = stored_HWC.transpose(1, 0, 2)
    boxes = _boxes(image)
    for left, top, right, bottom in boxes:
        piece = image if len(boxes) == 1 else image.crop((left, top, right, bottom))
        stored_HWC[top:bottom, left:right] = np.asarray(_rgb(piece))
    return seen_HWC


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
