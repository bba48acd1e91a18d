"""Images and masks of a segmentation: augmented, or untouched. Every draw is a function of seed, epoch and key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN

from milan_pipe.config.images import ImageSettings
from milan_pipe.evaluation.batches import SampleRequest
from milan_pipe.evaluation.sliding import scaled_size
from milan_pipe.images.decode import decode_image
from milan_pipe.images.masked import MaskedImages, MaskRule, decode_mask
from milan_pipe.random_bits import seed_of

PADDING = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
"""What is nearest to zero once it is normalised."""

_TRIES = 10
_MOST_OF_ONE_CLASS = 0.75


def photometric(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness by up to 32 levels, contrast and saturation by 0.5 to 1.5, hue by up to 18 of 180 degrees.

    Each with probability 1/2, contrast before or after the other two.

    Source: SSD, arXiv 1512.02325, with the numbers of MMSegmentation's PhotoMetricDistortion.
    """
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels + np.float32(rng.uniform(-32, 32))
    early, contrast = rng.random() < 0.5, np.float32(rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else None
    if early and contrast is not None:
        pixels = pixels * contrast
    saturation = np.float32(rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else None
    hue = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0
    if saturation is not None or hue:
        hsv = np.asarray(_image(pixels).convert("HSV"), dtype=np.float32).copy()
        if saturation is not None:
            hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
        hsv[..., 0] = (hsv[..., 0] + hue * 256 / 180) % 256
        rgb = Image.frombytes("HSV", image.size, hsv.astype(np.uint8).tobytes()).convert("RGB")
        pixels = np.asarray(rgb, dtype=np.float32)
    if not early and contrast is not None:
        pixels = pixels * contrast
    return _image(pixels)


def _image(pixels: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def crop_corner(mask_HW: NDArray[np.int64], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where a square begins: drawn anew, up to ten times, while one class has more than 3/4 of its labelled pixels."""
    height, width = mask_HW.shape
    corner = (0, 0)
    if height <= side and width <= side:
        return corner
    for _ in range(_TRIES):
        corner = int(rng.integers(0, max(height - side, 0) + 1)), int(rng.integers(0, max(width - side, 0) + 1))
        part = mask_HW[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        counts = np.bincount(part[part >= 0])
        if counts.any() and counts.max() / counts.sum() < _MOST_OF_ONE_CLASS:
            break
    return corner


@dataclass(frozen=True)
class TestMasks:
    """Image `SampleRequest.number` and its mask, untouched: (image, mask_HW).

    Their sizes differ, so that they are not stacked; neither is a tensor, see `load_batches`.
    """

    images: MaskedImages
    rule: MaskRule
    limits: ImageSettings

    def __call__(self, request: SampleRequest) -> tuple[Image.Image, NDArray[np.int64]]:
        """Raises DataError where the image cannot be read, LabelError where its mask is wrong."""
        number = request.number
        image = decode_image(self.images.image(number), self.limits)
        size = image.height, image.width
        return image, decode_mask(self.images.mask(number), self.rule, size, self.images.keys[number], self.limits)


@dataclass(frozen=True, kw_only=True)
class TrainingMasks:
    """Image `SampleRequest.number` as a training view of its epoch: (pixels_HWC, mask_HW), `side` square; -1 no class.

    The image is resized to a shorter side of `short` times a ratio from the range `ratio`.
    """

    masks: TestMasks
    side: int
    short: int
    ratio: tuple[float, float]
    seed: int

    def __call__(self, request: SampleRequest) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Raises as `masks`."""
        image, mask_HW = self.masks(request)
        side, key = self.side, self.masks.images.keys[request.number]
        rng = np.random.Generator(np.random.Philox(key=seed_of(self.seed, request.epoch, key)))
        short = self.short * rng.uniform(*self.ratio)
        height, width = scaled_size(mask_HW.shape, short, 4 * short)
        if (height, width) != mask_HW.shape:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            scaled = Image.fromarray(mask_HW.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
            mask_HW = np.asarray(scaled, dtype=np.int64)
        top, left = crop_corner(mask_HW, side, rng)
        image = image.crop((left, top, min(left + side, width), min(top + side, height)))
        mask_HW = mask_HW[top : top + side, left : left + side]
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
            mask_HW = mask_HW[:, ::-1]
        pixels_HWC = np.full((side, side, 3), PADDING, np.uint8)
        pixels_HWC[: image.height, : image.width] = np.asarray(photometric(image, rng))
        padded_HW = np.full((side, side), -1, np.int32)
        padded_HW[: image.height, : image.width] = mask_HW
        return pixels_HWC, padded_HW
