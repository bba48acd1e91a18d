"""The linear probe by protocol: frozen student, BatchNorm without affine part, a linear map trained with LARS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timm.optim.lars import Lars

from milan_pipe.config.command import record_of
from milan_pipe.config.evaluation import PLAIN
from milan_pipe.config.params import Params
from milan_pipe.config.training import RESUMABLE
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.classifier import LinearClassifier
from milan_pipe.evaluation.classify import ClassifyPlan, ClassifyTask, find_images, head_seed
from milan_pipe.student.encoder import build_encoder
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import RunReport, run_task
from milan_pipe.training.step import resolve_precision
from milan_pipe.weights_file import load_weights


def lars_probe(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params,
    *,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train a linear classifier on the frozen student, images cropped and mirrored anew in every epoch.

    It goes on after an interruption as `finetune` does; arguments and errors are those.

    Source: arXiv 2111.06377, appendix A.1: LARS without weight decay, trust coefficient 0.001, the bias without it.
    """

    config = params.lars_probe
    record = record_of("linear-probe", [checkpoint, train, val, run], params, ("lars_probe",), data=f"{train} -> {val}")

    def build(ranks: Ranks, folder: Path) -> ClassifyTask:
        settings = config.model_copy(update={"precision": resolve_precision(config.precision, ranks.device)})
        backbone = backbone_of(checkpoint, params.student, config.seed)
        bad: list[tuple[str, str]] = []
        images = find_images(train, val, bad)
        encoder = build_encoder(backbone.config)
        load_weights(encoder, backbone.weights, backbone.name)
        model = LinearClassifier(encoder, config.pool, images.classes, head_seed(config.seed)).to(ranks.device)
        peak = config.lr * config.batch_size / 256
        optimiser = partial(
            Lars,
            [
                {"params": [model.head.weight], "always_adapt": True},
                {"params": [model.head.bias], "always_adapt": False},
            ],
            lr=peak,
            momentum=config.momentum,
            weight_decay=0.0,
            trust_coeff=0.001,
        )
        sizes: dict[str, Any] = backbone.config.model_dump(mode="json")
        return ClassifyTask(
            "linear-probe",
            run=folder,
            ranks=ranks,
            images=images,
            model=model,
            optimiser=optimiser,
            augment=PLAIN.model_copy(update={"scale": config.scale}),
            plan=ClassifyPlan(
                epochs=config.epochs,
                warmup_epochs=config.warmup_epochs,
                batch_size=config.batch_size,
                peak_lr=peak,
                final_lr=0.0,
                eval_every=config.eval_every,
                image_size=backbone.config.image_size,
                crop=config.crop,
                train_fraction=1.0,
            ),
            settings=settings,
            configuration={
                "lars_probe": settings.model_dump(mode="json", exclude=RESUMABLE),
                "student": {**sizes, "weights": backbone.digest()},
            },
            record={
                "student": sizes,
                "classes": images.names or images.classes,
                "backbone": backbone.name,
                **record,
            },
            bad=bad,
        )

    return run_task(run, config.device, build, on_progress)
