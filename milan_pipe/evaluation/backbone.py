"""The pretrained student that an evaluation begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from milan_pipe.config.student import StudentSettings
from milan_pipe.config.subjects import RANDOM
from milan_pipe.errors import DataError
from milan_pipe.student.encoder import build_encoder, grid_of
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint
from milan_pipe.weights_file import load_weights


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A student's sizes and weights, by timm's names without classifier; `name` is a checkpoint's path or `random`."""

    name: str
    settings: StudentSettings
    weights: Mapping[str, Tensor]

    def encoder(self) -> VisionTransformer:
        """A new encoder with these weights."""
        encoder = build_encoder(self.settings)
        load_weights(encoder, self.weights, self.name)
        return encoder

    def digest(self) -> str:
        """sha256 over names and values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def student_of(checkpoint: Checkpoint) -> tuple[StudentSettings, VisionTransformer]:
    """Settings and encoder of a checkpoint.

    Raises:
        DataError, MismatchError: it is damaged, holds no student, or tensors of another one.
    """
    sizes, task = checkpoint.record.get("student"), checkpoint.record.get("task")
    if not isinstance(sizes, dict) or task is not None:
        found = f"holds what `milan-pipe {task}` trained" if task else "does not say which student it holds"
        raise DataError(f"{checkpoint.path} {found}; name one that `milan-pipe pretrain` wrote")
    settings: StudentSettings = StudentSettings.parse(sizes, f"{checkpoint.path}, student")
    saved = Backbone(name=str(checkpoint.path), settings=settings, weights=checkpoint.weights("student"))
    return settings, saved.encoder()


def backbone_of(checkpoint: str | Path, student: StudentSettings, seed: int) -> Backbone:
    """What a CHECKPOINT argument names: a checkpoint folder, a run folder (its last one), or `random`.

    Args:
        student: sizes of the student with fresh weights; a checkpoint has its own.

    Raises:
        MissingError, DataError, MismatchError: see `open_checkpoint` and `student_of`.
        SettingError: no such student can be built.
    """
    if str(checkpoint) == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Backbone(name=RANDOM, settings=student, weights=build_encoder(student).state_dict())
    opened = open_checkpoint(checkpoint)
    settings, encoder = student_of(opened)
    return Backbone(name=str(opened.path), settings=settings, weights=encoder.state_dict())


def resized(backbone: Backbone, side: int | None) -> tuple[StudentSettings, dict[str, Tensor]]:
    """Sizes and weights for an input of another side: positions are interpolated, bicubic, as timm does.

    Raises:
        SettingError: the patch does not divide `side`.
    """
    settings = backbone.settings if side is None else backbone.settings.model_copy(update={"image_size": side})
    weights, grid, old = dict(backbone.weights), list(grid_of(settings)), list(grid_of(backbone.settings))
    if grid != old:
        weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], grid, old)
    return settings, weights
