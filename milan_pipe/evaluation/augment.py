"""Images of a classifier: augmented by timm's transforms, or as in a test."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor

from milan_pipe.config.evaluation import AugmentSettings
from milan_pipe.config.images import IMAGE_LIMITS, ImageSettings
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.batches import SampleRequest
from milan_pipe.evaluation.features import centre_view
from milan_pipe.images.decode import decode_image
from milan_pipe.images.labelled import LabelledImages
from milan_pipe.random_bits import seed_of

Box = tuple[int, int, int, int]


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
    """A crop of (3, size, size) uint8, drawn from the global generators; raises SettingError."""
    if not 0 < settings.scale[0] <= settings.scale[1] <= 1:
        raise SettingError(
            "augment.scale is the least and the greatest share of the area, above 0 and at most 1, found "
            f"{settings.scale}"
        )
    try:
        view: Callable[[Image.Image], Tensor] = create_transform(
            input_size=size,
            is_training=True,
            use_prefetcher=True,
            scale=settings.scale,
            hflip=settings.flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=settings.auto_augment,
            interpolation="bicubic",
            # RandAugment fills with it what it moves in.
            mean=IMAGENET_DEFAULT_MEAN,
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


class Erasing:
    """timm's random erasing with normal noise, for pixels that are not normalised yet.

    The noise stands in the pixels, in steps of 1/32 from -4 to 4, and `restored` gives it back: a batch stays in bytes
    on its way to the device.
    """

    ZERO, STEPS = 128, 32

    def __init__(self, probability: float) -> None:
        self._erase = RandomErasing(probability, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]

    def __call__(self, pixels_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Box]:
        """Pixels, and top, bottom, left and right of what is noise in them; all 0: nothing."""
        if not self._erase.probability:
            return pixels_HWC, (0, 0, 0, 0)
        noise_CHW = self._erase(torch.zeros(pixels_HWC.shape[2], *pixels_HWC.shape[:2])).numpy()
        down, across = noise_CHW.any(axis=(0, 2)).nonzero()[0], noise_CHW.any(axis=(0, 1)).nonzero()[0]
        if not len(down):
            return pixels_HWC, (0, 0, 0, 0)
        top, bottom, left, right = box = int(down[0]), int(down[-1]) + 1, int(across[0]), int(across[-1]) + 1
        coded_CHW = np.clip(np.rint(noise_CHW[:, top:bottom, left:right] * self.STEPS) + self.ZERO, 0, 255)
        erased_HWC = pixels_HWC.copy()
        erased_HWC[top:bottom, left:right] = coded_CHW.transpose(1, 2, 0)
        return erased_HWC, box

    @classmethod
    def restored(cls, pixels_BHWC: Tensor, images_BCHW: Tensor, box_B4: Tensor) -> Tensor:
        """Normalised images with the noise of each box in its place."""
        row_H, column_W = (torch.arange(side, device=box_B4.device) for side in images_BCHW.shape[2:])
        top_B1, bottom_B1, left_B1, right_B1 = box_B4.unsqueeze(-1).unbind(1)
        rows_BH, columns_BW = (row_H >= top_B1) & (row_H < bottom_B1), (column_W >= left_B1) & (column_W < right_B1)
        noise_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() - cls.ZERO) / cls.STEPS
        return torch.where((rows_BH[:, :, None] & columns_BW[:, None])[:, None], noise_BCHW, images_BCHW)


class TrainingImages:
    """Image `SampleRequest.number` as a training view of its epoch: (pixels_HWC, label, box of `Erasing`).

    The global generators are other ones afterwards: keeping them takes longer than the view of a small image, so who
    needs them does it for a whole run.
    """

    def __init__(
        self,
        images: LabelledImages,
        settings: AugmentSettings,
        size: int,
        seed: int,
        limits: ImageSettings = IMAGE_LIMITS,
    ) -> None:
        self._images, self._seed, self._limits = images, seed, limits
        self._view = training_view(settings, size)
        self._erase = Erasing(settings.erasing)

    def __call__(self, request: SampleRequest) -> tuple[NDArray[np.uint8], int, Box]:
        """Raises DataError where the image cannot be read."""
        image = decode_image(self._images.read(request.number), self._limits)
        reseed(self._seed, request.epoch, self._images.keys[request.number])
        pixels_HWC, box = self._erase(np.asarray(self._view(image)).transpose(1, 2, 0))
        return pixels_HWC, int(self._images.label_N[request.number]), box


@dataclass(frozen=True)
class TestImages:
    """Image `SampleRequest.number` as in a test, its centre `crop`: (pixels_HWC, label)."""

    images: LabelledImages
    size: int
    crop: float
    limits: ImageSettings

    def __call__(self, request: SampleRequest) -> tuple[NDArray[np.uint8], int]:
        """Raises DataError where the image cannot be read."""
        image = decode_image(self.images.read(request.number), self.limits)
        return centre_view(image, self.size, self.crop), int(self.images.label_N[request.number])


def build_mixup(settings: AugmentSettings, classes: int, batch_size: int, ranks: int) -> Mixup | None:
    """timm's mixup and cutmix, label smoothing included; None where both are off.

    Each image is mixed with the one that lies alike from the other end of the batch, so that each rank must have both;
    a batch that cannot be shared out like this is a SettingError.
    """
    if not settings.mixup and not settings.cutmix:
        return None
    if batch_size % (2 * ranks):
        raise SettingError(
            f"mixup and cutmix pair the images of a batch; batch_size is {batch_size} for {ranks} rank(s), expected a "
            f"multiple of {2 * ranks}; change it, or set augment.mixup=0 and augment.cutmix=0"
        )
    mixup: Mixup = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    return mixup
