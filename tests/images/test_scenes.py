"""The demo's scenes: a pure function of (seed, index), balanced, and fair to every shape."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from milan_pipe.errors import SettingError
from milan_pipe.images import scenes as module
from milan_pipe.images.scenes import BACKGROUNDS, COLOURS, SCENE_SIZE, SHAPES, SIZES, Scene, render_scene

COUNT = 1200


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(0, index) for index in range(COUNT)]


def words(scene: Scene) -> tuple[str, str, str, str]:
    found = re.fullmatch(r"a (\w+) (\w+) (\w+) on a (\w+) background", scene.caption)
    assert found is not None, scene.caption
    return found[1], found[2], found[3], found[4]


def digest(seed: int, index: int) -> str:
    scene = render_scene(seed, index)
    record = scene.image.tobytes() + scene.segmentation.tobytes() + f"{scene.label}{scene.caption}".encode()
    return hashlib.sha256(record).hexdigest()


def test_shapes_and_types(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        assert scene.image.shape == (SCENE_SIZE, SCENE_SIZE, 3)
        assert scene.segmentation.shape == (SCENE_SIZE, SCENE_SIZE)
        assert scene.image.dtype == scene.segmentation.dtype == np.uint8


def test_another_process_in_another_order_gives_the_same_bytes() -> None:
    places = [(0, 0), (0, 7), (3, 0), (2**64 - 1, 2**63 - 1)]
    code = (
        "import hashlib\nfrom milan_pipe.images.scenes import render_scene\n"
        f"for seed, index in {places[::-1]}:\n"
        "    s = render_scene(seed, index)\n"
        "    record = s.image.tobytes() + s.segmentation.tobytes() + f'{s.label}{s.caption}'.encode()\n"
        "    print(hashlib.sha256(record).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[::-1] == [digest(*place) for place in places]


def test_seed_and_index_both_count() -> None:
    assert len({digest(seed, index) for seed in range(3) for index in range(3)}) == 9


def test_all_words_occur_and_caption_fits_label(scenes: list[Scene]) -> None:
    captions = [words(scene) for scene in scenes]
    assert {size for size, _, _, _ in captions} == set(SIZES)
    assert {colour for _, colour, _, _ in captions} == set(COLOURS)
    assert {shape for _, _, shape, _ in captions} == set(SHAPES)
    assert {background for _, _, _, background in captions} == set(BACKGROUNDS)
    assert all(shape == SHAPES[scene.label] for scene, (_, _, shape, _) in zip(scenes, captions, strict=True))


def test_labels_are_balanced(scenes: list[Scene]) -> None:
    counts = Counter(scene.label for scene in scenes)
    expected = COUNT / len(SHAPES)
    chi_square = sum((counts[label] - expected) ** 2 / expected for label in range(len(SHAPES)))
    # 99.9 % of fair draws with 11 degrees of freedom lie below.
    assert chi_square < 31.3


def test_colour_size_and_background_do_not_tell_the_shape(scenes: list[Scene]) -> None:
    for which, choices in ((0, SIZES), (1, COLOURS), (3, BACKGROUNDS)):
        table = np.zeros((len(SHAPES), len(choices)))
        for scene in scenes:
            table[scene.label, list(choices).index(words(scene)[which])] += 1
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        chi_square = ((table - expected) ** 2 / expected).sum()
        # Four standard deviations above the mean of a chi-square.
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_the_area_of_the_unit_disc(shape: str) -> None:
    outlines = module._unit_outlines(shape)
    area = module._signed_area(outlines[0]) - sum(module._signed_area(hole) for hole in outlines[1:])
    assert area == pytest.approx(math.pi)
    assert np.allclose(outlines[0].max(axis=0) + outlines[0].min(axis=0), 0)


def test_main_object_is_segmented_with_the_area_its_size_says(scenes: list[Scene]) -> None:
    for scene in scenes:
        least, greatest = SIZES[words(scene)[0]]
        area = int((scene.segmentation == 1 + scene.label).sum())
        # Rasterised: an edge may take or leave a part of its pixels. Only parts beyond the frame may be lost.
        touches = any(
            (line == 1 + scene.label).any()
            for line in (
                scene.segmentation[0],
                scene.segmentation[-1],
                scene.segmentation[:, 0],
                scene.segmentation[:, -1],
            )
        )
        assert area < 1.12 * math.pi * greatest**2
        assert area > (0.6 if touches else 0.88) * math.pi * least**2


def test_shapes_of_one_size_have_the_same_area(scenes: list[Scene]) -> None:
    for size, (least, greatest) in SIZES.items():
        expected = math.pi * (least**2 + least * greatest + greatest**2) / 3
        for label in range(len(SHAPES)):
            areas = [
                int((scene.segmentation == 1 + label).sum())
                for scene in scenes
                if scene.label == label and words(scene)[0] == size
            ]
            assert np.mean(areas) == pytest.approx(expected, rel=0.12), (SHAPES[label], size)


def test_distractors_are_other_shapes_and_small(scenes: list[Scene]) -> None:
    with_distractors = 0
    for scene in scenes:
        assert scene.segmentation.max() <= len(SHAPES)
        others = scene.segmentation[(scene.segmentation != 0) & (scene.segmentation != 1 + scene.label)]
        with_distractors += others.size > 0
        assert others.size < 4 * 1.4 * math.pi * 3.5**2
    assert with_distractors > 0.9 * COUNT


def test_main_object_has_the_colour_of_its_caption(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        centre = np.array(COLOURS[words(scene)[1]])
        inside = scene.image[scene.segmentation == 1 + scene.label]
        assert np.abs(np.median(inside, axis=0) - centre).max() < 26, scene.caption


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**63)])
def test_out_of_range(seed: int, index: int) -> None:
    with pytest.raises(SettingError, match="found seed"):
        render_scene(seed, index)
