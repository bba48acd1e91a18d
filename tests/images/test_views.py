"""Views: inside the image, a pure function of seed, key and index, and rendered exactly."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from milan_pipe.config.images import ViewSettings
from milan_pipe.errors import DataError, SettingError, ShapeError
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.views import (
    View,
    aligned,
    decode_jpeg,
    draw_view,
    encode_jpeg,
    render_view,
    shrink_factor,
    shrunk,
)

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"

sides = st.integers(1, 20_000)
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def photos(count: int) -> list[Path]:
    found = sorted(PHOTOS.glob("*.JPEG"))[:count]
    if not found:
        pytest.skip(f"no photos in {PHOTOS}")
    return found


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- draw_view


@given(keys, st.integers(0, 2**64 - 1), sides, sides, st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_crop_lies_inside_any_image(key: str, index: int, height: int, width: int, seed: int) -> None:
    view = draw_view(ViewSettings(seed=seed), key, index, height, width)
    assert 0 <= view.top < view.top + view.height <= height
    assert 0 <= view.left < view.left + view.width <= width


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (20000, 10), (10, 20000), (1, 20000), (3, 3)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.01, 0.02), (50.0, 90.0), (1.0, 1.0)])
def test_crop_lies_inside_extreme_images(height: int, width: int, ratio: tuple[float, float]) -> None:
    for index in range(50):
        view = draw_view(ViewSettings(ratio=ratio, scale=(0.01, 1.0)), "k", index, height, width)
        assert 0 <= view.top < view.top + view.height <= height
        assert 0 <= view.left < view.left + view.width <= width


def test_a_view_is_what_it_was() -> None:
    # Stored views must be drawn alike by every later version: change these numbers only with the store's schema.
    drawn = [draw_view(ViewSettings(seed=7, scale=(0.2, 1.0)), "cat/001", index, 375, 500) for index in range(3)]
    assert drawn == [
        View(top=32, left=0, height=318, width=383, flip=False),
        View(top=92, left=159, height=226, width=187, flip=True),
        View(top=27, left=4, height=337, width=397, flip=False),
    ]


def test_views_do_not_depend_on_neighbours_order_or_count() -> None:
    settings = ViewSettings(seed=3)
    wanted = [(key, index) for key in ("a", "b", "ab") for index in range(6)]
    forward = {place: draw_view(settings, *place, 300, 400) for place in wanted}
    backward = {place: draw_view(ViewSettings(seed=3, count=9), *place, 300, 400) for place in reversed(wanted)}
    alone = draw_view(settings, "b", 4, 300, 400)
    assert forward == backward
    assert alone == forward["b", 4]
    assert len(set(forward.values())) == len(wanted)


def test_seeds_keys_and_indices_differ() -> None:
    views = {
        draw_view(ViewSettings(seed=seed), key, index, 1000, 1000)
        for seed in (0, 1, 2**63)
        for key in ("a", "b")
        for index in (0, 1, 2**32, 2**64 - 1)
    }
    assert len(views) == 24


def test_flip_does_not_depend_on_the_image_size() -> None:
    settings = ViewSettings(scale=(0.2, 1.0))
    for index in range(40):
        assert len({draw_view(settings, "k", index, side, 100).flip for side in (1, 90, 20000)}) == 1


@pytest.mark.parametrize("flip", [0.0, 0.25, 0.5, 1.0])
def test_flip_share(flip: float) -> None:
    settings = ViewSettings(flip=flip)
    share = np.mean([draw_view(settings, f"key {n}", n % 4, 64, 64).flip for n in range(4000)])
    # Four standard deviations of 4000 draws at worst.
    assert abs(share - flip) <= (0.032 if 0 < flip < 1 else 0)


def test_area_and_ratio_are_spread_as_asked() -> None:
    views = [draw_view(ViewSettings(scale=(0.2, 1.0)), str(n), 0, 2000, 2000) for n in range(4000)]
    area = np.array([view.height * view.width / 4e6 for view in views])
    log_ratio = np.log([view.width / view.height for view in views])
    assert area.min() > 0.199
    assert abs(np.abs(log_ratio).max() - np.log(4 / 3)) < 0.01
    # Crops that do not fit are drawn again, and that thins the largest: below 0.7 of the area every one fits.
    low = area[area < 0.7]
    counts = np.histogram(low, bins=5, range=(0.2, 0.7))[0]
    assert counts.max() / counts.min() < 1.25
    assert abs(np.mean(log_ratio)) < 0.02
    assert abs(np.mean([view.top / max(1, 2000 - view.height) for view in views]) - 0.5) < 0.03


def test_fallback_is_the_largest_centred_crop_in_ratio() -> None:
    settings = ViewSettings(scale=(1.0, 1.0))
    wide, high = draw_view(settings, "k", 0, 300, 1000), draw_view(settings, "k", 0, 1000, 300)
    assert (wide.top, wide.left, wide.height, wide.width) == (0, 300, 300, 400)
    assert (high.top, high.left, high.height, high.width) == (300, 0, 400, 300)
    whole = draw_view(ViewSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0)), "k", 0, 50, 50)
    assert (whole.top, whole.left, whole.height, whole.width) == (0, 0, 50, 50)


def test_arithmetic_is_that_of_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    image = torch.empty(1, 375, 500)
    torch.manual_seed(0)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, (0.2, 1), (3 / 4, 4 / 3)) for _ in range(3000)])
    drawn = [draw_view(ViewSettings(scale=(0.2, 1.0)), str(n), 0, 375, 500) for n in range(3000)]
    ours = np.array([(view.top, view.left, view.height, view.width) for view in drawn])
    for quantile in (0.1, 0.5, 0.9):
        apart = np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)
        assert np.abs(apart).max() < 20


@pytest.mark.parametrize(
    "values",
    [
        {"count": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.1)},
        {"scale": (float("nan"), 1.0)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (1.0, float("inf"))},
        {"flip": 1.5},
        {"flip": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
        {"jpeg_quality": 0},
        {"jpeg_quality": 101},
        {"scales": (0.2, 1.0)},
    ],
)
def test_settings_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(SettingError, match="views"):
        ViewSettings.parse(values, "views")
    with pytest.raises((ValidationError, SettingError)):
        ViewSettings(**values)  # type: ignore[arg-type]


def test_draw_view_refuses_what_is_no_image() -> None:
    with pytest.raises(ShapeError):
        draw_view(ViewSettings(scale=(0.2, 1.0)), "k", 0, 0, 5)
    with pytest.raises(SettingError):
        draw_view(ViewSettings(scale=(0.2, 1.0)), "k", -1, 5, 5)


# --- render_view


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_a_rendered_view_is_pillows_but_for_rounding(height: int, width: int, index: int, size: int) -> None:
    # In the middle of the range: what overshoots it is cut after each of two passes, whose order differs.
    pixels = 64 + noise(height, width) // 2
    view = draw_view(ViewSettings(scale=(0.2, 1.0)), "k", index, height, width)
    window = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(window)).resize((size, size), Image.Resampling.BICUBIC))
    rendered = render_view(pixels, view, size)
    difference = np.abs(rendered.astype(int) - (expected[:, ::-1] if view.flip else expected))
    assert difference.max() <= 2
    assert rendered.flags["C_CONTIGUOUS"]
    assert rendered.flags["WRITEABLE"]


def test_no_pixel_outside_of_the_crop_is_read() -> None:
    pixels = noise(50, 50)
    view = View(top=10, left=20, height=15, width=12, flip=False)
    other = 255 - pixels
    other[10:25, 20:32] = pixels[10:25, 20:32]
    np.testing.assert_array_equal(render_view(pixels, view, 33), render_view(other, view, 33))


@pytest.mark.parametrize(
    "view",
    [
        View(top=-1, left=0, height=3, width=3, flip=False),
        View(top=0, left=8, height=3, width=3, flip=False),
        View(top=0, left=0, height=0, width=3, flip=False),
        View(top=0, left=0, height=11, width=3, flip=False),
    ],
)
def test_render_refuses_a_view_outside(view: View) -> None:
    with pytest.raises(ShapeError, match="inside"):
        render_view(noise(10, 10), view, 4)


@pytest.mark.parametrize("pixels", [np.zeros((10, 10), np.uint8), np.zeros((10, 10, 3), np.float32)])
def test_render_refuses_what_is_not_rgb(pixels: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="expected an RGB image"):
        render_view(pixels, View(top=0, left=0, height=3, width=3, flip=False), 4)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_an_image_is_decoded_no_smaller_than_its_views_allow(height: int, width: int, size: int) -> None:
    views = [draw_view(ViewSettings(scale=(0.2, 1.0)), "k", index, height, width) for index in range(4)]
    factor = shrink_factor(views, size)
    assert factor in (1, 2, 4, 8)
    assert factor == 8 or min(min(view.height, view.width) for view in views) < 4 * size * factor
    for view in views:
        near = aligned(view, factor)
        assert (near.top % factor, near.left % factor, near.height % factor, near.width % factor) == (0, 0, 0, 0)
        assert 0 <= view.top - near.top < factor
        assert 0 <= (view.top + view.height) - (near.top + near.height) < factor
        part = shrunk(near, factor)
        assert 0 <= part.top < part.top + part.height <= -(-height // factor)
        assert 0 <= part.left < part.left + part.width <= -(-width // factor)
        assert factor == 1 or min(part.height, part.width) >= 2 * size - 1
        assert part.flip == view.flip
        assert factor > 1 or near == view


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_that_is_decoded_smaller_is_cut_where_it_says(orientation: int) -> None:
    y, x = np.mgrid[0:333, 0:221]
    seen = np.stack([x, y * 0.7, (x + y) / 3], axis=2).astype(np.uint8)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's numbers of the opposite turns
    stored = Image.fromarray(seen) if back is None else Image.fromarray(seen).transpose(Image.Transpose(back))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    small = decode_pixels(buffer.getvalue(), lambda *_: 4)
    view = View(top=40, left=20, height=200, width=160, flip=False)
    by = 1 if small.shape[:2] == seen.shape[:2] else 4
    rendered = render_view(small, shrunk(view, by), 20).astype(int)
    assert np.abs(rendered - render_view(seen, view, 20)).mean() < 0.7


@pytest.mark.parametrize("factor", [2, 4])
def test_views_of_an_image_decoded_smaller_are_nearly_the_same(factor: int) -> None:
    apart = []
    for path in photos(12):
        data = path.read_bytes()
        whole = decode_pixels(data)
        height, width, _ = whole.shape
        small = decode_pixels(data, lambda *_: factor)
        assert small.shape[:2] == (-(-height // factor), -(-width // factor))
        view = aligned(draw_view(ViewSettings(scale=(0.5, 1.0)), path.stem, 0, height, width), factor)
        size = min(view.height, view.width) // (2 * factor)
        rendered = render_view(small, shrunk(view, factor), size), render_view(whole, view, size)
        apart.append(np.abs(rendered[0].astype(int) - rendered[1]).mean())
    assert np.mean(apart) < 1


_DIGEST_OF_VIEWS = """
import hashlib, numpy as np, torch
from milan_pipe.images.views import View, render_view
image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
digest = hashlib.sha256()
for side in (7, 64, 224, 331):
    for flip in (False, True):
        digest.update(render_view(image, View(top=3, left=11, height=301, width=409, flip=flip), side).tobytes())
