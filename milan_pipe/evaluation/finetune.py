"""Fine-tuning: the whole student is trained to classify, by the recipe that MILAN and MAE report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from milan_pipe.config.evaluation import FinetuneSettings
from milan_pipe.config.params import Params
from milan_pipe.evaluation.classifier import build_classifier
from milan_pipe.evaluation.classify import ClassifyTask, find_images
from milan_pipe.evaluation.supervised import Start, run_supervised
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.task import RunReport


def finetune(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params,
    *,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train student and classifier; writes RUN/checkpoints, RUN/best and RUN/metrics.

    A run that was interrupted goes on; on a CPU its curve and weights are then those of an unbroken run, to the bit,
    whatever the number of workers. Under torchrun all ranks call it: the order of images and their augmentation do
    not depend on their number, while mixup pairs images of a rank.

    Args:
        checkpoint: as `backbone_of` takes it.
        train, val: as `labelled_images` takes them.
        params: `student` has the sizes of a student with fresh weights.

    Raises:
        MissingError, DataError, MismatchError, SettingError, StoreError: as `backbone_of`, `labelled_images`,
            `require_same_classes` and `run_task`.
    """

    def task_of(start: Start[FinetuneSettings]) -> ClassifyTask[FinetuneSettings]:
        settings = start.settings
        images = find_images(train, val, start.bad)
        sizes, model = build_classifier(
            start.backbone,
            classes=images.classes,
            image_size=settings.image_size,
            drop_path=settings.drop_path,
            seed=start.head_seed,
        )
        model.set_grad_checkpointing(settings.checkpoint_activations)
        return ClassifyTask(
            start,
            images,
            sizes=sizes,
            model=model,
            optimiser=lambda lr: build_adamw(
                model,
                lr=lr,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                layer_decay=settings.layer_decay,
            ),
            augment=params.augment,
            final_lr=settings.min_lr,
            train_fraction=settings.train_fraction,
            ema=settings.ema,
            record={"crop": settings.crop},
        )

    places = checkpoint, train, val, run
    return run_supervised("finetune", ("augment", "finetune"), params.finetune, places, params, task_of, on_progress)
