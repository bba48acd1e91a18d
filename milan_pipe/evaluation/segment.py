"""Segmentation: UperNet on the student, by the recipe that MILAN reports for ADE20K."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from milan_pipe.config.evaluation import SegmentSettings
from milan_pipe.drawing.sheet import Segmentation, draw_sheet, segmentation_sheet
from milan_pipe.errors import DataError, SettingError, printable_json
from milan_pipe.evaluation.batches import share_of_classes
from milan_pipe.evaluation.masks import pixel_losses, rule_and_names
from milan_pipe.evaluation.miou import class_scores, confusion, segmentation_scores
from milan_pipe.evaluation.segment_views import TestMasks, TrainingMasks
from milan_pipe.evaluation.sliding import predict, scaled_size, usual_stride
from milan_pipe.evaluation.supervised import ImageBatch, Start, SupervisedTask
from milan_pipe.evaluation.upernet import build_upernet
from milan_pipe.images.masked import masked_images
from milan_pipe.storage.local import write_file
from milan_pipe.training.optim import build_adamw, polynomial_lr

PER_CLASS_FILE = "per_class.json"
_IMAGES = 6

_Shown = tuple[str, Image.Image, NDArray[np.int64]]
"""Key, image and mask."""


class SegmentObjective(nn.Module):
    """Cross-entropy of the pixels that have a class, plus that of the auxiliary head by its weight.

    Args:
        over_all: divide by the number of all pixels, and not of those that have a class.
    """

    def __init__(self, model: nn.Module, auxiliary: float, over_all: bool) -> None:
        super().__init__()
        self.model = model
        self.auxiliary, self.over_all = auxiliary, over_all

    def forward(self, batch: ImageBatch, epoch: int) -> Tensor:
        """Scalar mean over pixels; 0 where none has a class."""
        del epoch
        logits, auxiliary = self.model(batch.images_BCHW)
        assert auxiliary is not None
        mask_BHW = batch.target.long()
        labelled = (mask_BHW >= 0).sum().clamp(min=1)
        pixels = mask_BHW.numel() if self.over_all else labelled
        return (pixel_losses(logits, mask_BHW) + self.auxiliary * pixel_losses(auxiliary, mask_BHW)) / pixels


class SegmentTask(SupervisedTask[SegmentSettings]):
    """Training of UperNet, and its scores by sliding windows; also writes RUN/images and RUN/per_class.json."""

    name, sections = "segment", ("segment",)
    main_score = "miou"
    least_part, least_reason = 2, "; the batch norms of UperNet need two images at a time"

    def __init__(self, start: Start[SegmentSettings]) -> None:
        settings = start.settings
        train = masked_images(start.train, "train", start.bad.add)
        val = masked_images(start.val, "val", start.bad.add)
        rule, self._names = rule_and_names(train, val, settings)
        sizes, model = build_upernet(start.backbone, settings, len(self._names), start.head_seed)
        model.encoder.set_grad_checkpointing(settings.checkpoint_activations)
        if start.ranks.count > 1 and start.ranks.device.type == "cuda":
            # A rank has two images at a time in the recipe, too few for statistics of its own. There is none for a CPU.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        side = sizes.image_size
        if not 0 < settings.ratio[0] <= settings.ratio[1]:
            raise SettingError(f"segment.ratio is the least and the greatest resizing, above 0, found {settings.ratio}")
        number_N = share_of_classes(np.zeros(len(train), dtype=np.int64), settings.train_fraction, settings.seed)
        self.set_up(start, train, val, number_N, self._names, sizes, model, rule=asdict(rule))
        self.steps = settings.steps
        self.objective = SegmentObjective(model, settings.auxiliary, settings.over_all_pixels)
        self._side, self._short = side, settings.short_side or side
        self._stride = settings.stride or usual_stride(side)
        self.take = TrainingMasks(
            masks=TestMasks(train, rule, start.params.images),
            side=side,
            short=self._short,
            ratio=settings.ratio,
            seed=settings.seed,
        )
        self._show = TestMasks(val, rule, start.params.images)
        self._drawn: list[Segmentation] = []

    def optimiser(self) -> torch.optim.Optimizer:
        """AdamW with a rate that falls from each block to the one below."""
        settings, lr = self.settings, self.settings.lr
        return build_adamw(
            self.model,
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )

    def lr(self, step: int) -> float:
        """Polynomial per step after a linear warm-up."""
        settings = self.settings
        return polynomial_lr(
            step, steps=self.steps, warmup_steps=settings.warmup_steps, peak=settings.lr, power=settings.power
        )

    def due(self, step: int) -> bool:
        """Every few steps."""
        return step % self.settings.eval_every == 0

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """mIoU, aAcc and mAcc by windows at one scale; at the end also over scales and mirrors, as `ms_...`."""
        counts_GG = self._confusion((1.0,), flip=False)
        scores, table = segmentation_scores(counts_GG), class_scores(counts_GG, self._names)
        if last and self.settings.scales:
            multi_GG = self._confusion(self.settings.scales, flip=True)
            scores |= {f"ms_{name}": value for name, value in segmentation_scores(multi_GG).items()}
            for row, score in zip(table, class_scores(multi_GG, self._names), strict=True):
                row |= {"ms_iou": score["iou"], "ms_acc": score["acc"]}
        if self._ranks.first:
            write_file(self._run / PER_CLASS_FILE, printable_json(table, indent=1) + "\n")
        return scores

    @torch.inference_mode()
    def _confusion(self, scales: Sequence[float], *, flip: bool) -> Tensor:
        ranks, classes = self._ranks, len(self._names)
        counts_GG = torch.zeros((classes, classes), dtype=torch.int64)
        self._drawn.clear()
        batch = max(1, self.batch_size // ranks.count)
        for some in self._together(batch * self._side**2, max(scales)):
            predictions = predict(
                self._classify,
                [image for _, image, _ in some],
                window=self._side,
                stride=self._stride,
                short=self._short,
                scales=scales,
                flip=flip,
                device=ranks.device,
                batch=batch,
            )
            for (key, image, mask_HW), predicted_HW in zip(some, predictions, strict=True):
                counts_GG += confusion(predicted_HW, torch.from_numpy(mask_HW), classes)
                if ranks.first and len(self._drawn) < _IMAGES:
                    self._drawn.append(Segmentation(key, np.asarray(image), mask_HW, predicted_HW.numpy()))
        counts_GG = ranks.all_reduce_sum(counts_GG).long()
        if not counts_GG.sum():
            raise DataError(f"not one pixel of {self._val.where} has a class; check its masks and segment.ignore_index")
        return counts_GG

    def _together(self, most: int, scale: float) -> Iterator[list[_Shown]]:
        """This rank's images of VAL with their masks, as many at a time as have `most` pixels at `scale`."""
        found: list[_Shown] = []
        pixels, short = 0, self._short * scale
        for shown in self._shown(self._show, list, 1):
            ((image, mask_HW),) = shown.value
            found.append((shown.keys[0], image, mask_HW))
            # Of large images the logits of the one size are held, of small ones those of the other.
            pixels += max(mask_HW.size, math.prod(scaled_size(mask_HW.shape, short, 4 * short)))
            if pixels >= most:
                yield found
                found, pixels = [], 0
        if found:
            yield found

    def _classify(self, windows_BCHW: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self.model(windows_BCHW)[0]
        return logits

    def plot(self, run: Path, step: int) -> Path | None:
        """The first images of VAL, their masks and what was predicted, as RUN/images/step-NNNNNNNN.png."""
        if not self._drawn:
            return None
        file = run / "images" / f"step-{step:08d}.png"
        sheet = segmentation_sheet(f"step {step}", self._drawn, len(self._names))
        write_file(file, draw_sheet(sheet))
        return file
