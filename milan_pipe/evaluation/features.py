"""Labelled image shards to frozen features."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from milan_pipe.config.evaluation import EmbedSettings
from milan_pipe.config.images import IMAGE_LIMITS, MAX_PIXELS, ImageSettings
from milan_pipe.devices import memory_for
from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, ShapeError
from milan_pipe.evaluation.backbone import Backbone
from milan_pipe.images.ahead import decoded_ahead, thread_count
from milan_pipe.images.decode import decode_image
from milan_pipe.images.labelled import LabelledImages, is_class_folder, labelled_images, no_label
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import OnBad, Sample, read_shard
from milan_pipe.student.pixels import normalise
from milan_pipe.units import some
from milan_pipe.weights_file import load_tensors, metadata_of, vouched, write_weights

T = TypeVar("T")

Embedder = Callable[[Tensor], Tensor]
"""(B, H, W, 3) uint8 pixels, H = W, to (B, F) float features, on any device."""

Tokens = Callable[[Tensor], Tensor]
"""The same pixels to (B, S, D), as `Layout.tokens`."""


def require_directions(features_NF: Tensor) -> None:
    """Raise DataError unless each of N features is finite and not all zero."""
    broken = int((~features_NF.isfinite().all(dim=1) | ~features_NF.any(dim=1)).sum())
    if broken:
        raise DataError(
            f"features of {broken} of {len(features_NF)} images are all zero or not finite; the encoder's weights may "
            "have diverged: take an earlier checkpoint"
        )


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """Features of N images, float32 on the CPU, and the class of each, int64 and 0 or more; in the shards' order.

    Raises:
        ShapeError: the two do not fit each other, or one has another type.
        DataError: no samples, a feature that is all zero or not finite, or a label below 0.
    """

    features_NF: Tensor
    label_N: Tensor

    def __post_init__(self) -> None:
        features_NF, label_N = self.features_NF, self.label_N
        if features_NF.ndim != 2 or label_N.shape != features_NF.shape[:1]:
            raise ShapeError(
                f"features have shape {tuple(features_NF.shape)}, labels {tuple(label_N.shape)}; expected (N, F), (N,)"
            )
        if features_NF.dtype != torch.float32 or label_N.dtype != torch.int64:
            raise ShapeError(
                f"features are {features_NF.dtype}, labels {label_N.dtype}; expected torch.float32 and torch.int64"
            )
        if not features_NF.numel():
            raise DataError("there are no features; expected one sample and one value at least")
        require_directions(features_NF)
        if int(label_N.min()) < 0:
            raise DataError(f"label {int(label_N.min())} is no class; expected 0 or more")


def check_same_task(train: LabelledFeatures, test: LabelledFeatures) -> None:
    """Raise ShapeError where features differ in width, DataError where `test` has classes that `train` lacks."""
    if train.features_NF.shape[1] != test.features_NF.shape[1]:
        raise ShapeError(
            f"train features are {train.features_NF.shape[1]} wide, test features {test.features_NF.shape[1]}; "
            "embed both with the same encoder"
        )
    lacking = [str(label) for label in sorted({*test.label_N.tolist()} - {*train.label_N.tolist()})]
    if lacking:
        raise DataError(
            f"test images are of classes that no train image has ({len(lacking)}): {some(lacking, 10)}; prepare both "
            "from folders of the same class names"
        )


def tokens_of(backbone: Backbone, device: torch.device) -> Tokens:
    """A backbone's encoder on `device`, in evaluation; pixels that are not of its input size raise ShapeError."""
    encoder: Any = backbone.encoder().to(device).eval()
    layout, side = backbone.layout, backbone.settings.image_size

    def tokens(pixels_BHWC: Tensor) -> Tensor:
        if tuple(pixels_BHWC.shape[1:]) != (side, side, 3):
            found = f"pixels have shape {tuple(pixels_BHWC.shape)}, expected (B, {side}, {side}, 3)"
            raise ShapeError(f"{found}; render the views at the model's image_size")
        return layout.tokens(encoder.forward_features(normalise(pixels_BHWC.to(device), *backbone.normalization)))

    return tokens


def kept_features(
    folder: str | Path | None, identity: Mapping[str, object], compute: Callable[[], LabelledFeatures]
) -> LabelledFeatures:
    """Features that were computed before, or compute and keep them.

    Args:
        folder: for one file for each identity; None keeps nothing.
        identity: JSON data, all that the features depend on.

    Raises:
        DataError, StoreError: a kept file is damaged or cannot be read, or `folder` cannot be written.
    """
    if folder is None:
        return compute()
    # Files of version 1, without a digest, have other names.
    named = json.dumps({"version": 2, **identity}, sort_keys=True)
    name = sha256_of(named.encode())[:32]
    file = Path(folder) / f"{name}.safetensors"
    if file.is_file():
        try:
            kept = load_tensors(file)
            # Under the name of another identity it would be read as what it is not.
            if metadata_of(file) != {"sha256": vouched(name, kept)}:
                raise DataError("its digest is another")
            return LabelledFeatures(features_NF=kept["features"], label_N=kept["labels"])
        except (DataError, KeyError, ShapeError) as error:
            raise DataError(
                f"{file} cannot be read ({type(error).__name__}); remove it, features are then made anew"
            ) from None
    found = compute()
    tensors = {"features": found.features_NF, "labels": found.label_N}
    write_weights(tensors, file, {"sha256": vouched(name, tensors)})
    return found