found[torch.backends.cpu.get_cpu_capability()] = digest.hexdigest()
"""


@pytest.mark.ci
def test_bytes_of_a_view_do_not_depend_on_the_processor() -> None:
    found: dict[str, str] = {}
    exec(_DIGEST_OF_VIEWS, {"found": found})  # with all that this processor has
    code = f"found = {{}}\n{_DIGEST_OF_VIEWS}\nprint(*found.keys(), *found.values())"
    for capability in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        told = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout
        used, digest = told.split()
        found[used] = digest
    assert "DEFAULT" in found or "NO AVX" in found
    assert set(found.values()) == {"bb70fe5a977e37a6e7cd14ec1e54fae6d0d1c5b02521b2683cfc5b17a2301c22"}


# --- JPEG


@pytest.mark.parametrize("quality", [30, 95, 100])
def test_decoder_equals_pillow_on_photos(quality: int) -> None:
    for number, path in enumerate(photos(8)):
        source = path.read_bytes()
        image_HWC = decode_pixels(source)
        view = draw_view(ViewSettings(scale=(0.2, 1.0)), path.stem, number, *image_HWC.shape[:2])
        stored = encode_jpeg(render_view(image_HWC, view, 97 + 16 * number), quality)
        with Image.open(io.BytesIO(stored)) as opened:
            np.testing.assert_array_equal(decode_jpeg(stored), np.asarray(opened.convert("RGB")))
        with Image.open(io.BytesIO(source)) as opened:
            np.testing.assert_array_equal(image_HWC, np.asarray(opened.convert("RGB")))


def test_encoder_repeats_itself_and_stays_near() -> None:
    x, y = np.mgrid[0:64, 0:48]
    pixels = np.stack([x * 3, y * 4, x + y], axis=2).astype(np.uint8)
    data = encode_jpeg(pixels, 95)
    assert data == encode_jpeg(np.asfortranarray(pixels), 95)
    decoded = decode_jpeg(data)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (64, 48, 3)
    assert np.abs(decoded.astype(int) - pixels).mean() < 2
    assert len(encode_jpeg(pixels, 10)) < len(data)


def test_one_pixel_jpeg() -> None:
    assert decode_jpeg(encode_jpeg(np.full((1, 1, 3), 77, np.uint8), 100)).tolist() == [[[77, 77, 77]]]


def test_a_view_of_another_size_or_kind_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encode_jpeg(np.full((32, 32, 3), 77, np.uint8), 90))
    assert decode_jpeg(data, side=32).shape == (32, 32, 3)
    # Luminance sampled four times down and once across.
    data[data.index(b"\xff\xc0") + 11] = 0x14
    with pytest.raises(DataError, match="subsampling"):
        decode_jpeg(data, side=32)
    monkeypatch.setattr("simplejpeg.decode_jpeg", None)
    with pytest.raises(DataError, match="32 x 32 pixels, expected 16 x 16"):
        decode_jpeg(encode_jpeg(np.full((32, 32, 3), 77, np.uint8), 90), side=16)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.9])
def test_cut_jpeg_is_an_error(share: float) -> None:
    data = encode_jpeg(noise(32, 32), 95)
    with pytest.raises(DataError, match="JPEG"):
        decode_jpeg(data[: int(share * len(data))])


def test_decode_refuses_what_is_no_jpeg() -> None:
    with pytest.raises(DataError):
        decode_jpeg(b"\x89PNG\r\n\x1a\n" + bytes(100))


def test_encode_refuses_other_shapes() -> None:
    for pixels in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ShapeError):
            encode_jpeg(pixels, 95)
    with pytest.raises(DataError, match="quality"):
        encode_jpeg(np.zeros((4, 4, 3), np.uint8), 0)
