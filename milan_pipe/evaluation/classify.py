"""A classifier is trained on labelled images: what fine-tuning and the linear probe by protocol have in common.

Shape suffixes are explained in `milan_pipe.evaluation`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from milan_pipe.config.evaluation import AugmentSettings
from milan_pipe.config.training import SupervisedSettings
from milan_pipe.errors import DataError, SettingError
from milan_pipe.evaluation.augment import TestImages, TrainingImages, build_mixup, require_labels
from milan_pipe.evaluation.batches import BadImages, StepPlan, bad_file, in_turn, load_batches, share_of_classes
from milan_pipe.evaluation.randomness import seeded
from milan_pipe.images.labelled import LabelledImages, labelled_images, require_same_classes
from milan_pipe.random_bits import seed_of
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import cosine_lr
from milan_pipe.training.runner import Task
from milan_pipe.training.step import StepReport


@dataclass(frozen=True)
class ImageBatch:
    """B training images: normalised floats, and class indices or, once mixed, shares of classes (B, G)."""

    pixels_BCHW: Tensor
    target: Tensor
    keys: tuple[str, ...]
    step: int

    def slice(self, part: slice) -> ImageBatch:
        """Some of them."""
        return ImageBatch(self.pixels_BCHW[part], self.target[part], self.keys[part], self.step)


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a classifier learns from and is judged on."""

    train: LabelledImages
    val: LabelledImages
    classes: int

    @property
    def names(self) -> list[str] | None:
        """Of the classes, where they are known."""
        names = self.train.classes or self.val.classes
        return None if names is None else list(names)


def find_images(train: str | Path, val: str | Path, bad: list[tuple[str, str]]) -> Images:
    """Find both sets and see that they have the same classes; see `labelled_images` and `require_same_classes`."""

    def on_bad(key: str, reason: str) -> None:
        bad.append((key, reason))

    first, second = labelled_images(train, on_bad), labelled_images(val, on_bad)
    classes = require_same_classes(first, second)
    require_labels(first)
    return Images(train=first, val=second, classes=classes)


class ClassifierObjective(nn.Module):
    """Cross-entropy of a batch's classifications, with class indices or shares of classes."""

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, batch: ImageBatch, epoch: int) -> Tensor:
        """Scalar mean over the batch."""
        del epoch
        logits_BG = self.model(batch.pixels_BCHW)
        # Shares of classes are smoothed where they are mixed.
        smoothing = self.smoothing if batch.target.ndim == 1 else 0.0
        return F.cross_entropy(logits_BG.float(), batch.target, label_smoothing=smoothing)


@dataclass(frozen=True, kw_only=True)
class ClassifyPlan:
    """Length and rate of a classifier's training; `final_lr` before any layer's scale."""

    epochs: int
    warmup_epochs: float
    batch_size: int
    peak_lr: float
    final_lr: float
    eval_every: int
    image_size: int
    crop: float
    train_fraction: float


