"""What one image may cost: pixels, scans and seconds are bounded, and so is memory by pixels."""

from __future__ import annotations

import gc
import io
import itertools
import json
import re
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags
from support.wild import WildImage, blank_png, bombs, chunk, encoded, many_scans, scene, slow_bmp

from milan_pipe.config.images import MAX_PIXELS, ImageSettings
from milan_pipe.errors import DataError, LabelError
from milan_pipe.images.ahead import decoded_ahead
from milan_pipe.images.decode import decode_image, decode_pixels
from milan_pipe.images.masked import MaskRule, decode_mask

WAYS: list[Callable[..., Any]] = [decode_image, decode_pixels]


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decode", WAYS)
@pytest.mark.parametrize("bomb", bombs(), ids=lambda bomb: bomb.stem)
def test_bombs_are_refused_with_what_was_found_and_the_limit(bomb: WildImage, decode: Callable[..., Any]) -> None:
    with pytest.raises(DataError) as refused:
        decode(bomb.data)
    assert bomb.reason in str(refused.value)
    assert "\n" not in str(refused.value)


# --- pixels


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("decode", WAYS)
def test_an_image_of_as_many_pixels_as_are_allowed_is_read_and_of_one_more_is_not(
    kind: str, decode: Callable[..., Any]
) -> None:
    data = encoded(noise(8, 9), kind)
    assert np.asarray(decode(data, limits=ImageSettings(max_pixels=72))).shape == (8, 9, 3)
    with pytest.raises(DataError, match=r"^9 x 8 pixels, more than images\.max_pixels 71$"):
        decode(data, limits=ImageSettings(max_pixels=71))


def test_the_usual_limit_is_the_one_that_pillow_warns_above() -> None:
    assert Image.MAX_IMAGE_PIXELS == ImageSettings().max_pixels == MAX_PIXELS


@pytest.mark.parametrize("size", [(33_554_426, 1, 16, 4), (89_478_484, 1, 8, 3), (1, 2**24 + 1, 1, 1)])
def test_a_side_above_what_decoders_have_room_for_is_refused(size: tuple[int, int, int, int]) -> None:
    width, height, *_ = size
    with pytest.raises(DataError, match=f"^{width} x {height} pixels, a side of more than {2**24}$"):
        decode_pixels(blank_png(*size, rows=0))


def test_the_longest_row_of_the_largest_pixels_is_decoded() -> None:
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_pixels(blank_png(2**24, 1, 16, 4, rows=0))


# --- memory

# For tables, pieces of the image and blocks of the file.
_BESIDE = 8 * 2**20
_SIDE = 1536
_PEAKS = """
import json, os, resource, sys
from pathlib import Path
from milan_pipe.config.images import ImageSettings
from milan_pipe.images import decode
from PIL import Image
Image.init()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for file in sorted(Path(sys.argv[1]).iterdir()):
    for way in ("decode_image", "decode_pixels"):
        # A process for each: a peak does not go down.
        if not os.fork():
            data, before = file.read_bytes(), peak()
            getattr(decode, way)(data, limits=ImageSettings(max_pixels=int(sys.argv[2])))
            print(json.dumps([file.name, way, peak() - before]), flush=True)
            os._exit(0)
        os.wait()
"""


