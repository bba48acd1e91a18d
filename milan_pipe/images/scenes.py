"""Captioned scenes of geometric shapes: the data set that ships as code.

A scene is one main object on a textured background, among small distractors of other shapes. It is a pure function of
(seed, index): under the same versions of numpy and Pillow the same pair gives the same bytes on any machine.

All shapes have the same area at the same size, any colour and any position, so that only the outline shows the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from milan_pipe.errors import SettingError

SCENE_SIZE = 64
"""Height and width of a scene in pixels."""

_SUPERSAMPLE = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 50),
    "green": (45, 160, 65),
    "cyan": (60, 205, 215),
    "blue": (45, 85, 215),
    "purple": (145, 60, 190),
    "white": (245, 245, 245),
}
"""Colour names of main objects and their RGB centres; each object departs from its centre by up to 18 levels."""

SIZES: dict[str, tuple[float, float]] = {"small": (7.0, 9.0), "medium": (10.0, 12.0), "large": (13.5, 16.0)}
"""Size names and the range of the radius, in pixels, of the disc that has the object's area."""

BACKGROUNDS = ("plain", "striped", "checkered", "noisy", "gradient")

_Outline = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: (64, 64, 3) uint8, RGB.
        label: index of the main shape in `SHAPES`.
        segmentation: (64, 64) uint8; 0 is background, 1 + i is `SHAPES[i]`, distractors included.
    """

    image: NDArray[np.uint8]
    label: int
    caption: str
    segmentation: NDArray[np.uint8]


def _arc(radius: float, start: float, stop: float, steps: int, centre: tuple[float, float] = (0.0, 0.0)) -> _Outline:
    """Points on a circle from angle `start` to `stop` in degrees; y points down, 0 is right, -90 is up."""
    angle = np.radians(np.linspace(start, stop, steps))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _polar(radii: list[float], first_angle: float = -90.0) -> _Outline:
    angle = np.radians(first_angle + np.arange(len(radii)) * 360.0 / len(radii))
    return np.stack([np.asarray(radii) * np.cos(angle), np.asarray(radii) * np.sin(angle)], axis=1)


def _heart() -> _Outline:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1) / 16


def _horseshoe() -> _Outline:
    outer, inner = _arc(1.0, -180, 0, 24), _arc(0.48, 0, -180, 24)
    return np.concatenate([[[-1.0, 1.0]], outer, [[1.0, 1.0], [0.48, 1.0]], inner, [[-0.48, 1.0]]])


def _points(*flat: float) -> _Outline:
    return np.asarray(flat, dtype=np.float64).reshape(-1, 2)


# Each shape is a list of outlines: the first is filled, the others are cut out of it.
_OUTLINES: dict[str, list[_Outline]] = {
    "circle": [_arc(1.0, 0, 352.5, 48)],
    "square": [_points(-1, -1, 1, -1, 1, 1, -1, 1)],
    "triangle": [_polar([1.0, 1.0, 1.0])],
    "star": [_polar([1.0, 0.4] * 5)],
    "heart": [_heart()],
    "cross": [_points(-1, -3, 1, -3, 1, -1, 3, -1, 3, 1, 1, 1, 1, 3, -1, 3, -1, 1, -3, 1, -3, -1, -1, -1)],
    "moon": [np.concatenate([_arc(1.0, 55, 305, 40), _arc(0.86, 290, 70, 40, (0.42, 0.0))])],
    "ring": [_arc(1.0, 0, 352.5, 48), _arc(0.58, 0, 352.5, 48)],
    "arrow": [_points(0, -1.1, 0.8, -0.1, 0.3, -0.1, 0.3, 1.0, -0.3, 1.0, -0.3, -0.1, -0.8, -0.1)],
    "bolt": [_points(0.25, -1.2, -0.6, 0.15, -0.05, 0.15, -0.3, 1.2, 0.6, -0.25, 0.05, -0.25, 0.45, -1.2)],
    "hourglass": [_points(-0.8, -1, 0.8, -1, 0.12, 0, 0.8, 1, -0.8, 1, -0.12, 0)],
    "horseshoe": [_horseshoe()],
}

SHAPES = tuple(_OUTLINES)
"""Class names; a scene's label is an index into them."""

MASK_CLASSES = ("background", *SHAPES)
"""Names of the values of a scene's segmentation."""


