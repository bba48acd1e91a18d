"""Images as they are found in the wild, tars that are packed as no tool should, and the command line in-process."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from milan_pipe import cli

# `cjpeg -arithmetic -quality 40` of `scene()`; Pillow reads such files and does not write them.
_ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7gYKBTmCNl4x9"
    "lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHz/yQARCABAAGAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD+UndxMwpXooNeQ2wmeIkWvGhy2T3NY/OW4pcfyITxfJ9XLn+J0P/Z"
)
# For each EXIF orientation, how a camera that was held so stores what a viewer shows (EXIF 2.3, tag 0x0112).
_STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}


@dataclass(frozen=True, kw_only=True)
class WildImage:
    """A file, and what becomes of it.

    Attributes:
        name: of the file, with its suffix.
        data: its bytes.
        shown: (height, width, 3) uint8, what a viewer shows; None where there is nothing to show or read.
        reason: part of the reason that it is skipped with; empty where it is read.
    """

    name: str
    data: bytes
    shown: NDArray[np.uint8] | None = None
    reason: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.rpartition(".")[0]


def scene() -> NDArray[np.uint8]:
    """(64, 96, 3): four colours that tell every turn and mirroring apart."""
    pixels = np.empty((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:] = (230, 30, 30), (30, 200, 30)
    pixels[32:, :48], pixels[32:, 48:] = (40, 40, 220), (240, 240, 60)
    return pixels


def encoded(pixels: NDArray[Any] | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image's file."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank_png(width: int, height: int, depth: int, channels: int, *chunks: bytes, rows: int | None = None) -> bytes:
    """A PNG of zeros, a thousandth of what it becomes; cut after so many rows."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    row, packer = bytes(1 + (width * depth * channels + 7) // 8), zlib.compressobj(9)
    packed = b"".join([*(packer.compress(row) for _ in range(height if rows is None else rows)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def many_scans(pixels: NDArray[Any] | Image.Image, scans: int, **options: Any) -> bytes:
    """A progressive JPEG whose last scan comes so many times more: a few bytes each, and a pass over the image."""
    data = encoded(pixels, "JPEG", progressive=True, **options)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def empty_scans(pixels: NDArray[Any] | Image.Image, scans: int) -> bytes:
    """A JPEG that is not progressive, and has no data: of each scan nothing but its header."""
    data = encoded(pixels, "JPEG")
    start = data.index(b"\xff\xda")
    of_component = (b"\xff\xda\0\x08\1" + bytes([1 + number % 3, 0, 0, 63, 0]) for number in range(scans))
    return data[:start] + b"".join(of_component) + data[-2:]


def slow_bmp(pixels: int) -> bytes:
    """A BMP of runs of one pixel, of a thousand in a row: a microsecond or more for each."""
    runs = b"\1\0" * 1000 + b"\0\0"
    header = struct.pack("<IiiHHIIiiII", 40, 1000, pixels // 1000, 1, 8, 1, len(runs) * pixels // 1000, 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return struct.pack("<2sIHHI", b"BM", start, 0, 0, start) + header + bytes(1024) + runs * (pixels // 1000)


def _of_size(data: bytes, place: int, form: str, side: int) -> bytes:
    """A file whose header says that it is `side` x `side`."""
    return data[:place] + struct.pack(form, side, side) + data[place + struct.calcsize(form) :]


def _hidden_scans(pixels: NDArray[Any]) -> bytes:
    """Behind a marker that has no length, and bytes that would be a long one."""
    data = many_scans(pixels, 1000)
    start = data.index(b"\xff\xda") + 12
    return data[:start] + b"\xff\x05\xff\xff" + data[start:]


@cache
def bombs() -> list[WildImage]:
    """Small files that would take hours or gigabytes: refused before they are decoded."""
    seen = scene()
    webp = bytearray(encoded(seen, "WEBP", lossless=True))
    # 14 bits each, less one, behind the signature of the lossless form.
    sides = int.from_bytes(webp[21:25], "little") >> 28 << 28 | 16382 << 14 | 16382
    webp[21:25] = sides.to_bytes(4, "little")
    jpeg = encoded(seen, "JPEG")
    jpeg = _of_size(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65_000)
    gif, bmp = _of_size(encoded(seen, "GIF"), 6, "<HH", 60_000), _of_size(encoded(seen, "BMP"), 18, "<ii", 40_000)
    alpha, high = (blank_png(width, height, 16, 4, rows=0) for width, height in ((9460, 9460), (1, 90_000_000)))
    wide = blank_png(50_000_000, 1, 16, 4, rows=0)
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10_000_000)))
    png, pixels = encoded(seen), "pixels, more than images.max_pixels 89478485"
    return [
        WildImage(name="bomb.png", data=blank_png(30_000, 30_000, 1, 1, rows=0), reason=f"900000000 {pixels}"),
        WildImage(name="alpha bomb.png", data=alpha, reason=f"9460 x 9460 {pixels}"),
        WildImage(name="high bomb.png", data=high, reason=f"1 x 90000000 {pixels}"),
        WildImage(name="wide bomb.png", data=wide, reason="50000000 x 1 pixels, a side of more than 16777216"),
        WildImage(name="bomb.jpg", data=jpeg, reason=f"4225000000 {pixels}"),
        WildImage(name="bomb.webp", data=bytes(webp), reason=f"268402689 {pixels}"),
        WildImage(name="gif bomb.jpg", data=gif, reason=f"3600000000 {pixels}"),
        WildImage(name="bmp bomb.jpg", data=bmp, reason=f"1600000000 {pixels}"),
        WildImage(name="many scans.jpg", data=many_scans(seen, 1000), reason="scans, more than images.max_scans 100"),
        WildImage(name="empty scans.jpg", data=empty_scans(seen, 1000), reason="a JPEG of 1000 scans, more than"),
        WildImage(name="hidden scans.jpg", data=_hidden_scans(seen), reason="scans, more than images.max_scans 100"),
        WildImage(name="profile bomb.png", data=png[:33] + profile + png[33:], reason="damaged: Decompressed data"),
    ]


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, axis=2)


