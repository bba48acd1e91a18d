"""The built-in scenes as a source of images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from milan_pipe.config.images import TEST_SCENE_OFFSET, PrepareSettings
from milan_pipe.images.files import MASK_SUFFIX
from milan_pipe.images.scenes import MASK_CLASSES, THINGS, render_scene
from milan_pipe.images.source import Bad, Job, Members, Source, label_and_caption

DEMO = "demo"
"""The source whose images are rendered."""


@dataclass(frozen=True, kw_only=True)
class _Scenes:
    seed: int
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def members(self, bad: list[Bad]) -> Iterator[Members]:  # noqa: ARG002
        for number in self.numbers:
            scene = render_scene(self.seed, number)
            parts = {"png": _png(scene.image)} | label_and_caption(scene.label, "\n".join(scene.captions))
            yield f"scene-{number:010d}", {**parts, MASK_SUFFIX: _png(scene.segmentation)}


def demo_source(settings: PrepareSettings) -> Source:
    """Scenes with labels, captions and masks, in splits train and test."""
    splits = {
        "train": range(settings.train_scenes),
        "test": range(TEST_SCENE_OFFSET, TEST_SCENE_OFFSET + settings.test_scenes),
    }
    step = settings.samples_per_shard
    jobs = [
        Job(split=split, part=_Scenes(seed=settings.seed, numbers=numbers[start : start + step]))
        for split, numbers in splits.items()
        for start in range(0, len(numbers), step)
    ]
    described = {"kind": DEMO, "seed": settings.seed}
    return Source(described=described, jobs=jobs, classes=THINGS, mask_classes=MASK_CLASSES)


def _png(values: NDArray[np.uint8]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    return png.getvalue()
