"""Fine-tuning: the whole student is trained to classify, by the recipe that MILAN and MAE report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from milan_pipe.config.command import record_of
from milan_pipe.config.params import Params
from milan_pipe.config.training import RESUMABLE
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.classifier import build_classifier
from milan_pipe.evaluation.classify import ClassifyPlan, ClassifyTask, find_images, head_seed
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import build_adamw, layer_scale
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import RunReport, run_task
from milan_pipe.training.step import resolve_precision


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

    config = params.finetune
    sections, data = ("augment", "finetune"), f"{train} -> {val}"
    record = record_of("finetune", [checkpoint, train, val, run], params, sections, data=data)

    def build(ranks: Ranks, folder: Path) -> ClassifyTask:
        settings = config.model_copy(update={"precision": resolve_precision(config.precision, ranks.device)})
        backbone = backbone_of(checkpoint, params.student, config.seed)
        bad: list[tuple[str, str]] = []
        images = find_images(train, val, bad)
        sizes, model = build_classifier(
            backbone,
            classes=images.classes,
            image_size=config.image_size,
            drop_path=config.drop_path,
            seed=head_seed(config.seed),
        )
        model.to(ranks.device).set_grad_checkpointing(config.checkpoint_activations)
        depth = len(model.blocks)
        peak = config.lr * config.batch_size / 256
        optimiser = partial(
            build_adamw,
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
            images=images,
            model=model,
            optimiser=optimiser,
            augment=params.augment,
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
                "finetune": settings.model_dump(mode="json", exclude=RESUMABLE),
                "augment": params.augment.model_dump(mode="json"),
                "student": {**sizes.model_dump(mode="json"), "weights": backbone.digest()},
            },
            record={
                "student": sizes.model_dump(mode="json"),
                "classes": images.names or images.classes,
                "crop": config.crop,
                "backbone": backbone.name,
                **record,
            },
            ema=config.ema,
            bad=bad,
        )

    return run_task(run, config.device, build, on_progress)