def _modes() -> list[WildImage]:
    seen = scene()
    image = Image.fromarray(seen)
    on_white = seen.copy()
    on_white[:32, :48] = 255
    clear = np.full((64, 96), 255, np.uint8)
    clear[:32, :48] = 0
    alpha = Image.fromarray(np.dstack([seen, clear]))
    grey = np.asarray(image.convert("L"))
    grey_on_white = _grey(seen)
    grey_on_white[:32, :48] = 255
    palette = image.quantize(8)
    hidden = palette.getpixel((0, 0))
    return [
        WildImage(name="cmyk.jpg", data=encoded(image.convert("CMYK"), "JPEG", quality=95), shown=seen),
        WildImage(name="grey.jpg", data=encoded(image.convert("L"), "JPEG", quality=95), shown=_grey(seen)),
        WildImage(name="grey 16 bit.png", data=encoded(grey.astype(np.uint16) * 257), shown=_grey(seen)),
        WildImage(name="one bit.png", data=encoded(Image.fromarray(seen[..., 0] > 128)), shown=_one_bit(seen)),
        WildImage(name="palette.png", data=encoded(palette), shown=seen),
        WildImage(name="palette clear.png", data=encoded(palette, transparency=hidden), shown=on_white),
        WildImage(name="rgba.png", data=encoded(alpha), shown=on_white),
        WildImage(name="rgba.webp", data=encoded(alpha, "WEBP", lossless=True), shown=on_white),
        WildImage(name="la.png", data=encoded(alpha.convert("LA")), shown=grey_on_white),
        WildImage(name="float.tiff", data=encoded(image.convert("F"), "TIFF"), reason=".tiff are not read"),
    ]


def _one_bit(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(np.where(pixels[..., :1] > 128, 255, 0), 3, axis=2).astype(np.uint8)


def _moving() -> list[WildImage]:
    seen = scene()
    image = Image.fromarray(seen)
    more: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - seen)], "duration": 100}
    gif = encoded(image, "GIF", **more)
    return [
        WildImage(name="moving.gif", data=gif, reason=".gif are not read"),
        WildImage(name="a gif that is called.jpg", data=gif, shown=seen),
        WildImage(name="moving.webp", data=encoded(image, "WEBP", lossless=True, **more), shown=seen),
        WildImage(name="moving.png", data=encoded(image, "PNG", **more), shown=seen),
        WildImage(name="two shots.jpg", data=encoded(image, "MPO", quality=95, **more), shown=seen),
    ]


def _turned() -> list[WildImage]:
    found = []
    for orientation, stored in _STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(np.ascontiguousarray(stored(scene())), "JPEG", quality=95, exif=exif)
        found.append(WildImage(name=f"turned {orientation}.jpg", data=data, shown=scene()))
    return found


