"""Images of a classifier: augmented by timm's transforms, or as in a test."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor

from milan_pipe.config.evaluation import AugmentSettings
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.batches import SampleRequest
from milan_pipe.evaluation.features import centre_view
from milan_pipe.images.decode import decode_image
from milan_pipe.images.labelled import LabelledImages
from milan_pipe.random_bits import seed_of
from milan_pipe.student.pixels import normalise


@contextmanager
def kept_generators() -> Iterator[None]:
    """Python's, numpy's and torch's global CPU generators are afterwards as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def reseed(*parts: int | str) -> None:
    """Set these generators as a function of `parts`."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Both of the above."""
    with kept_generators():
        reseed(*parts)
        yield


def training_view(settings: AugmentSettings, size: int) -> Callable[[Image.Image], Tensor]:
    """A crop of (3, size, size) normalised floats, drawn from the global generators; raises SettingError."""
    if not 0 < settings.scale[0] <= settings.scale[1] <= 1:
        raise SettingError(
            "augment.scale is the least and the greatest share of the area, above 0 and at most 1, found "
            f"{settings.scale}"
        )
    try:
        view: Callable[[Image.Image], Tensor] = create_transform(
            input_size=size,
            is_training=True,
            scale=settings.scale,
            hflip=settings.flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=settings.auto_augment,
            interpolation="bicubic",
            re_prob=settings.erasing,
            re_mode="pixel",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
        for step in getattr(view, "transforms", ()):
            for op in getattr(step, "ops", ()):
                if str(getattr(op, "name", "")).startswith("Posterize"):
                    op.aug_fn = _posterize
        with seeded("trial"):
            view(Image.new("RGB", (size, size)))
    # timm checks these words by assertions and look-ups.
    except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise SettingError(
            f"augment.auto_augment={settings.auto_augment!r} is not understood by timm ({error!r}); expected words as "
            "rand-m9-mstd0.5-inc1"
        ) from error
    return view


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # timm asks for 0 bits at the strongest level, which newer versions of Pillow refuse and older ones painted black.
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


class TrainingImages:
    """Image `SampleRequest.number` as a training view of its epoch: (pixels_CHW, label).

    The global generators are other ones afterwards: keeping them takes longer than the view of a small image, so who
    needs them does it for a whole run.
    """

    def __init__(self, images: LabelledImages, settings: AugmentSettings, size: int, seed: int) -> None:
        self._images, self._seed = images, seed
        self._view = training_view(settings, size)

    def __call__(self, request: SampleRequest) -> tuple[Tensor, int]:
        """Raises DataError where the image cannot be read."""
        image = decode_image(self._images.read(request.number))
        reseed(self._seed, request.epoch, self._images.keys[request.number])
        return self._view(image), int(self._images.label_N[request.number])


@dataclass(frozen=True)
class TestImages:
    """Image `SampleRequest.number` as in a test, its centre `crop`: (pixels_CHW, label)."""

    images: LabelledImages
    size: int
    crop: float

    def __call__(self, request: SampleRequest) -> tuple[Tensor, int]:
        """Raises DataError where the image cannot be read."""
        image = decode_image(self.images.read(request.number))
        pixels_HWC = torch.from_numpy(np.array(centre_view(image, self.size, self.crop)))
        return normalise(pixels_HWC[None])[0], int(self.images.label_N[request.number])


def build_mixup(settings: AugmentSettings, classes: int, part: int) -> Mixup | None:
    """timm's mixup and cutmix, label smoothing included; None where both are off.

    Args:
        part: images that are mixed with each other, a rank's share of the batch; an odd number is a SettingError.
    """
    if not settings.mixup and not settings.cutmix:
        return None
    if part % 2:
        raise SettingError(
            f"mixup and cutmix pair the images of a batch, {part} of them on this rank; choose a batch_size that "
            "gives every rank an even number, or set augment.mixup=0 and augment.cutmix=0"
        )
    mixup: Mixup = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    return mixup
