"""The linear probe by protocol: frozen student, BatchNorm without affine part, a linear map trained with LARS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from timm.optim.lars import Lars

from milan_pipe.config.evaluation import PLAIN, LarsProbeSettings
from milan_pipe.config.params import Params
from milan_pipe.evaluation.classifier import LinearClassifier
from milan_pipe.evaluation.classify import ClassifyTask, find_images
from milan_pipe.evaluation.supervised import Start, run_supervised
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.task import RunReport


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

    def task_of(start: Start[LarsProbeSettings]) -> ClassifyTask[LarsProbeSettings]:
        settings = start.settings
        images = find_images(train, val, start.bad)
        model = LinearClassifier(start.backbone.encoder(), settings.pool, images.classes, start.head_seed)
        groups = [
            {"params": [model.head.weight], "always_adapt": True},
            {"params": [model.head.bias], "always_adapt": False},
        ]
        return ClassifyTask(
            start,
            images,
            sizes=start.backbone.config,
            model=model,
            optimiser=lambda lr: Lars(groups, lr=lr, momentum=settings.momentum, weight_decay=0.0, trust_coeff=0.001),
            augment=PLAIN.model_copy(update={"scale": settings.scale}),
        )

    places = checkpoint, train, val, run
    return run_supervised("linear-probe", ("lars_probe",), params.lars_probe, places, params, task_of, on_progress)