def _sizes() -> list[WildImage]:
    long = np.full((10, 20_000, 3), (200, 40, 90), np.uint8)
    return [
        WildImage(name="one pixel.png", data=encoded(long[:1, :1]), shown=long[:1, :1]),
        WildImage(name="long.jpg", data=encoded(long, "JPEG", quality=95), shown=long),
        WildImage(name="high.png", data=encoded(long.transpose(1, 0, 2).copy()), shown=long.transpose(1, 0, 2)),
    ]


def _damaged() -> list[WildImage]:
    seen = scene()
    jpeg = encoded(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8), "JPEG", quality=95)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    return [
        WildImage(name="cut.jpg", data=jpeg[: len(jpeg) // 2], reason="truncated or damaged"),
        WildImage(name="header only.jpg", data=jpeg[:100], reason="damaged"),
        WildImage(name="cut.png", data=encoded(seen)[:-30], reason="truncated or damaged"),
        WildImage(name="empty.jpg", data=b"", reason="empty file"),
        WildImage(name="text.jpg", data=b"not an image\n", reason="not a JPEG, PNG"),
        WildImage(name="page.png", data=b"<!DOCTYPE html><html></html>", reason="not a JPEG, PNG"),
        WildImage(name="pickle.jpg", data=pickle.dumps({}), reason="not a JPEG, PNG"),
        WildImage(name="with a long text.png", data=encoded(seen, pnginfo=text), reason="damaged: Decompressed data"),
        WildImage(name="garbage behind.jpg", data=encoded(seen, "JPEG", quality=95) + b"\0garbage" * 99, shown=seen),
    ]


def _kinds() -> list[WildImage]:
    seen = scene()
    tiff = encoded(seen, "TIFF")
    return [
        WildImage(name="plain.jpg", data=encoded(seen, "JPEG", quality=95), shown=seen),
        WildImage(name="SHOUTED.JPEG", data=encoded(seen, "JPEG", quality=95), shown=seen),
        WildImage(name="waves.jpg", data=encoded(seen, "JPEG", quality=95, progressive=True), shown=seen),
        WildImage(name="arithmetic.jpg", data=_ARITHMETIC, shown=seen),
        WildImage(name="a png that is called.jpg", data=encoded(seen), shown=seen),
        WildImage(name="a jpeg that is called.png", data=encoded(seen, "JPEG", quality=95), shown=seen),
        WildImage(name="a bmp that is called.png", data=encoded(seen, "BMP"), shown=seen),
        WildImage(name="a tiff that is called.jpg", data=tiff, reason="not a JPEG, PNG"),
        WildImage(name="plain.tif", data=tiff, reason=".tif are not read"),
        WildImage(name="plain.BMP", data=encoded(seen, "BMP"), reason=".bmp are not read"),
        WildImage(name="from the web.jfif", data=encoded(seen, "JPEG"), reason=".jfif are not read"),
    ]


def _names() -> list[WildImage]:
    seen, png = scene(), encoded(scene())
    names = ["  spaces  ", "Stra\u00dfe \u20ac \U0001f600", "caf\u00e9", "cafe\u0301", "-rf", "%41%2f", "$(touch x)"]
    return [WildImage(name=f"{name}.png", data=png, shown=seen) for name in (*names, "a'b", "\u0440" * 120)]


def wild_images() -> list[WildImage]:
    """All of them, each with a name and a stem of its own, but for `plain`, `cut`, `moving`, `rgba` and `bomb`."""
    return [*_modes(), *_moving(), *_turned(), *_sizes(), *bombs(), *_damaged(), *_kinds(), *_names()]


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a tar; `kind` and `link` as the tar format has them."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def pack(path: Path, members: Iterable[Member]) -> Path:
    """Write a tar with just these members, whatever they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo()
            # Set here, as the constructor would correct it.
            info.name, info.type, info.linkname, info.size = member.name, member.kind, member.link, len(member.data)
            tar.addfile(info, io.BytesIO(member.data))
    return path


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` printed."""
        found = json.loads(self.out.splitlines()[-1])
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> str:
        """The one line of a mistake of the user."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        line = self.err.splitlines()[-1]
        assert line.startswith("error: ")
        return line


class Command:
    """`milan-pipe` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self._always = words

    def __call__(self, *words: object) -> Ended:
        """Run it with these words and those that are always given."""
        self._monkeypatch.setattr(sys, "argv", ["milan-pipe", *map(str, words), *self._always])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return Ended(code=int(ended.value.code or 0), out=out, err=err)
