"""The student with a classifier on top: a timm ViT under timm's own names."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from milan_pipe.config.evaluation import FinetuneSettings, Pool
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import DataError, StoreError, one_line, resource_hint
from milan_pipe.evaluation.backbone import Backbone, pooled, resized
from milan_pipe.evaluation.features import require_directions
from milan_pipe.pretrained.source import UNBUILT
from milan_pipe.student.encoder import Encoder, timm_options
from milan_pipe.training.checkpoint import Checkpoint
from milan_pipe.weights_file import load_weights


def build_vit(settings: StudentSettings, classes: int, **options: Any) -> Encoder:
    """timm's ViT of these sizes, a classifier or, of 0 classes, a student; `options` are those of `timm.create_model`.

    Raises:
        SettingError: see `timm_options`.
    """
    given = timm_options(settings, classifies=classes > 0)
    model: Any = timm.create_model(settings.model, pretrained=False, num_classes=classes, **given, **options)
    vit: Encoder = model
    return vit


def build_classifier(
    backbone: Backbone, settings: FinetuneSettings, classes: int, seed: int
) -> tuple[StudentSettings, Encoder]:
    """Sizes, and a ViT that classifies the norm of the mean of its patches, with the backbone's weights.

    Args:
        settings: side of the input and drop path.
        seed: of the classifier's weights.

    Raises:
        SettingError: the patch does not divide `image_size`.

    Source: arXiv 2111.06377, appendix A.1, and its published code for the head: a norm of its own after the mean, in
    place of the encoder's. Classifier weights have deviation 0.02, as MILAN's published code.
    """
    student, weights = resized(backbone, settings.image_size)
    model = build_vit(student, classes, drop_path_rate=settings.drop_path)
    missing, unexpected = model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if not name.startswith("norm.")}, strict=False
    )
    assert not unexpected, unexpected
    assert all(name.startswith(("fc_norm.", "head.")) for name in missing), missing
    _init_head(model.head, 0.02, seed)
    return student, model


@torch.no_grad()
def _init_head(head: nn.Module, deviation: float, seed: int) -> None:
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=deviation, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)


class LinearClassifier(nn.Module):
    """A frozen encoder, BatchNorm without affine part, and a linear map, which alone is trained.

    Source: arXiv 2111.06377, appendix A.1.
    """

    def __init__(self, backbone: Backbone, pool: Pool, classes: int, seed: int) -> None:
        super().__init__()
        encoder: Any = backbone.encoder().requires_grad_(False)
        self.encoder, self.layout, self.pool = encoder, backbone.layout, pool
        self.norm = nn.BatchNorm1d(self.layout.width, affine=False, eps=1e-6)
        self.head = nn.Linear(self.layout.width, classes)
        _init_head(self.head, 0.01, seed)

    def train(self, mode: bool = True) -> LinearClassifier:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, classes) logits."""
        with torch.no_grad():
            tokens_BSD = self.layout.tokens(self.encoder.forward_features(pixels_BCHW))
            features_BD = pooled(tokens_BSD, self.pool, self.layout).float()
        if not self.training:
            require_directions(features_BD)
        logits_BG: Tensor = self.head(self.norm(features_BD))
        return logits_BG


def classifier_of(checkpoint: Checkpoint) -> tuple[StudentSettings, Encoder]:
    """Sizes and model of a checkpoint that `milan-pipe finetune` wrote: the mean of its weights, where it has one.

    Raises:
        DataError, MismatchError: its record or its tensors are not those of a classifier.
        StoreError: the machine has too little memory for it.
    """
    record = checkpoint.record
    try:
        settings: StudentSettings = StudentSettings.parse(record["student"], f"{checkpoint.path}, student")
        classes = record["classes"]
        count = classes if isinstance(classes, int) else len(classes)
    except (KeyError, TypeError) as error:
        raise DataError(f"{checkpoint.path} does not say which classifier it holds") from error
    try:
        model = build_vit(settings, count)
    except UNBUILT as error:
        if hint := resource_hint(error):
            raise StoreError(f"{checkpoint.path}: its classifier cannot be built: {hint}") from error
        raise DataError(f"{checkpoint.path}: no classifier of its sizes can be built ({one_line(error)})") from error
    part = "ema" if (checkpoint.path / "ema.safetensors").is_file() else "model"
    load_weights(model, checkpoint.weights(part), str(checkpoint.path))
    return settings, model
