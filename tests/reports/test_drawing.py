"""Pixels of images: patches lie where they lie, colours mean the same everywhere."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from milan_pipe.drawing.charts import Curve, bar_chart, line_chart
from milan_pipe.drawing.patches import FeatureColours, heat, on_pixels, only_visible, overlaid
from milan_pipe.drawing.sheet import Panel, Row, Segmentation, Sheet, data_url, draw_sheet, segmentation_sheet


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7))
def test_a_patch_covers_exactly_its_own_pixels(down: int, across: int, high: int, wide: int) -> None:
    cells = np.arange(down * across).reshape(down, across)
    large = on_pixels(cells, down * high, across * wide)
    assert np.array_equal(large, np.kron(cells, np.ones((high, wide), int)))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 60), st.integers(1, 60))
def test_any_size_keeps_the_order_of_patches_and_loses_none_that_has_room(d: int, a: int, h: int, w: int) -> None:
    large = on_pixels(np.arange(d * a).reshape(d, a), h, w)
    rows, columns = large[:, 0] // a, large[0] % a
    assert large.shape == (h, w)
    assert (np.diff(rows) >= 0).all()
    assert (np.diff(columns) >= 0).all()
    if h >= d and w >= a:
        assert len(np.unique(large)) == d * a


def test_hidden_patches_are_grey_and_visible_ones_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 100, (6, 8, 3), np.uint8)
    seen = np.array([[True, False], [False, True], [True, True]])
    shown = only_visible(image, seen)
    assert np.array_equal(shown[:2, :4], image[:2, :4])
    assert (shown[:2, 4:] == 112).all()
    assert (shown[2:4, :4] == 112).all()
    assert np.array_equal(shown[4:], image[4:])


def test_heat_rises_in_brightness_and_takes_what_is_not_a_number() -> None:
    colours = heat(np.linspace(0, 1, 50)).astype(int)
    assert (np.diff(colours @ [299, 587, 114]) > 0).all()
    assert np.array_equal(heat(np.array([-3.0, np.nan, 7.0])), heat(np.array([0.0, 0.0, 1.0])))
    image = np.full((4, 4, 3), 200, np.uint8)
    bright = overlaid(image, np.array([[0.0, 1.0], [0.0, 0.0]]))
    assert int(bright[0, 3].sum()) > int(bright[3, 3].sum())


def test_colours_of_features_are_the_same_for_the_same_directions() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 12)).astype(np.float32)
    colours = FeatureColours(features)
    assert np.array_equal(colours(features), colours(features * 7))
    assert np.array_equal(colours(features), FeatureColours(features[::-1])(features))
    # An axis alone decides, whatever sign its solver gave it.
    assert np.array_equal(FeatureColours(np.repeat(features, 2, 0))(features), colours(features))


def test_the_first_component_is_the_one_with_the_largest_variance() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(500, 5)) * [0.1, 4, 1, 0.3, 0.1]
    axes = FeatureColours(features).axes_T3
    assert abs(axes[1, 0]) > 0.95
    assert abs(axes[2, 1]) > 0.9
    assert (axes[np.abs(axes).argmax(0), np.arange(3)] > 0).all()


@pytest.mark.parametrize("features", [np.ones((1, 4)), np.ones((6, 2)), np.eye(2), np.zeros((3, 5))])
def test_too_few_features_for_three_components_still_have_colours(features: np.ndarray) -> None:
    colours = FeatureColours(features)(features)
    assert colours.shape == (len(features), 3)
    assert (colours[:, 2] == 128).all()


def test_a_sheet_enlarges_by_whole_pixels_and_takes_panels_of_any_size() -> None:
    small = np.random.default_rng(3).integers(0, 256, (7, 5, 3), np.uint8)
    wide = np.full((30, 300, 3), 9, np.uint8)
    sheet = Sheet(
        "a key that is " + "long " * 60, [Row("one", [Panel(small, "first")]), Row("", [Panel(wide, "w")] * 2)]
    )
    drawn = np.asarray(Image.open(io.BytesIO(draw_sheet(sheet))))
    large = small.repeat(28, 0).repeat(28, 1)
    places = np.lib.stride_tricks.sliding_window_view(drawn[:, :, 0], (196, 140))
    hits = np.argwhere((places[:, :, ::28, ::28] == small[..., 0]).all((2, 3)))
    assert any(np.array_equal(drawn[y : y + 196, x : x + 140], large) for y, x in hits)


@pytest.mark.parametrize(("side", "exact"), [(64, True), (300, False)])
def test_small_images_are_embedded_without_loss(side: int, exact: bool) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (side, side, 3), np.uint8)
    match = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", data_url(pixels))
    assert match is not None
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(match[2]))))
    assert np.array_equal(found, pixels) is exact


def test_a_segmentation_of_any_size_has_a_panel_of_one_size() -> None:
    image, truth = np.zeros((30, 900, 3), np.uint8), np.full((30, 900), -1)
    truth[:, 450:] = 1
    sheet = segmentation_sheet("t", [Segmentation("k", image, truth, np.ones_like(truth))], 3)
    shown, right, predicted = (panel.pixels for panel in sheet.rows[0].panels)
    assert shown.shape == right.shape == predicted.shape == (224, 224, 3)
    assert (shown[112] == 0).all()
    assert (right[0] == right[112, 0]).all()
    assert right[0, 0].tolist() == [255, 255, 255]
    assert right[112, 223].tolist() == predicted[112, 0].tolist() != [255, 255, 255]
    assert sheet.rows[0].panels[2].caption == "prediction, 100.0 % right"


def test_a_chart_is_the_same_bytes_each_time_and_does_not_grow_with_the_run() -> None:
    curves = {"_a $x$ <b>": Curve([1, 2, 3], [1.0, 0.5, 0.2]), "one point": Curve([1], [2.0], colour=9)}
    first = line_chart("title $\\frac$", "step", "loss", curves)
    assert first == line_chart("title $\\frac$", "step", "loss", curves)
    steps = list(range(100_000))
    long = line_chart("t", "step", "loss", {"run": Curve(steps, [1 / (1 + step) for step in steps])})
    assert len(long) < 60_000


@pytest.mark.parametrize("values", [[10**400, 1], [1e308, -1e308], [1e308] * 500, [float("inf"), float("-inf")] * 250])
def test_what_is_too_large_for_axes_is_left_out(values: list[float]) -> None:
    numbers = list(range(len(values)))
    line_chart("t", "x", "y", {"a": Curve(numbers, values), "b": Curve(values, numbers)})
    bar_chart("t", "y", {"a": {"b": values[0], "c": 1}})