def _signed_area(outline: _Outline) -> float:
    x, y = outline[:, 0], outline[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


@lru_cache(maxsize=len(SHAPES))
def _unit_outlines(shape: str) -> tuple[_Outline, ...]:
    """Outlines of the shape, centred on its bounding box, scaled to the area of a disc of radius 1."""
    outlines = _OUTLINES[shape]
    centre = (outlines[0].max(axis=0) + outlines[0].min(axis=0)) / 2
    area = _signed_area(outlines[0]) - sum(_signed_area(hole) for hole in outlines[1:])
    return tuple((outline - centre) * math.sqrt(math.pi / area) for outline in outlines)


def _outlines(label: int, radius: float, turn: float, *, mirrored: bool) -> list[_Outline]:
    """Outlines of `SHAPES[label]` in pixels, around (0, 0)."""
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = radius * np.array([[cos, -sin], [sin, cos]])
    if mirrored:
        matrix = matrix @ np.diag([-1.0, 1.0])
    return [outline @ matrix.T for outline in _unit_outlines(SHAPES[label])]


def _paint(
    canvas: NDArray[np.float32],
    segmentation: NDArray[np.uint8],
    label: int,
    outlines: list[_Outline],
    rgb: NDArray[np.float32],
) -> None:
    """Blend an object into `canvas` and write 1 + `label` into `segmentation`, both in place."""
    low = np.clip(np.floor(outlines[0].min(axis=0)).astype(int) - 1, 0, SCENE_SIZE - 1)
    high = np.clip(np.ceil(outlines[0].max(axis=0)).astype(int) + 1, low + 1, SCENE_SIZE)
    box_width, box_height = ((high - low) * _SUPERSAMPLE).tolist()
    box = Image.new("L", (box_width, box_height))
    draw = ImageDraw.Draw(box)
    for position, outline in enumerate(outlines):
        draw.polygon(((outline - low) * _SUPERSAMPLE).ravel().tolist(), fill=0 if position else 255)
    coverage = np.asarray(box.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255)
    window = slice(low[1], high[1]), slice(low[0], high[0])
    canvas[window] += coverage[..., None] * (rgb - canvas[window])
    segmentation[window][coverage > 0.5] = 1 + label


def _background_colours(rng: np.random.Generator, avoid: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Two muted colours of like hue, both at some distance from the object's colour."""
    while True:
        grey = rng.uniform(30, 205)
        tint = rng.uniform(-35, 35, 3)
        first = np.clip(grey + tint, 0, 255).astype(np.float32)
        second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(22, 50) + rng.uniform(-8, 8, 3), 0, 255)
        second = second.astype(np.float32)
        if min(np.abs(first - avoid).sum(), np.abs(second - avoid).sum()) > 150:
            return first, second


_ROWS: NDArray[np.float32]
_COLUMNS: NDArray[np.float32]
_ROWS, _COLUMNS = np.mgrid[0:SCENE_SIZE, 0:SCENE_SIZE].astype(np.float32)


def _background_mix(kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """(64, 64) in 0..1: how much of the second background colour each pixel takes."""
    angle = rng.uniform(0, math.pi)
    along = math.cos(angle) * _COLUMNS + math.sin(angle) * _ROWS
    across = -math.sin(angle) * _COLUMNS + math.cos(angle) * _ROWS
    period = rng.uniform(5, 12)
    offset = rng.uniform(0, period)
    if kind == "plain":
        return np.zeros((SCENE_SIZE, SCENE_SIZE), np.float32)
    if kind == "striped":
        return (((along + offset) % period) * 2 < period).astype(np.float32)
    if kind == "checkered":
        first, second = (((way + offset) % period) * 2 < period for way in (along, across))
        return (first ^ second).astype(np.float32)
    if kind == "noisy":
        return rng.random((SCENE_SIZE, SCENE_SIZE), dtype=np.float32) * 1.5
    spread = along - along.min()
    slope: NDArray[np.float32] = (2.0 * spread / spread.max()).astype(np.float32)
    return slope


def _place(rng: np.random.Generator, radius: float) -> NDArray[np.float64]:
    margin = min(radius, SCENE_SIZE / 2 - 1)
    return rng.uniform(margin, SCENE_SIZE - margin, 2)


def _object_colour(name: str, rng: np.random.Generator) -> NDArray[np.float32]:
    return np.clip(np.asarray(COLOURS[name]) + rng.uniform(-18, 18, 3), 0, 255).astype(np.float32)


def render_scene(seed: int, index: int) -> Scene:
    """Render scene `index` of the endless data set `seed`.

    Args:
        seed: of the data set, 0 to 2**64 - 1. Different seeds share no scene.
        index: of the scene, 0 to 2**63 - 1.

    Raises:
        SettingError: seed or index is out of its range.
    """
    if not 0 <= seed < 2**64 or not 0 <= index < 2**63:
        found = f"seed {seed} and index {index}"
        raise SettingError(f"a scene needs 0 <= seed < 2**64 and 0 <= index < 2**63, found {found}")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))

    label = int(rng.integers(len(SHAPES)))
    size = list(SIZES)[int(rng.integers(len(SIZES)))]
    colour_name = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    colour = _object_colour(colour_name, rng)

    radius, turn = float(rng.uniform(*SIZES[size])), math.radians(rng.uniform(-30, 30))
    main = _outlines(label, radius, turn, mirrored=bool(rng.integers(2)))
    main_centre = _place(rng, float(np.abs(main[0]).max()))

    first, second = _background_colours(rng, colour)
    mix = _background_mix(background, rng)[..., None]
    canvas = first + mix * (second - first)
    segmentation = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)

    for _ in range(int(rng.integers(2, 5))):
        other = (label + 1 + int(rng.integers(len(SHAPES) - 1))) % len(SHAPES)
        radius = float(rng.uniform(2.5, 3.5))
        rgb = _object_colour(list(COLOURS)[int(rng.integers(len(COLOURS)))], rng)
        turn = math.radians(rng.uniform(-30, 30))
        centre = _place(rng, radius)
        outlines = _outlines(other, radius, turn, mirrored=bool(rng.integers(2)))
        _paint(canvas, segmentation, other, [outline + centre for outline in outlines], rgb)
    _paint(canvas, segmentation, label, [outline + main_centre for outline in main], colour)

    grain = 4 * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = np.clip(canvas + grain + 0.5, 0, 255).astype(np.uint8)
    article = "an" if background[0] in "aeiou" else "a"
    caption = f"a {size} {colour_name} {SHAPES[label]} on {article} {background} background"
    return Scene(image=image, label=label, caption=caption, segmentation=segmentation)
