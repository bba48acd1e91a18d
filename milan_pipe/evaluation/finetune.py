"""Fine-tuning: the whole student is trained to classify, by the recipe that MILAN and MAE report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from milan_pipe.evaluation.augment import AugmentConfig
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.classifier import build_classifier
from milan_pipe.evaluation.classify import ClassifyPlan, ClassifyTask, find_pictures, head_seed
from milan_pipe.evaluation.supervised import SupervisedReport, run_supervised
from milan_pipe.student.encoder import StudentConfig
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import build_adamw, layer_scale
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.settings import FREE, RunSettings
from milan_pipe.training.step import resolve_precision

Beta = Annotated[float, Field(ge=0, lt=1)]


class FinetuneConfig(RunSettings):
    """The recipe of fine-tuning; defaults are those of the scenes."""

    epochs: int = Field(1, ge=1)
    warmup_epochs: float = Field(0.2, ge=0)
    batch_size: int = Field(64, ge=1, description="over all ranks")
    lr: float = Field(4e-3, gt=0, description="for a batch of 256; the rate used is lr x batch_size / 256")
    min_lr: float = Field(1e-6, ge=0, description="at the end of the cosine")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1, description="of the learning rate, from each layer to the one below")
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block; it rises linearly from 0")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a mean of the weights, which is then evaluated")
    image_size: int | None = Field(None, ge=1, description="side of the input; none: the student's")
    crop: float = Field(1.0, gt=0, le=1, description="at test time: side of the centre square over the shorter side")
    train_fraction: float = Field(1.0, gt=0, le=1, description="share of the labels that is used, of each class")
    eval_every: int = Field(1, ge=1, description="epochs between two evaluations")


def finetune(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    *,
    student: StudentConfig,
    augment: AugmentConfig,
    config: FinetuneConfig,
    record: Mapping[str, Any] | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> SupervisedReport:
    """Train student and classifier; writes RUN/checkpoints, RUN/best and RUN/metrics.

    A run that was interrupted goes on; on a CPU its curve and weights are then those of an unbroken run, to the bit,
    whatever the number of workers. Under torchrun all ranks call it: the order of pictures and their augmentation do
    not depend on their number, while mixup pairs pictures of a rank.

    Args:
        checkpoint: as `backbone_of` takes it.
        train, val: as `labelled_pictures` takes them.
        student: sizes of a student with fresh weights.

    Raises:
        MissingError, DataError, MismatchError, SettingError, StoreError: as `backbone_of`, `labelled_pictures`,
            `require_same_classes` and `run_supervised`.
    """

    def build(ranks: Ranks, folder: Path) -> ClassifyTask:
        settings = config.model_copy(update={"precision": resolve_precision(config.precision, ranks.device)})
        backbone = backbone_of(checkpoint, student, config.seed)
        bad: list[tuple[str, str]] = []
        pictures = find_pictures(train, val, bad)
        sizes, model = build_classifier(
            backbone,
            classes=pictures.classes,
            image_size=config.image_size,
            drop_path=config.drop_path,
            seed=head_seed(config.seed),
        )
        model.to(ranks.device).set_grad_checkpointing(config.checkpoint_activations)
        depth = len(model.blocks)
        peak = config.lr * config.batch_size / 256
        optimiser = build_adamw(
            model,
            lr=peak,
            betas=config.betas,
            weight_decay=config.weight_decay,
            scale_of=lambda name: layer_scale(name, depth, config.layer_decay),
        )
        return ClassifyTask(
            "finetune",
            run=folder,
            ranks=ranks,
            pictures=pictures,
            model=model,
            optimiser=optimiser,
            augment=augment,
            plan=ClassifyPlan(
                epochs=config.epochs,
                warmup_epochs=config.warmup_epochs,
                batch_size=config.batch_size,
                peak_lr=peak,
                final_lr=config.min_lr,
                eval_every=config.eval_every,
                image_size=sizes.image_size,
                crop=config.crop,
                train_fraction=config.train_fraction,
            ),
            settings=settings,
            configuration={
                "finetune": settings.model_dump(mode="json", exclude=FREE),
                "augment": augment.model_dump(mode="json"),
                "student": {**sizes.model_dump(mode="json"), "weights": backbone.digest()},
            },
            record={
                "student": sizes.model_dump(mode="json"),
                "classes": pictures.names or pictures.classes,
                "crop": config.crop,
                "backbone": backbone.name,
                "settings": {},
                **(record or {}),
            },
            ema=config.ema,
            bad=bad,
        )

    return run_supervised(run, config.device, build, on_progress)
