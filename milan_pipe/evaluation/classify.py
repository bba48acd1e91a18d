"""Training of a classifier: what fine-tuning and the linear probe by protocol have in common."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.evaluation import AugmentSettings, FinetuneSettings, LarsProbeSettings
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import DataError
from milan_pipe.evaluation.augment import Erasing, TestImages, TrainingImages, build_mixup, seeded
from milan_pipe.evaluation.batches import share_of_classes
from milan_pipe.evaluation.supervised import ImageBatch, ReadBatch, Start, SupervisedTask, collate
from milan_pipe.images.labelled import labelled_images, require_same_classes
from milan_pipe.student.pixels import normalise
from milan_pipe.training.optim import cosine_lr

C = TypeVar("C", bound=FinetuneSettings | LarsProbeSettings)


class ClassifierObjective(nn.Module):
    """Cross-entropy of a batch's classifications, with class indices or shares of classes."""

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, batch: ImageBatch, epoch: int) -> Tensor:
        """Scalar mean over the batch."""
        del epoch
        logits_BG = self.model(batch.images_BCHW)
        # Shares of classes are smoothed where they are mixed.
        smoothing = self.smoothing if batch.target.ndim == 1 else 0.0
        return F.cross_entropy(logits_BG.float(), batch.target, label_smoothing=smoothing)


class ClassifyTask(SupervisedTask[C]):
    """Training of a classifier, and its top-1 and top-5 accuracy. `optimiser` is that of the recipe."""

    main_score = "top1"

    def __init__(
        self, start: Start[C], augment: AugmentSettings, train_fraction: float = 1.0, final_lr: float = 0.0
    ) -> None:
        """See `SupervisedTask`.

        Args:
            final_lr: at the end of the cosine, before any layer's scale.
        """
        settings = start.settings
        mean, std = start.backbone.normalization
        self._normalise = partial(normalise, mean=mean, std=std)
        train, val = labelled_images(start.train, start.bad.add), labelled_images(start.val, start.bad.add)
        classes = require_same_classes(train, val)
        if len(set(train.label_N)) < 2:
            raise DataError(f"all images of {train.where} are of one class; a classifier needs two at least")
        sizes, model = self.classifier(start, classes)
        number_N = share_of_classes(train.label_N, train_fraction, settings.seed)
        self._mixup = build_mixup(augment, classes, settings.batch_size, start.ranks.count)
        self.mirrored = self._mixup is not None
        # Which images are mixed, and in what steps noise is kept, has changed once.
        version = {"augmentation": 2} if self.mirrored or augment.erasing else {}
        self.set_up(start, train, val, number_N, train.classes or val.classes or classes, sizes, model, **version)
        self.steps = settings.epochs * self.steps_per_epoch
        self._peak_lr, self._final_lr = settings.lr * settings.batch_size / 256, final_lr
        self.objective = ClassifierObjective(model, augment.smoothing)
        self.take = TrainingImages(train, augment, sizes.image_size, settings.seed, start.params.images)
        self._erasing = augment.erasing > 0
        # As published, where the settings leave it open.
        self.crop = settings.crop or (0.875 if sizes.image_size <= 224 else 1.0)
        self._show = TestImages(val, sizes.image_size, self.crop, start.params.images)
        self._judged = model

    @abstractmethod
    def classifier(self, start: Start[C], classes: int) -> tuple[StudentSettings, nn.Module]:
        """Sizes of the student, and what is trained: (B, 3, H, W) normalised floats to (B, classes) logits."""

    def lr(self, step: int) -> float:
        """Cosine per step after a linear warm-up."""
        warmup = round(self.settings.warmup_epochs * self.steps_per_epoch)
        return cosine_lr(step, steps=self.steps, warmup_steps=warmup, peak=self._peak_lr, final=self._final_lr)

    def prepared(self, batch: ReadBatch) -> ImageBatch:
        """Normalised, erased, and mixed by mixup and cutmix, where they are on."""
        pixels_BHWC, label_B, box_B4 = batch.values
        images_BCHW = self._normalise(pixels_BHWC)
        if self._erasing:
            images_BCHW = Erasing.restored(pixels_BHWC, images_BCHW, box_B4)
        if self._mixup is None:
            return ImageBatch(images_BCHW, label_B)
        with seeded(self.settings.seed, "mix", batch.step):
            return ImageBatch(*self._mixup(images_BCHW, label_B))

    def due(self, step: int) -> bool:
        """At the end of every few epochs."""
        return step % (self.settings.eval_every * self.steps_per_epoch) == 0

    @torch.inference_mode()
    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Shares of VAL's images whose class is the first, or among the first five."""
        del last
        ranks = self._ranks
        # Sums, not means: batches and ranks have different numbers of images.
        sums = torch.zeros(4, dtype=torch.float64)
        for shown in self._shown(self._show, collate, max(1, self.batch_size // ranks.count)):
            pixels_BHWC, label_B = (torch.as_tensor(value).to(ranks.device, non_blocking=True) for value in shown.value)
            with self._autocast():
                logits_BG = self._judged(self._normalise(pixels_BHWC)).float()
            hit_B5 = logits_BG.topk(min(5, logits_BG.shape[1]), dim=1).indices == label_B[:, None]
            loss = F.cross_entropy(logits_BG, label_B, reduction="sum")
            sums += torch.tensor([hit_B5[:, 0].sum(), hit_B5.sum(), loss, len(label_B)], dtype=torch.float64)
        sums = ranks.all_reduce_sum(sums)
        if not sums[3]:
            raise DataError(f"none of the images of {self._val.where} can be read")
        top1, top5, loss = (sums[:3] / sums[3]).tolist()
        return {"top1": top1, "top5": top5, "loss": loss}
