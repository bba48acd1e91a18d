"""Dense features judged without training a network: what frozen patch features say of the class of each pixel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from milan_pipe.config.command import command_of, student_sections
from milan_pipe.config.evaluation import Head
from milan_pipe.config.params import Params
from milan_pipe.devices import memory_for, resolve_device
from milan_pipe.errors import DataError, LabelError, SettingError
from milan_pipe.evaluation.batches import SampleRequest
from milan_pipe.evaluation.features import require_directions
from milan_pipe.evaluation.frozen import FrozenReport, Subject, keep_result, make_kept_folder, subject_of
from milan_pipe.evaluation.masks import rule_and_names
from milan_pipe.evaluation.miou import class_scores, confusion, segmentation_scores
from milan_pipe.evaluation.patch_heads import NeighbourHead, PatchFeatures, PatchHead, fit_linear_head, to_pixels
from milan_pipe.evaluation.segment_views import PADDING, TestMasks
from milan_pipe.evaluation.sliding import (
    resized_strip,
    scaled_size,
    sliding_logits,
    strips,
    usual_stride,
    window_corners,
)
from milan_pipe.images.ahead import decoded_ahead, thread_count
from milan_pipe.images.labelled import warn_if_images_shared
from milan_pipe.images.masked import MaskedImages, MaskRule, masked_images
from milan_pipe.random_bits import permutation
from milan_pipe.units import size as in_bytes
from milan_pipe.units import some

_LOGIT_VALUES = 2**26
"""Scores of windows that are held at a time: 256 MiB of float32."""

OnProgress = Callable[[int, int, str], None]
"""Called with what is done and what is to do, and with what it is."""


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """Shares between 0 and 1, and the table of the classes; see `segmentation_scores` and `class_scores`."""

    miou: float
    aacc: float
    macc: float
    classes: Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SegmentProbeReport(FrozenReport):
    """Scores by head."""

    heads: dict[Head, HeadScores]


@dataclass(frozen=True)
class _Shown:
    """An image as it is shown: (H, W, 3) uint8, `size` without the padding, and its mask, at its own size."""

    pixels_HWC: NDArray[np.uint8]
    size: tuple[int, int]
    mask_HW: NDArray[np.int64]


@dataclass(frozen=True)
class _Numbered:
    key: str
    number: int


def _shown(image: Image.Image, mask_HW: NDArray[np.int64], short: int, window: int) -> _Shown:
    height, width = size = scaled_size(mask_HW.shape, short, 4 * short)
    pixels_HWC = np.full((max(height, window), max(width, window), 3), PADDING, np.uint8)
    pixels_HWC[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return _Shown(pixels_HWC, size, mask_HW)


def patches_of(subject: Subject, pixels_BHWC: Tensor) -> Tensor:
    """(B, L, D) float32 features of the patches, in raster order, on the subject's device.

    Raises:
        DataError: of a window they are all zero, or one is not finite.
    """
    patches_BLD = subject.layout.patches(subject.tokens(pixels_BHWC)).float()
    # As TRAIN keeps them.
    require_directions(patches_BLD.half().flatten(1))
    return patches_BLD


def _require_patches(subject: Subject) -> None:
    height, width = subject.layout.grid
    if height * width < 2:
        raise DataError(f"{subject.name} has a grid of {height} x {width} patches; segment-probe needs two at least")


class _Probe:
    """One subject on TRAIN and VAL."""

    def __init__(self, subject: Subject, rule: MaskRule, params: Params, on_progress: OnProgress) -> None:
        self._subject, self._rule, self._params, self._on_progress = subject, rule, params, on_progress
        self._settings = params.segment_probe
        self._window, self._stride = subject.size, usual_stride(subject.size)
        self._device = resolve_device(params.pretrain.device)
        self.bad: list[str] = []
        self.used = {"train": 0, "test": 0}

    def _read(self, images: MaskedImages, numbers: Sequence[int]) -> Iterator[_Shown]:
        """Decoded ahead on threads; images that cannot be read are left out."""
        take, short = TestMasks(images, self._rule, self._params.images), self._settings.short_side or self._window

        def shown(sample: _Numbered) -> _Shown | LabelError:
            try:
                return _shown(*take(SampleRequest(-1, sample.number)), short, self._window)
            except LabelError as error:
                # A wrong mask ends the work: it is no image to be skipped.
                return error

        threads = thread_count(self._params.embed.threads)
        samples = (_Numbered(images.keys[number], number) for number in numbers)
        for found in decoded_ahead(samples, shown, threads, 32 * threads, lambda key, _: self.bad.append(key)):
            if isinstance(found, LabelError):
                raise found
            yield found

    def _patches(self, pixels_BHWC: Tensor, batch: int) -> Tensor:
        with memory_for(f"{batch} windows at a time", f"try embed.batch_size={max(1, batch // 2)}"):
            return patches_of(self._subject, pixels_BHWC)

    @torch.inference_mode()
    def features(self, images: MaskedImages) -> PatchFeatures:
        """Of the windows of TRAIN's images, in an order that the seed draws.

        Raises:
            DataError, LabelError: no image can be read, none has a class, or a mask is wrong.
            SettingError: they take more than `memory_gb`.
        """
        settings, batch, corner = self._settings, self._params.embed.batch_size, slice(None, self._settings.images)
        numbers = permutation(len(images), settings.seed, "images")[corner].tolist()
        features: list[Tensor] = []
        masks: list[Tensor] = []
        read = self._read(images, numbers)
        while some_images := list(islice(read, batch)):
            cut = [part for shown in some_images for part in self._windows(shown)]
            for start in range(0, len(cut), batch):
                pixels_BHWC = torch.from_numpy(np.stack([pixels_WWC for pixels_WWC, _ in cut[start : start + batch]]))
                features += self._patches(pixels_BHWC, batch).to("cpu", torch.float16)
            masks += [torch.from_numpy(mask_WW) for _, mask_WW in cut]
            self.used["train"] += len(some_images)
            self._on_progress(self.used["train"], len(numbers), "images of TRAIN")
            self._bound(len(features) * (features[0].nbytes + masks[0].nbytes), len(numbers))
        if not masks:
            raise DataError(f"none of the {len(numbers)} images of {images.where} can be read")
        return PatchFeatures(features=features, masks=masks, grid=self._subject.layout.grid)

    def _bound(self, taken: int, images: int) -> None:
        settings, each = self._settings, taken / self.used["train"]
        most = int(settings.memory_gb * 1e9 / each)
        if images > most:
            raise SettingError(
                f"features and masks of {images} images of TRAIN take {in_bytes(int(each * images))}, "
                f"segment_probe.memory_gb is {settings.memory_gb:g}; set segment_probe.images={max(1, most)}, or raise "
                "memory_gb"
            )

    def _windows(self, shown: _Shown) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int16]]]:
        (height, width), (tall, wide, _), window = shown.size, shown.pixels_HWC.shape, self._window
        mask = Image.fromarray(shown.mask_HW.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
        mask_HW = np.full((tall, wide), -1, np.int16)
        mask_HW[:height, :width] = np.asarray(mask)
        for top, left in window_corners(tall, wide, window, self._stride):
            place = slice(top, top + window), slice(left, left + window)
            yield shown.pixels_HWC[place], mask_HW[place]

    @torch.inference_mode()
    def confusions(self, images: MaskedImages, heads: dict[Head, PatchHead]) -> dict[Head, Tensor]:
        """(G, G) counts on VAL by head, by sliding windows; scores are averaged where they overlap.

        Raises:
            DataError, LabelError: no pixel has a class, or a mask is wrong.
        """
        classes, window = self._rule.classes, self._window
        batch = min(self._params.embed.batch_size, max(1, _LOGIT_VALUES // (len(heads) * classes * window**2)))
        counts = {name: torch.zeros((classes, classes), dtype=torch.int64) for name in heads}

        def classify(windows_BCWW: Tensor) -> Tensor:
            patches_BLD = self._patches(windows_BCWW.permute(0, 2, 3, 1), batch)
            return to_pixels(torch.cat([head(patches_BLD) for head in heads.values()], dim=1), window, window)

        read = self._read(images, range(len(images)))
        while some_images := list(islice(read, batch)):
            pixels = [torch.from_numpy(shown.pixels_HWC).permute(2, 0, 1).to(self._device) for shown in some_images]
            found = sliding_logits(classify, pixels, window, self._stride, batch)
            for shown, scores_SHW in zip(some_images, found, strict=True):
                height, width = shown.size
                truth_HW = torch.from_numpy(shown.mask_HW)
                for number, name in enumerate(heads):
                    scores_GHW = scores_SHW[number * classes : (number + 1) * classes, :height, :width]
                    for strip in strips(classes, shown.mask_HW.shape):
                        part_GHW = resized_strip(scores_GHW, shown.mask_HW.shape, strip)
                        counts[name] += confusion(part_GHW.max(dim=0).indices.cpu(), truth_HW[strip], classes)
            self.used["test"] += len(some_images)
            self._on_progress(self.used["test"], len(images), "images of VAL")
        return counts


def segment_probe(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    params: Params,
    *,
    keep: str | Path | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> SegmentProbeReport:
    """mIoU of a linear head and of nearest neighbours on frozen patch features.

    Images are resized to a shorter side of `segment_probe.short_side` and covered by windows of the subject's input
    that advance by two thirds of it, in TRAIN as in VAL; VAL is scored at the masks' own size. Features of TRAIN are
    computed once, without augmentation.

    Args:
        checkpoint: as `subject_of`.
        train, val: as `masked_images`.
        keep: folder for the result, which `report` reads; none: `evaluations` in the run of the checkpoint.

    Raises:
        LabelError: a mask is of another size than its image, in colours, or has a value that is no class.
        MissingError, DataError, MismatchError, SettingError, StoreError: as `subject_of`, `masked_images`,
            `rule_and_names` and the heads, no pixel has a class, or a folder cannot be written.
    """
    make_kept_folder(keep)
    settings = params.segment_probe
    bad: list[str] = []
    train_images, val_images = (
        masked_images(where, split, lambda key, _: bad.append(key)) for where, split in ((train, "train"), (val, "val"))
    )
    warn_if_images_shared(train_images, val_images)
    rule, names = rule_and_names(train_images, val_images, params.segment)
    subject = subject_of(checkpoint, params)
    _require_patches(subject)
    probe = _Probe(subject, rule, params, on_progress)
    features = probe.features(train_images)
    pixels_G = sum(
        (torch.bincount(mask_WW[mask_WW >= 0].long(), minlength=rule.classes) for mask_WW in features.masks),
        torch.zeros(rule.classes, dtype=torch.int64),
    )
    _require_classes(pixels_G, train_images)
    device = resolve_device(params.pretrain.device)
    build: dict[Head, Callable[[], PatchHead]] = {
        "linear": lambda: fit_linear_head(
            features, rule.classes, settings, device, lambda step, steps: on_progress(step, steps, "steps of the head")
        ),
        "knn": lambda: NeighbourHead(features, rule.classes, settings, device),
    }
    counts = probe.confusions(val_images, {name: build[name]() for name in dict.fromkeys(settings.heads)})
    truth_G = next(iter(counts.values())).sum(dim=1)
    _require_classes(truth_G, val_images)
    lacking = [names[number] for number in ((truth_G > 0) & (pixels_G == 0)).nonzero()[:, 0].tolist()]
    if lacking:
        warnings.warn(
            f"VAL has classes that no pixel of the {probe.used['train']} images of TRAIN has ({len(lacking)}): "
            f"{some(lacking, 10)}; their IoU is 0",
            RuntimeWarning,
            stacklevel=2,
        )
    heads = {
        name: HeadScores(**segmentation_scores(counts_GG), classes=class_scores(counts_GG, names))
        for name, counts_GG in counts.items()
    }
    sections = ("pretrain.seed", "segment.classes", "segment.ignore_index", "segment.reduce_zero_label")
    kept = keep_result(
        subject,
        keep,
        "segment-probe",
        f"{train} -> {val}",
        scores={f"{name}_{score}": getattr(found, score) for name, found in heads.items() for score in _SCORES},
        command=command_of(
            "segment-probe",
            [checkpoint, train, val],
            params,
            student_sections(checkpoint, "images", "embed.batch_size", *sections, "segment_probe"),
        ),
        **probe.used,
    )
    return SegmentProbeReport(subject=subject.name, **probe.used, bad=len(bad) + len(probe.bad), kept=kept, heads=heads)


_SCORES = ("miou", "aacc", "macc")


def _require_classes(pixels_G: Tensor, images: MaskedImages) -> None:
    if not pixels_G.any():
        raise DataError(f"not one pixel of {images.where} has a class; check its masks and segment.ignore_index")