def centre_view(image: Image.Image, size: int, crop: float) -> NDArray[np.uint8]:
    """The image's centre square, (size, size, 3), as images are shown at test time; a very long one is a DataError.

    The shorter side is resized to floor(size / crop), bicubic with antialiasing; the longer one is rounded down.

    Source: torchvision's Resize and CenterCrop, with timm's rule for the shorter side.
    """
    shorter = max(size, math.floor(size / crop))
    short_side = min(image.size)
    width, height = (shorter * side // short_side for side in image.size)
    if width * height > MAX_PIXELS:
        found = f"{image.width} x {image.height} pixels, too long and thin"
        raise DataError(f"{found}: {width} x {height} when resized, more than {MAX_PIXELS}")
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled.size)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class Embedded(Generic[T]):
    """What a model gives for B images, with their keys and labels."""

    keys: list[str]
    labels: list[int]
    value: T


def embedded(
    samples: Iterable[Sample],
    model: Callable[[Tensor], T],
    size: int,
    settings: EmbedSettings,
    limits: ImageSettings,
    on_bad: OnBad,
) -> Iterator[Embedded[T]]:
    """Run a model over the centre squares of images, in their order, without gradients; bad images are skipped.

    Args:
        model: takes (B, size, size, 3) uint8.
        settings: `pool` is not read here; nothing depends on `threads`.
    """

    def view_of(sample: Sample) -> tuple[NDArray[np.uint8], str, int]:
        return centre_view(decode_image(sample.data, limits), size, settings.crop), sample.key, sample.label

    threads = thread_count(settings.threads)
    views = decoded_ahead(samples, view_of, threads, max(settings.batch_size, 32 * threads), on_bad)
    while batch := list(islice(views, settings.batch_size)):
        pixels, keys, labels = zip(*batch, strict=True)
        pixels_BHWC = torch.from_numpy(np.stack(pixels))
        try_instead = f"try embed.batch_size={max(1, settings.batch_size // 2)}"
        with torch.inference_mode(), memory_for(f"embed.batch_size {settings.batch_size}", try_instead):
            value = model(pixels_BHWC)
        yield Embedded(list(keys), list(labels), value)


def embed_shards(
    images: str | Path,
    embedder: Embedder,
    size: int,
    settings: EmbedSettings,
    on_bad: OnBad = lambda *_: None,
    on_progress: Callable[[int], None] = lambda _: None,
    *,
    limits: ImageSettings = IMAGE_LIMITS,
) -> LabelledFeatures:
    """Embed all labelled images of `images`, without gradients.

    The result, order included, does not depend on `settings.threads`.

    Args:
        images: as `labelled_images` takes them.
        size: height and width of the pixels that `embedder` takes.
        settings: `pool` is not read here.
        on_bad: called with key and reason of each image that is skipped.
        on_progress: called with the number of images done.
        limits: an image above them is skipped.

    Raises:
        ShapeError: the embedder does not return (B, F).
        MissingError, DataError, StoreError: as `labelled_images` and `LabelledFeatures`, or no image can be read.
    """
    bad = 0

    def skip(key: str, reason: str) -> None:
        nonlocal bad
        bad += 1
        on_bad(key, reason)

    features: list[Tensor] = []
    labels: list[int] = []
    for batch in embedded(labelled_samples(images, skip), embedder, size, settings, limits, skip):
        features_BF = batch.value
        if features_BF.ndim != 2 or len(features_BF) != len(batch.keys):
            raise ShapeError(
                f"the embedder returned shape {tuple(features_BF.shape)} for {len(batch.keys)} images, expected (B, F)"
            )
        features.append(features_BF.to("cpu", torch.float32))
        labels += batch.labels
        on_progress(len(labels))
    if not labels:
        raise DataError(f"none of the {bad} images of {images} can be read; prepare the shards again")
    # Concatenated outside inference mode: the result is an ordinary tensor.
    return LabelledFeatures(features_NF=torch.cat(features), label_N=torch.tensor(labels))


def numbered_samples(images: LabelledImages, numbers: Iterable[int], on_bad: OnBad) -> Iterator[Sample]:
    """Images by number, read; those that cannot be are skipped."""
    for number in numbers:
        key = images.keys[number]
        try:
            data = images.read(number)
        except DataError as error:
            on_bad(key, str(error))
        else:
            yield Sample(key=key, data=data, label=int(images.label_N[number]), caption=None)


def labelled_samples(images: str | Path, on_bad: OnBad, most: int | None = None) -> Iterator[Sample]:
    """Labelled images, read in their order; those that cannot be are skipped.

    Args:
        images: as `labelled_images` takes them.
        most: of shards the first so many are read, and no more; of class folders so many, evenly spaced, as each class
            has its images in a row.
    """
    if is_class_folder(images):
        folders = labelled_images(images, on_bad)
        count = min(len(folders), most or len(folders))
        yield from numbered_samples(folders, (number * len(folders) // count for number in range(count)), on_bad)
        return
    yield from islice(_in_shards(images, on_bad), most)


def _in_shards(images: str | Path, on_bad: OnBad) -> Iterator[Sample]:
    for shard in expand_shards(images):
        for sample in read_shard(shard, on_bad):
            if sample.label < 0:
                raise no_label(shard, sample.key)
            yield sample