def _costly() -> dict[str, bytes]:
    side, turned = _SIDE, Image.Exif()
    turned[0x0112] = 6
    colours = chunk(b"tRNS", bytes(6))
    jpeg: dict[str, Any] = {"progressive": True, "subsampling": 0, "exif": turned}
    return {
        "rgba of 16 bits": blank_png(side, side, 16, 4),
        "clear colour": blank_png(side, side, 8, 3, colours),
        "turned rgba": encoded(Image.new("RGBA", (side, side)), exif=turned),
        "grey of 16 bits": blank_png(side, side, 16, 1),
        "progressive": encoded(Image.new("RGB", (side, side)), "JPEG", **jpeg),
        "progressive cmyk": encoded(Image.new("CMYK", (side, side)), "JPEG", **jpeg),
        "progressive that Pillow decodes": many_scans(Image.new("RGB", (side, side)), 20, subsampling=0),
        "webp": encoded(Image.new("RGBA", (side, side)), "WEBP", lossless=True, method=0, exif=turned),
        "gif": encoded(Image.new("P", (side, side)), "GIF"),
        "bmp": encoded(Image.new("RGB", (side, side)), "BMP"),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count the peak of memory in other units")
def test_a_decode_takes_no_more_memory_than_is_said(tmp_path: Path) -> None:
    found = _costly()
    for name, data in found.items():
        (tmp_path / name).write_bytes(data)
    words = [sys.executable, "-c", _PEAKS, str(tmp_path), str(_SIDE**2)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    peaks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(peaks) == 2 * len(found)
    over = {(name, way): (peak - _BESIDE) / _SIDE**2 for name, way, peak in peaks}
    assert {which: each for which, each in over.items() if each > (16 if "webp" in which else 12)} == {}
    # It is measured at all.
    assert min(peak for _, _, peak in peaks) > 2 * _SIDE**2


# --- scans


def test_scans_are_those_of_the_image_alone() -> None:
    thumbnail = many_scans(scene(), 200)
    exif = Image.Exif()
    exif[0x9286] = thumbnail
    plain = encoded(scene(), "JPEG", progressive=True, quality=95)
    holding = encoded(scene(), "JPEG", progressive=True, quality=95, exif=exif)
    assert holding.count(b"\xff\xda") > 200
    for data in (holding, plain + thumbnail):
        np.testing.assert_array_equal(decode_pixels(data), decode_pixels(plain))


@pytest.mark.filterwarnings("ignore:.*progressive")
@pytest.mark.parametrize("decode", WAYS)
def test_an_image_of_as_many_scans_as_are_allowed_is_read_and_of_one_more_is_not(decode: Callable[..., Any]) -> None:
    data = many_scans(scene(), 5)
    scans = data.count(b"\xff\xda")
    assert np.asarray(decode(data, limits=ImageSettings(max_scans=scans))).shape == scene().shape
    with pytest.raises(DataError, match=f"^a JPEG of {scans} scans, more than images.max_scans {scans - 1}$"):
        decode(data, limits=ImageSettings(max_scans=scans - 1))


def test_a_cut_header_of_a_scan_is_no_reason_to_count_for_ever() -> None:
    data = many_scans(scene(), 200)
    for end in range(data.rindex(b"\xff\xda"), len(data)):
        with pytest.raises(DataError, match="scans, more than"):
            decode_pixels(data[:end])


# --- seconds


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("JPEG", "CMYK", {"quality": 95, "progressive": True}),
    ],
)
@pytest.mark.parametrize("decode", WAYS)
def test_an_image_that_takes_too_long_is_stopped(
    kind: str, mode: str, options: dict[str, Any], decode: Callable[..., Any]
) -> None:
    data = encoded(noise(700, 700).convert(mode), kind, **options)
    assert np.asarray(decode(data)).shape == (700, 700, 3)
    with pytest.raises(DataError) as refused:
        decode(data, limits=ImageSettings(max_seconds=1e-4))
    assert re.fullmatch(
        r"not decoded after \S+ s of one processor, more than images.max_seconds 0.0001", str(refused.value)
    )


@pytest.mark.parametrize("decode", WAYS)
def test_an_image_of_many_short_reads_is_stopped(decode: Callable[..., Any]) -> None:
    data = slow_bmp(50_000)
    assert np.asarray(decode(data)).shape == (50, 1000, 3)
    with pytest.raises(DataError, match=r"more than images\.max_seconds 0\.001"):
        decode(data, limits=ImageSettings(max_seconds=1e-3))


def test_a_header_without_an_end_is_stopped() -> None:
    data = b"\xff\xd8" + b"\xff\xe2\0\2" * 100_000
    with pytest.raises(DataError, match=r"more than images\.max_seconds 0\.01"):
        decode_pixels(data, limits=ImageSettings(max_seconds=0.01))
    png = encoded(scene())
    with pytest.raises(DataError, match=r"more than images\.max_seconds 0\.01"):
        decode_pixels(png[:33] + chunk(b"abCd", b"") * 100_000 + png[33:], limits=ImageSettings(max_seconds=0.01))


