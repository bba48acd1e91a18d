"""Fine-tuning: the whole student is trained to classify, by the recipe that MILAN and MAE report."""

from __future__ import annotations

import torch
from timm.utils.model_ema import ModelEmaV3

from milan_pipe.config.evaluation import FinetuneSettings
from milan_pipe.config.student import StudentSettings
from milan_pipe.evaluation.classifier import build_classifier
from milan_pipe.evaluation.classify import ClassifyTask
from milan_pipe.evaluation.supervised import Start
from milan_pipe.student.encoder import Encoder
from milan_pipe.training.optim import build_adamw


class FinetuneTask(ClassifyTask[FinetuneSettings]):
    """Trains student and classifier; with `ema`, the mean of the weights is judged."""

    name, sections = "finetune", ("augment", "finetune")

    def __init__(self, start: Start[FinetuneSettings]) -> None:
        settings = start.settings
        super().__init__(start, start.params.augment, settings.train_fraction, settings.min_lr)
        self.record = {**self.record, "crop": self.crop}
        self._ema = ModelEmaV3(self.model, decay=settings.ema) if settings.ema is not None else None
        if self._ema is not None:
            self._judged = self._ema.module
            self.modules = {"model": self.model, "ema": self._ema.module}

    def classifier(self, start: Start[FinetuneSettings], classes: int) -> tuple[StudentSettings, Encoder]:
        """The student, its patches' mean and a linear map."""
        sizes, model = build_classifier(start.backbone, start.settings, classes, start.head_seed)
        model.set_grad_checkpointing(start.settings.checkpoint_activations)
        return sizes, model

    def optimiser(self) -> torch.optim.Optimizer:
        """AdamW with a rate that falls from each layer to the one below."""
        settings, lr = self.settings, self._peak_lr
        return build_adamw(
            self.model,
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )

    def after_step(self, step: int) -> None:
        """Move the mean of the weights."""
        if self._ema is not None:
            self._ema.update(self.model, step)
