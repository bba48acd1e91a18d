"""Labelled images and masks for tests: easy to learn, of odd sizes, in shards and in folders."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from milan_pipe.config.student import StudentSettings

TINY = StudentSettings(image_size=16, patch_size=4, width=16, depth=2, heads=2)
NAMES = ("ant", "bee", "cat")


def png(values: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def bad_of(images: Path) -> list[tuple[str, str]]:
    """File and reason of each image that `prepare` skipped."""
    lines = (images / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["file"], row["reason"]) for row in map(json.loads, lines)]


def image(number: int, label: int) -> NDArray[np.uint8]:
    """Noise of a size of its own, brighter in the channel of its class."""
    rng = np.random.default_rng(number)
    height, width = 17 + number % 5, 20 + number % 7
    values = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
    values[..., label] += 120
    return values


def halves(number: int) -> NDArray[np.uint8]:
    """An image that is brighter where `mask` has class 1."""
    values = image(number, 0)
    values[..., 0] -= 120
    values[:, values.shape[1] // 2 :] += 130
    return values


def mask(number: int) -> NDArray[np.uint8]:
    """Two classes, left and right, and a row of no class."""
    height, width = image(number, 0).shape[:2]
    values = np.zeros((height, width), np.uint8)
    values[:, width // 2 :] = 1
    values[0] = 255
    return values


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled_shard(path: Path, numbers: range, *, masks: bool = False) -> Path:
    members: dict[str, bytes] = {}
    for number in numbers:
        members[f"{number:04d}.png"] = png(halves(number) if masks else image(number, number % 3))
        members[f"{number:04d}.cls"] = str(number % 3).encode()
        if masks:
            members[f"{number:04d}.mask.png"] = png(mask(number))
    return write_tar(path, members)


def class_folders(root: Path, numbers: range, names: tuple[str, ...] = NAMES) -> Path:
    for number in numbers:
        folder = root / names[number % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.png").write_bytes(png(image(number, number % len(names))))
    return root


def mask_folders(images: Path, masks: Path, numbers: range, *, shift: int = 0) -> None:
    """Images and masks of equal names; `shift` is added to classes, 255 stays."""
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (images / f"{number:04d}.jpg").write_bytes(_jpeg(halves(number)))
        values = mask(number)
        values[values != 255] += shift
        (masks / f"{number:04d}.png").write_bytes(png(values))


def _jpeg(values: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