def test_an_image_of_many_scans_is_looked_at_more_often_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes a second a look."""
    data = many_scans(noise(100, 100), 20)
    assert 4 * 4096 < len(data) < 2**16
    monkeypatch.setattr(time, "thread_time", itertools.count().__next__)
    with pytest.raises(DataError, match=r"more than images\.max_seconds 2"):
        decode_image(data, limits=ImageSettings(max_seconds=2))


def test_time_of_other_threads_and_of_before_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clocks of the process, which go a second a look."""
    for name in ("process_time", "perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, itertools.count().__next__)
    began, data = time.thread_time(), many_scans(noise(100, 100), 20)
    while time.thread_time() - began < 0.6:
        pass
    assert decode_pixels(data, limits=ImageSettings(max_seconds=0.5)).shape == (100, 100, 3)


# --- masks

RULE = MaskRule(classes=3, ignore_index=255, zero_is_ignored=False)


def test_a_tile_above_the_limits_is_refused_however_small_its_image_is() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 46_000, 323: 46_000, 324: 200, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    with pytest.raises(LabelError, match=r"a tile of 46000 x 46000 pixels, more than images\.max_pixels"):
        decode_mask(data + bytes(209 - len(data)), RULE, (8, 8), "k")
    data = data.replace(struct.pack("<HHII", 322, 4, 1, 46_000), struct.pack("<HHII", 322, 4, 1, 50_000_000))
    data = data.replace(struct.pack("<HHII", 323, 4, 1, 46_000), struct.pack("<HHII", 323, 4, 1, 1))
    with pytest.raises(LabelError, match="a tile of 50000000 x 1 pixels, a side of more than 16777216"):
        decode_mask(data + bytes(209 - len(data)), RULE, (8, 8), "k")


def test_a_mask_above_the_limits_is_a_wrong_one() -> None:
    blank = encoded(Image.new("L", (9, 8)))
    with pytest.raises(LabelError, match=r"^mask of 'k' cannot be decoded: 9 x 8 pixels, more than images\.max_pixels"):
        decode_mask(blank, RULE, (8, 9), "k", ImageSettings(max_pixels=71))
    with pytest.raises(LabelError, match=r"cannot be decoded: not decoded after .* images\.max_seconds 1e-05"):
        decode_mask(encoded(noise(99, 99).convert("L")), RULE, (99, 99), "k", ImageSettings(max_seconds=1e-5))


def test_tiles_whose_size_is_no_number_are_refused() -> None:
    file, tags = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[65000] = TiffTags.ASCII
    tags[65000] = "abc"
    Image.new("L", (9, 8)).save(file, "TIFF", tiffinfo=tags)
    # Pillow does not write such a one.
    data = file.getvalue().replace(struct.pack("<HH", 65000, 2), struct.pack("<HH", 322, 2))
    with pytest.raises(LabelError, match="mask of 'k' cannot be decoded: the size of its tiles is no number"):
        decode_mask(data, RULE, (8, 9), "k")


def test_a_mask_of_another_size_is_not_decoded() -> None:
    with pytest.raises(LabelError, match="mask of 'k' has 9000 x 9000 pixels, its image 2 x 2"):
        decode_mask(blank_png(9000, 9000, 8, 1, rows=0), RULE, (2, 2), "k")


def test_a_mask_is_of_no_format_that_runs_a_program() -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n"
    with pytest.raises(LabelError, match="mask of 'k' cannot be decoded: not a PNG, BMP or TIFF image"):
        decode_mask(page, RULE, (2, 2), "k")


@pytest.mark.timeout(60)
def test_a_run_of_bytes_behind_many_scans_takes_no_square_of_its_length() -> None:
    data = encoded(noise(16, 16), "JPEG")
    scans = b"\xff\xda" * 200
    comment = b"\xff\xfe" + (len(scans) + 2).to_bytes(2) + scans
    data = data[:2] + comment + data[2:-2] + b"\xff" * 300_000 + b"\0" + data[-2:]
    assert decode_pixels(data).shape == (16, 16, 3)


# --- what was taken is given back


@dataclass(frozen=True)
class Sample:
    key: str
    data: bytes


@pytest.mark.parametrize("decode", WAYS)
@pytest.mark.parametrize(("kind", "parts"), [("JPEG", 134_000), ("PNG", 201_000), ("GIF", 134_000)])
def test_a_header_of_many_parts_is_refused(kind: str, parts: int, decode: Callable[..., Any]) -> None:
    data = encoded(noise(8, 8), kind)
    place, part = {
        "JPEG": (2, b"\xff\xfe\0\2"),
        "PNG": (33, chunk(b"abCd", b"")),
        # Behind the table of colours.
        "GIF": (13 + 3 * 2 ** (1 + data[10] % 8), b"!\xfe\0"),
    }[kind]
    few, many = (data[:place] + count * part + data[place:] for count in (1000, parts))
    assert np.asarray(decode(few)).shape == (8, 8, 3)
    with pytest.raises(DataError, match=r"^a header of more than 100000 parts$"):
        decode(many)


def test_what_is_odd_in_metadata_is_not_told_by_the_thousand(tmp_path: Path) -> None:
    tags, region = 3000, 1000
    # All of them are the same bytes, and more together than the file.
    place = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", number + 1, 7, region, place) for number in range(tags))
    metadata = b"Exif\0\0II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4 + region)
    data = encoded(noise(8, 8), "JPEG")
    (tmp_path / "odd.jpg").write_bytes(
        data[:2] + b"\xff\xe1" + struct.pack(">H", len(metadata) + 2) + metadata + data[2:]
    )
    read = "PIL.Image.open('odd.jpg').getexif().get(1)"
    for words, told in ((read, True), (f"import milan_pipe.images.decode; {read}", False)):
        code = f"import warnings; warnings.simplefilter('always'); import PIL.Image; {words}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        )
        assert (done.stderr.count("Skipping tag") > 1000) == told
        assert told or "Tag" not in done.stderr


def test_what_a_skipped_image_took_is_given_back_at_once() -> None:
    taken: list[weakref.ref[io.BytesIO]] = []
    skipped: list[str] = []

    def decode(sample: Sample) -> int:
        held = io.BytesIO(sample.data)
        taken.append(weakref.ref(held))
        decode_pixels(held.getvalue())
        return len(taken)

    # Until it runs again, which takes the longer the more there is.
    gc.disable()
    try:
        samples = (Sample(str(number), b"no image") for number in range(6))
        assert not list(decoded_ahead(samples, decode, 1, 2, lambda key, _: skipped.append(key)))
        assert not any(one() for one in taken)
    finally:
        gc.enable()
    assert skipped == [str(number) for number in range(6)]
