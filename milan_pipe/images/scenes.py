"""Captioned scenes of things and stuff: the data set that ships as code.

A scene is one large thing and one or two small ones on two kinds of stuff. Things are drawn from characteristic parts
(wheels, petals, sails), stuff is told by its texture. Colours, sizes, places and poses are drawn without regard to the
kind, and all things have the same area at the same size: only parts and textures show what something is.

A scene is a pure function of (seed, index). All arithmetic is on integers, or on floats by operations that IEEE 754
defines and then rounded: the same versions of numpy and Pillow give the same bytes on any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from milan_pipe.errors import SettingError
from milan_pipe.random_bits import raw_bits, seed_of, uniform

SCENE_SIZE = 64
"""Height and width of a scene in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 50, 45),
    "orange": (235, 140, 40),
    "yellow": (235, 210, 70),
    "green": (60, 150, 70),
    "cyan": (80, 195, 205),
    "blue": (60, 90, 205),
    "purple": (140, 75, 185),
    "pink": (235, 140, 180),
    "white": (235, 235, 235),
    "brown": (130, 85, 50),
}
"""Colour names of things and their RGB centres; each thing departs from its centre by up to 20 levels."""

UPPER = ("sky", "wall", "forest", "hills")
"""Stuff above the horizon."""

LOWER = ("grass", "water", "sand", "road", "tiles", "snow")
"""Stuff below the horizon."""

_SUPERSAMPLE = 4
_AREA = 2.0  # of each thing, for a radius of 1
_DRAWS = 160

