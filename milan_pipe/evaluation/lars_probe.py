"""The linear probe by protocol: frozen student, BatchNorm without affine part, a linear map trained with LARS."""

from __future__ import annotations

import torch
from timm.optim.lars import Lars

from milan_pipe.config.evaluation import PLAIN, LarsProbeSettings
from milan_pipe.config.student import StudentSettings
from milan_pipe.evaluation.classifier import LinearClassifier
from milan_pipe.evaluation.classify import ClassifyTask
from milan_pipe.evaluation.supervised import Start
from milan_pipe.evaluation.timm_backbone import frozen_backbone_of


class LarsProbeTask(ClassifyTask[LarsProbeSettings]):
    """Trains a linear classifier on the frozen student, images cropped and mirrored anew in every epoch.

    Source: arXiv 2111.06377, appendix A.1: LARS without weight decay, trust coefficient 0.001, the bias without it.
    """

    name, sections = "linear-probe", ("lars_probe",)
    backbone_of = staticmethod(frozen_backbone_of)
    model: LinearClassifier

    def __init__(self, start: Start[LarsProbeSettings]) -> None:
        super().__init__(start, PLAIN.model_copy(update={"scale": start.settings.scale}))

    def classifier(self, start: Start[LarsProbeSettings], classes: int) -> tuple[StudentSettings, LinearClassifier]:
        """The frozen encoder, a BatchNorm and a linear map."""
        start.backbone.layout.require(start.settings.pool, "lars_probe.pool", start.backbone.name)
        return start.backbone.settings, LinearClassifier(start.backbone, start.settings.pool, classes, start.head_seed)

    def optimiser(self) -> torch.optim.Optimizer:
        """LARS over the linear map."""
        head = self.model.head
        groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias], "always_adapt": False}]
        return Lars(groups, lr=self._peak_lr, momentum=self.settings.momentum, weight_decay=0.0, trust_coeff=0.001)
