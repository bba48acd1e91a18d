"""One encoded image to pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan_pipe.errors import DataError, one_line

MAX_PIXELS = 89_478_485
"""Height x width above which an image is refused: 2**28 bytes of RGB, the size at which Pillow warns of a bomb."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def decode_image(data: bytes) -> Image.Image:
    """Decode an image to RGB at full size, turned as its EXIF orientation says.

    An animation gives its first frame; transparency becomes white; 16-bit grey keeps its high byte, as 16-bit colour
    does in Pillow; CMYK is converted without a colour profile.

    Args:
        data: JPEG, PNG, WebP, GIF or BMP, whatever the suffix of the file.

    Raises:
        DataError: empty, of another format, truncated, damaged, or above `MAX_PIXELS`; one short line without the
            image's name.
    """
    if not data:
        raise DataError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are read")
            image.load()
            return _turned(_rgb(image), image)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError("not a JPEG, PNG, WebP, GIF or BMP image, or its header is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"more than the {MAX_PIXELS} pixels that are read") from None
    # Pillow's parsers raise SyntaxError, struct.error, IndexError and more on damaged files.
    except Exception as error:
        raise DataError(f"truncated or damaged: {one_line(error)}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips these at 255 when it converts; a viewer shows the high byte.
        high_byte = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(rgb: Image.Image, image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112)
    # A damaged EXIF block says nothing about the pixels: viewers show such an image as it is stored.
    except Exception:
        return rgb
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)