Outline = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: (64, 64, 3) uint8, RGB.
        label: index of the large thing in `THINGS`.
        captions: from the short to the full one; in one of a hundred the second thing they name is hidden.
        segmentation: (64, 64) uint8, indices into `MASK_CLASSES`.
    """

    image: NDArray[np.uint8]
    label: int
    captions: tuple[str, ...]
    segmentation: NDArray[np.uint8]


# --- parts: x to the right and y down, a thing reaches from about -1 to 1 -----------------------------------------


def _arc(x: float, y: float, across: float, down: float | None = None, *, begin: int = 0, end: int = 360) -> Outline:
    """An ellipse, or the part of it between two angles in degrees; 0 is right, 90 is down."""
    down, steps = across if down is None else down, max(10, round((end - begin) / 18))
    angles = [math.radians(begin + (end - begin) * step / steps) for step in range(steps + (end - begin < 360))]
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


def _box(left: float, top: float, right: float, bottom: float) -> Outline:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _petals(count: int) -> list[tuple[str, Outline]]:
    angles = [2 * math.pi * number / count - math.pi / 2 for number in range(count)]
    return [("main", _arc(0.38 * math.cos(a), 0.38 * math.sin(a) - 0.35, 0.27)) for a in angles]


def _rays(count: int) -> list[tuple[str, Outline]]:
    found = []
    for number in range(count):
        cos, sin = math.cos(2 * math.pi * number / count), math.sin(2 * math.pi * number / count)
        base = [(0.5 * cos - side * sin, 0.5 * sin + side * cos) for side in (0.14, -0.14)]
        found.append(("other", [base[0], (cos, sin), base[1]]))
    return found


# Each part has a role, which has a colour in each scene: the thing's own and another, a darker and a lighter shade of
# its own, two for details; `hole` shows the stuff there. Later parts lie over earlier ones.
_PARTS: dict[str, list[tuple[str, Outline]]] = {
    "house": [
        ("main", _box(-0.8, -0.1, 0.8, 0.9)),
        ("other", [(-1.0, -0.1), (0, -0.95), (1.0, -0.1)]),
        ("other", _box(0.4, -0.9, 0.62, -0.4)),
        ("ink", _box(-0.18, 0.35, 0.18, 0.9)),
        ("shine", _box(-0.62, 0.15, -0.3, 0.45)),
        ("shine", _box(0.3, 0.15, 0.62, 0.45)),
        ("ink", _box(-0.48, 0.15, -0.44, 0.45)),
        ("ink", _box(0.44, 0.15, 0.48, 0.45)),
    ],
    "tree": [
        ("other", _box(-0.14, 0.2, 0.14, 1.0)),
        ("main", _arc(-0.42, 0.05, 0.42)),
        ("main", _arc(0.42, 0.05, 0.42)),
        ("main", _arc(0, -0.42, 0.52)),
        ("light", _arc(-0.15, -0.5, 0.22)),
        ("dark", _arc(0.38, 0.15, 0.2)),
        ("dark", _arc(-0.4, 0.18, 0.16)),
    ],
    "car": [
        (
            "main",
            [(-1, 0.35), (-1, 0), (-0.55, -0.1), (-0.35, -0.5), (0.4, -0.5), (0.65, -0.1), (1, 0), (1, 0.35)],
        ),
        ("shine", [(-0.42, -0.12), (-0.27, -0.4), (0, -0.4), (0, -0.12)]),
        ("shine", [(0.08, -0.12), (0.08, -0.4), (0.34, -0.4), (0.52, -0.12)]),
        ("ink", _arc(-0.52, 0.36, 0.27)),
        ("shine", _arc(-0.52, 0.36, 0.12)),
        ("ink", _arc(0.52, 0.36, 0.27)),
        ("shine", _arc(0.52, 0.36, 0.12)),
        ("other", _box(0.86, 0.06, 1.0, 0.2)),
    ],
    "boat": [
        ("main", [(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)]),
        ("ink", _box(-0.05, -0.95, 0.05, 0.35)),
        ("other", [(0.1, -0.9), (0.1, 0.22), (0.85, 0.22)]),
        ("shine", [(-0.1, -0.7), (-0.1, 0.22), (-0.6, 0.22)]),
        ("dark", _box(-0.82, 0.48, 0.82, 0.56)),
    ],
    "fish": [
        ("other", [(-0.5, 0), (-1, -0.5), (-0.85, 0), (-1, 0.5)]),
        ("other", [(-0.2, -0.35), (0.15, -0.75), (0.35, -0.3)]),
        ("main", _arc(0.15, 0, 0.8, 0.45)),
        ("dark", _arc(-0.05, 0.08, 0.14, 0.2, begin=90, end=270)),
        ("shine", _arc(0.6, -0.1, 0.13)),
        ("ink", _arc(0.62, -0.1, 0.06)),
        ("light", _box(-0.32, -0.3, -0.22, 0.3)),
        ("light", _box(-0.1, -0.38, 0.0, 0.38)),
        ("light", _box(0.12, -0.4, 0.22, 0.4)),
    ],
    "flower": [
        ("dark", _box(-0.05, -0.1, 0.05, 1.0)),
        ("dark", [(0, 0.75), (0.45, 0.4), (0.5, 0.6)]),
        ("dark", [(0, 0.9), (-0.45, 0.5), (-0.5, 0.7)]),
        *_petals(6),
        ("other", _arc(0, -0.35, 0.22)),
        ("ink", _arc(0, -0.35, 0.08)),
    ],
    "bird": [
        ("other", [(-0.55, 0.1), (-1, -0.2), (-0.95, 0.3)]),
        ("main", _arc(0, 0.15, 0.62, 0.42)),
        ("main", _arc(0.55, -0.32, 0.3)),
        ("ink", [(0.8, -0.4), (1.08, -0.28), (0.8, -0.2)]),
        ("shine", _arc(0.62, -0.38, 0.1)),
        ("ink", _arc(0.63, -0.38, 0.05)),
        ("other", [(-0.4, 0), (0.3, 0), (-0.1, 0.4)]),
        ("ink", _box(-0.1, 0.52, -0.04, 0.9)),
        ("ink", _box(0.14, 0.52, 0.2, 0.9)),
    ],
    "lamp": [
        ("ink", _box(-0.06, -0.3, 0.06, 0.85)),
        ("dark", [(-0.45, 0.95), (-0.3, 0.78), (0.3, 0.78), (0.45, 0.95)]),
        ("main", [(-0.35, -0.95), (0.35, -0.95), (0.75, -0.1), (-0.75, -0.1)]),
        ("shine", _box(-0.7, -0.2, 0.7, -0.1)),
        ("other", _box(-0.46, -0.62, 0.46, -0.5)),
        ("shine", _arc(0, -0.02, 0.14, end=180)),
    ],
    "sun": [
        *_rays(10),
        ("main", _arc(0, 0, 0.56)),
        ("ink", _arc(-0.18, -0.1, 0.07)),
        ("ink", _arc(0.18, -0.1, 0.07)),
        ("ink", _arc(0, 0.12, 0.24, 0.14, end=180)),
    ],
    "cup": [
        ("dark", _arc(0.72, 0.1, 0.36)),
        ("hole", _arc(0.72, 0.1, 0.2)),
        ("main", [(-0.7, -0.45), (0.7, -0.45), (0.52, 0.85), (-0.52, 0.85)]),
        ("ink", _arc(0, -0.45, 0.7, 0.18)),
        ("other", _box(-0.62, 0.1, 0.62, 0.3)),
        ("shine", [(-0.3, -0.75), (-0.2, -1.05), (-0.1, -1.05), (-0.2, -0.75)]),
        ("shine", [(0.1, -0.75), (0.2, -1.05), (0.3, -1.05), (0.2, -0.75)]),
    ],
    "butterfly": [
        ("main", _arc(-0.5, -0.35, 0.48, 0.4)),
        ("main", _arc(0.5, -0.35, 0.48, 0.4)),
        ("other", _arc(-0.4, 0.4, 0.36)),
        ("other", _arc(0.4, 0.4, 0.36)),
        ("shine", _arc(-0.55, -0.38, 0.17)),
        ("shine", _arc(0.55, -0.38, 0.17)),
        ("dark", _arc(-0.42, 0.42, 0.14)),
        ("dark", _arc(0.42, 0.42, 0.14)),
        ("ink", _arc(0, 0.05, 0.1, 0.6)),
        ("ink", [(0, -0.5), (-0.28, -0.95), (-0.2, -0.98)]),
        ("ink", [(0, -0.5), (0.28, -0.95), (0.2, -0.98)]),
    ],
    "mushroom": [
        ("shine", [(-0.22, 0), (0.22, 0), (0.32, 0.95), (-0.32, 0.95)]),
        ("main", _arc(0, 0.1, 0.95, begin=180)),
        ("other", _arc(-0.4, -0.3, 0.17)),
        ("other", _arc(0.15, -0.5, 0.2)),
        ("other", _arc(0.55, -0.15, 0.15)),
        ("dark", _box(-0.9, 0.05, 0.9, 0.16)),
    ],
}

THINGS = tuple(_PARTS)
"""Class names; a scene's label is an index into them."""