class ClassifyTask(Task[ImageBatch]):
    """Training of a classifier, and its top-1 and top-5 accuracy."""

    main_score = "top1"
    settings: SupervisedSettings

    def __init__(
        self,
        name: str,
        *,
        run: Path,
        ranks: Ranks,
        images: Images,
        model: nn.Module,
        optimiser: Callable[[], torch.optim.Optimizer],
        augment: AugmentSettings,
        plan: ClassifyPlan,
        settings: SupervisedSettings,
        configuration: dict[str, Any],
        record: dict[str, Any],
        ema: float | None = None,
        bad: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.section = section = "lars_probe" if name == "linear-probe" else name
        self.settings = settings
        self.model = model
        self.objective = ClassifierObjective(model, augment.smoothing)
        self._optimiser = optimiser
        self.advice = advice_of(section)
        self.record = record
        self.batch_size = plan.batch_size
        self._plan = plan
        self._ranks = ranks
        self._images = images
        number_N = share_of_classes(images.train.label_N, plan.train_fraction, settings.seed)
        if len(number_N) < plan.batch_size:
            raise SettingError(
                f"{section}.batch_size is {plan.batch_size}, there are {len(number_N)} images to train on in "
                f"{images.train.where}; set a smaller batch_size"
            )
        if plan.batch_size // ranks.count < settings.accumulate:
            raise SettingError(
                f"{section}.batch_size is {plan.batch_size}: {ranks.count} ranks with accumulate={settings.accumulate} "
                f"need at least {ranks.count * settings.accumulate}"
            )
        self._steps = StepPlan(
            number_N=number_N, batch_size=plan.batch_size, seed=settings.seed, rank=ranks.rank, ranks=ranks.count
        )
        self.steps_per_epoch = self._steps.steps_per_epoch
        self.steps = plan.epochs * self.steps_per_epoch
        if settings.compile:
            model.compile()
        share = self._steps.share
        self._mixup: Mixup | None = build_mixup(augment, images.classes, share.stop - share.start)
        self._take = TrainingImages(images.train, augment, plan.image_size, settings.seed)
        self._show = TestImages(images.val, plan.image_size, plan.crop)
        self._ema = ModelEmaV3(model, decay=ema) if ema is not None else None
        self.modules = {"model": model} | ({"ema": self._ema.module} if self._ema is not None else {})
        self._ema_decay = ema
        listed = len(images.train) + len(images.val) + len(bad)
        self._bad = BadImages(listed, settings.max_bad_fraction, bad_file(run) if ranks.first else _ignore)
        for key, reason in bad:
            self._bad.add(key, reason)
        self.configuration = {
            **configuration,
            "data": {
                "train": images.train.fingerprint,
                "val": images.val.fingerprint,
                "classes": images.names or images.classes,
            },
        }

    def optimiser(self) -> torch.optim.Optimizer:
        """That of the recipe."""
        return self._optimiser()

    def before_step(self, step: int) -> None:
        """Drop path draws from the device's global generator."""
        torch.manual_seed(seed_of(self.settings.seed, step, self._ranks.rank))

    def lr(self, step: int) -> float:
        """Cosine per step after a linear warm-up."""
        plan = self._plan
        warmup = round(plan.warmup_epochs * self.steps_per_epoch)
        return cosine_lr(step, steps=self.steps, warmup_steps=warmup, peak=plan.peak_lr, final=plan.final_lr)

    def batches(self, first_step: int) -> Iterator[ImageBatch]:
        """This rank's images, augmented."""
        fed = load_batches(
            self._take,
            default_collate,
            self._images.train.keys,
            self._steps.batches(first_step, self.steps),
            workers=self.settings.workers,
            bad=self._bad,
        )
        for step, batch in enumerate(fed, first_step):
            pixels_BCHW, label_B = batch.value
            yield ImageBatch(pixels_BCHW, label_B, batch.keys, step)

    def parts(self, batch: ImageBatch) -> Sequence[tuple[ImageBatch, float]]:
        """Mixed on the device, and cut for accumulation."""
        device = self._ranks.device
        pixels_BCHW, target = batch.pixels_BCHW.to(device), batch.target.to(device)
        if self._mixup is not None:
            with seeded(self.settings.seed, "mix", batch.step, self._ranks.rank):
                pixels_BCHW, target = self._mixup(pixels_BCHW, target)
        mixed = ImageBatch(pixels_BCHW, target, batch.keys, batch.step)
        count, size = self.settings.accumulate, len(batch.keys)
        edges = [number * size // count for number in range(count + 1)]
        return [(mixed.slice(slice(start, stop)), (stop - start) / size) for start, stop in itertools.pairwise(edges)]

    def due(self, step: int) -> bool:
        """At the end of every few epochs."""
        return step % (self._plan.eval_every * self.steps_per_epoch) == 0

    def after_step(self, report: StepReport) -> None:
        """Move the mean of the weights."""
        if self._ema is not None:
            self._ema.update(self.model, report.step)

    @torch.inference_mode()
    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Shares of VAL's images whose class is the first, or among the first five; of the mean weights, if any."""
        del last
        ranks = self._ranks
        model = self.model if self._ema is None else self._ema.module
        batch = max(1, self.batch_size // ranks.count)
        asked = in_turn(len(self._images.val), batch, ranks.rank, ranks.count)
        sums = torch.zeros(4, dtype=torch.float64)
        for shown in load_batches(
            self._show,
            default_collate,
            self._images.val.keys,
            asked,
            workers=self.settings.workers,
            bad=self._bad,
        ):
            pixels_BCHW, label_B = (tensor.to(ranks.device) for tensor in shown.value)
            with torch.autocast(
                ranks.device.type,
                dtype=torch.bfloat16 if self.settings.precision == "auto" else getattr(torch, self.settings.precision),
                enabled=self.settings.precision not in ("auto", "float32"),
            ):
                logits_BG = model(pixels_BCHW).float()
            first_B5 = logits_BG.topk(min(5, logits_BG.shape[1]), dim=1).indices
            hit_B5 = first_B5 == label_B[:, None]
            loss = F.cross_entropy(logits_BG, label_B, reduction="sum")
            sums += torch.tensor([hit_B5[:, 0].sum(), hit_B5.sum(), loss, len(label_B)], dtype=torch.float64)
        sums = ranks.all_reduce_mean(sums) * ranks.count
        if not sums[3]:
            raise DataError(f"none of the images of {self._images.val.where} can be read")
        top1, top5, loss = (sums[:3] / sums[3]).tolist()
        return {"top1": top1, "top5": top5, "loss": loss}

    def bad(self) -> int:
        """Images that could not be read, on this rank."""
        return len(self._bad.keys)


def _ignore(*_: object) -> None:
    """For ranks that do not write."""


def advice_of(section: str) -> str:
    """What to do about a loss that is not finite."""
    return f"lower {section}.lr, or look at the images"


def head_seed(seed: int) -> int:
    """Seed of a fresh head's weights, apart from all others."""
    return seed_of(seed, "head") % 2**63