MASK_CLASSES = (*UPPER, *LOWER, *THINGS)
"""Names of the values of a scene's segmentation."""


@dataclass(frozen=True)
class _Shape:
    """A thing's parts one after another: coordinates, the role of each part, and where each begins and ends."""

    x_P: NDArray[np.float64]
    y_P: NDArray[np.float64]
    parts: tuple[tuple[str, int, int], ...]


@lru_cache(maxsize=len(THINGS))
def _shape(thing: str) -> _Shape:
    side, unit = 256, 64
    silhouette = Image.new("1", (side, side))
    draw = ImageDraw.Draw(silhouette)
    for role, outline in _PARTS[thing]:
        draw.polygon([(round(unit * x) + side // 2, round(unit * y) + side // 2) for x, y in outline], role != "hole")
    size = math.sqrt(_AREA * unit**2 / int(np.asarray(silhouette).sum()))
    # Rounded: the last bits of cosines depend on the machine's library.
    points = [(round(size * x, 3), round(size * y, 3)) for _, outline in _PARTS[thing] for x, y in outline]
    parts, end = [], 0
    for role, outline in _PARTS[thing]:
        parts.append((role, 2 * end, 2 * (end + len(outline))))
        end += len(outline)
    return _Shape(np.array([x for x, _ in points]), np.array([y for _, y in points]), tuple(parts))


# --- drawing --------------------------------------------------------------------------------------------------------


class _Draws:
    """Numbers of one scene, in turn."""

    def __init__(self, key: bytes) -> None:
        self._values = iter(uniform(raw_bits([key], _DRAWS)[0]).tolist())

    def between(self, low: float, high: float) -> float:
        value: float = next(self._values)
        return low + (high - low) * value

    def below(self, count: int) -> int:
        return int(self.between(0, count))

    def one_of(self, names: tuple[str, ...]) -> str:
        return names[self.below(len(names))]


_ROWS: NDArray[np.int32]
_COLUMNS: NDArray[np.int32]
_ROWS, _COLUMNS = np.mgrid[0:SCENE_SIZE, 0:SCENE_SIZE].astype(np.int32)
_WAVE = np.array([round(100 * math.sin(2 * math.pi * step / 256)) for step in range(256)], np.int32)
_TURNS = tuple(
    (round(math.cos(math.radians(degrees)), 6), round(math.sin(math.radians(degrees)), 6)) for degrees in range(-15, 16)
)
_Levels = NDArray[np.int32]


def _wave(phase: _Levels) -> _Levels:
    """-100 to 100, with a period of 256."""
    levels: _Levels = _WAVE[phase & 255]
    return levels


def _texture(stuff: str, draws: _Draws, noise: _Levels) -> _Levels:
    """(64, 64) levels to add to the colour of a stuff; `noise` is -128 to 127."""
    right, down, scale = draws.below(256), draws.below(256), draws.between(0, 1)
    levels: _Levels
    match stuff:
        case "sky":
            clouds = _wave(_COLUMNS * (2 + int(3 * scale)) + right) + _wave(_ROWS * 6 + _COLUMNS * 3 + down)
            levels = np.maximum(clouds - 60, 0) // 3 - _ROWS
        case "wall":
            height = 6 + int(3 * scale)
            row = (_ROWS + down) // height
            joint = ((_ROWS + down) % height == 0) | ((_COLUMNS + right + (row & 1) * height) % (2 * height) == 0)
            levels = np.where(joint, -45, 8) + noise // 32
        case "forest":
            levels = _wave(_COLUMNS * (36 + int(20 * scale)) + right + (noise >> 2)) // 3 - 10
        case "hills":
            ridge = 20 + _wave(_COLUMNS * (3 + int(3 * scale)) + right) // 12 + _wave(_COLUMNS * 9 + down) // 25
            levels = np.where(ridge < _ROWS, (_ROWS - ridge) // 2 - 30, 20)
        case "grass":
            levels = np.where(((_COLUMNS * 7 + (noise >> 4) + _ROWS * 3) & 7) < 3, -28, 10) + noise // 16
        case "water":
            levels = _wave(_ROWS * (28 + int(14 * scale)) + (_wave(_COLUMNS * 10 + right) >> 1) + down) // 4
        case "sand":
            levels = noise // 4
        case "road":
            line = (np.abs(_ROWS - 50) < 2) & (((_COLUMNS + right) & 15) < 9)
            levels = np.where(line, 70, 0) + noise // 24
        case "tiles":
            side = 8 + int(4 * scale)
            levels = np.where(((_ROWS + down) // side + (_COLUMNS + right) // side) & 1, -22, 22)
        case _:  # snow
            levels = np.where(noise > 118, -52, 8)
    return levels


class _Canvas:
    """What is drawn at four times the size, as numbers of colours; each colour knows its class."""

    def __init__(self) -> None:
        side = SCENE_SIZE * _SUPERSAMPLE
        self._image = Image.new("L", (side, side), 0)
        self._draw = ImageDraw.Draw(self._image)
        self._colours: list[tuple[int, ...]] = []

    def colour(self, rgb: list[float], name: str) -> int:
        """A new colour of a class."""
        self._colours.append((*(max(0, min(255, int(level))) for level in rgb), MASK_CLASSES.index(name)))
        return len(self._colours) - 1

    def fill(self, flat: list[int], colour: int) -> None:
        """Fill the polygon x, y, x, y, ..."""
        self._draw.polygon(flat, fill=colour)

    def taken(self) -> tuple[_Levels, NDArray[np.uint8]]:
        """Antialiased levels (64, 64, 3), and classes (64, 64)."""
        table, half = np.array(self._colours, np.uint8), _SUPERSAMPLE // 2
        classes = table[:, 3][np.asarray(self._image)[half::_SUPERSAMPLE, half::_SUPERSAMPLE]]
        self._image.putpalette(table[:, :3].tobytes())
        return np.asarray(self._image.convert("RGB").reduce(_SUPERSAMPLE)).astype(np.int32), classes


class _Placed(NamedTuple):
    """A thing at a place, in pixels; `in_front` of the large thing or behind it."""

    name: str
    x: float
    y: float
    radius: float
    in_front: bool = False


def _draw_thing(canvas: _Canvas, draws: _Draws, thing: _Placed, behind: int) -> str:
    """Draw a thing in its pose and colours; returns the name of its colour. `behind` is the colour of a hole."""
    shape, (cos, sin) = _shape(thing.name), _TURNS[draws.below(len(_TURNS))]
    mirror = 1 if draws.below(2) else -1
    wide, high = (_SUPERSAMPLE * thing.radius * draws.between(0.88, 1.12) for _ in range(2))
    x_P = shape.x_P * (cos * wide * mirror) - shape.y_P * (sin * high) + thing.x * _SUPERSAMPLE
    y_P = shape.x_P * (sin * wide * mirror) + shape.y_P * (cos * high) + thing.y * _SUPERSAMPLE
    flat: list[int] = np.rint(np.stack([x_P, y_P], axis=1)).astype(np.int32).ravel().tolist()
    name = draws.one_of(tuple(COLOURS))
    second = draws.one_of(tuple(colour for colour in COLOURS if colour != name))
    main, other = ([level + draws.between(-20, 20) for level in COLOURS[colour]] for colour in (name, second))
    ink, shine = [40.0, 40.0, 45.0], [240.0, 238.0, 230.0]
    if draws.below(2):
        ink, shine = [level * 0.45 for level in main], [128 + level / 2 for level in other]
    shades = {
        "main": main,
        "other": other,
        "dark": [level * 0.6 for level in main],
        "light": [level * 0.6 + 95 for level in main],
        "ink": ink,
        "shine": shine,
    }
    colours = {"hole": behind} | {role: canvas.colour(rgb, thing.name) for role, rgb in shades.items()}
    for role, begin, end in shape.parts:
        canvas.fill(flat[begin:end], colours[role])
    return name


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
    key = seed_of("scene", seed, index).to_bytes(16, "little")
    draws = _Draws(key)
    noise = raw_bits([key], SCENE_SIZE**2 // 8, sequence=1).astype("<u8").view(np.uint8).reshape(SCENE_SIZE, SCENE_SIZE)
    grain = noise.astype(np.int32) - 128

    upper, lower = draws.one_of(UPPER), draws.one_of(LOWER)
    canvas = _Canvas()
    stuff = [canvas.colour([draws.between(60, 190) for _ in range(3)], name) for name in (upper, lower)]
    horizon, slope, side = draws.between(22, 44), draws.between(-4, 4), SCENE_SIZE * _SUPERSAMPLE
    left, right = (int(_SUPERSAMPLE * (horizon + way * slope)) for way in (-1, 1))
    canvas.fill([0, left, side, right, side, side, 0, side], stuff[1])

    label, radius = draws.below(len(THINGS)), draws.between(19.5, 25.5)
    margin = 0.8 * radius
    x, y = (draws.between(margin, SCENE_SIZE - margin) for _ in range(2))
    small = []
    for _ in range(1 + draws.below(2)):
        other = THINGS[(label + 1 + draws.below(len(THINGS) - 1)) % len(THINGS)]
        size = draws.between(6.5, 9.5)
        for _ in range(4):  # beside the large thing, if a few tries find room
            at = draws.between(3, SCENE_SIZE - 3), draws.between(3, SCENE_SIZE - 3)
            if (at[0] - x) ** 2 + (at[1] - y) ** 2 > (radius + size) ** 2:
                break
        small.append(_Placed(other, *at, size, in_front=draws.below(3) == 0))
    small.sort(key=lambda one: one.in_front)
    large, first = _Placed(THINGS[label], x, y, radius), small[0]
    behind = [one for one in small if not one.in_front]
    things = [*behind, large, *small[len(behind) :]]
    colours = {id(one): _draw_thing(canvas, draws, one, stuff[int(one.y > horizon)]) for one in things}

    levels, classes = canvas.taken()
    for name in (upper, lower):
        levels += np.where(classes == MASK_CLASSES.index(name), _texture(name, draws, grain), 0)[..., None]
    levels += (grain >> 5)[..., None]
    thing, beside = f"{colours[id(large)]} {large.name}", f"{colours[id(first)]} {first.name}"
    across, down = "left of" if x < first.x else "right of", "above" if y < first.y else "below"
    where = across if abs(x - first.x) > abs(y - first.y) else down
    captions = (
        f"a {large.name}",
        f"a {thing}",
        f"a {large.name} {where} a {first.name}",
        f"a {thing} {where} a {beside}",
        f"a {thing} {where} a {beside} with {lower} and {upper}",
    )
    return Scene(
        image=np.clip(levels, 0, 255).astype(np.uint8),
        label=label,
        captions=tuple(line.replace("a orange", "an orange") for line in captions),
        segmentation=classes,
    )
