"""The model that an evaluation begins with, as a rule a pretrained student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from milan_pipe.config.evaluation import Pool
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.subjects import RANDOM
from milan_pipe.config.teacher import TIMM
from milan_pipe.errors import DataError, SettingError
from milan_pipe.pretrained.source import MeanStd
from milan_pipe.student.encoder import Encoder, Grid, build_encoder, grid_of
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint
from milan_pipe.weights_file import load_weights, weights_digest


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the features of an image lie in what a model's `forward_features` gives.

    Attributes:
        grid: rows and columns of patches, or of a map.
        width: D, values of a feature.
        has_cls: whether the first token is a class token.
        prefix: tokens before those of patches; None: there is a map of features.
        last: of a map, whether the channels come last.
    """

    grid: Grid
    width: int
    has_cls: bool
    prefix: int | None = None
    last: bool = False

    def tokens(self, output: Tensor) -> Tensor:
        """(B, S, D): the class token, where there is one, and patches in raster order; registers are left out."""
        if self.prefix is None:
            return output.flatten(1, 2) if self.last else output.flatten(2).mT
        if self.prefix == self.has_cls:
            return output
        return torch.cat([output[:, : int(self.has_cls)], output[:, self.prefix :]], dim=1)

    def patches(self, tokens_BSD: Tensor) -> Tensor:
        """(B, L, D): the patches among what `tokens` gives."""
        return tokens_BSD[:, int(self.has_cls) :]

    def require(self, pool: Pool, setting: str, name: str) -> None:
        """Raise SettingError where a model has no token that `pool`, the value of a setting, asks for."""
        if pool == "cls" and not self.has_cls:
            raise SettingError(f"model {name!r} has no class token, which {setting}=cls takes; set {setting}=mean")


def pooled(tokens_BSD: Tensor, pool: Pool, layout: Layout | None = None) -> Tensor:
    """(B, D): the class token, or the mean of the patch tokens; without `layout` the first token is a class token."""
    if pool == "cls":
        return tokens_BSD[:, 0]
    return (tokens_BSD[:, 1:] if layout is None else layout.patches(tokens_BSD)).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A student's sizes and weights, by timm's names without classifier; `name` is a checkpoint's path or `random`."""

    name: str
    settings: StudentSettings
    weights: Mapping[str, Tensor]

    @property
    def layout(self) -> Layout:
        """How its features lie."""
        width, has_cls = self.weights["patch_embed.proj.weight"].shape[0], "cls_token" in self.weights
        registers = self.weights["reg_token"].shape[1] if "reg_token" in self.weights else 0
        return Layout(grid=grid_of(self.settings), width=width, has_cls=has_cls, prefix=has_cls + registers)

    @property
    def normalization(self) -> MeanStd:
        """Of its input."""
        return MeanStd(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def encoder(self) -> nn.Module:
        """A new encoder with these weights; `forward_features` takes normalised (B, 3, H, W) floats."""
        return _loaded(self.settings, self.weights, self.name)

    def digest(self) -> str:
        """sha256 over names and values."""
        return weights_digest(self.weights)

    def structure(self) -> str:
        """What is built around the weights, as JSON: the same ones, with other heads, give other features."""
        return json.dumps(self.settings.model_dump(mode="json"), sort_keys=True)


def _loaded(settings: StudentSettings, weights: Mapping[str, Tensor], name: str) -> Encoder:
    encoder = build_encoder(settings)
    load_weights(encoder, weights, name)
    return encoder


def student_of(checkpoint: Checkpoint) -> tuple[StudentSettings, Encoder]:
    """Settings and encoder of a checkpoint.

    Raises:
        DataError, MismatchError: it is damaged, holds no student, or tensors of another one.
    """
    sizes, task = checkpoint.record.get("student"), checkpoint.record.get("task")
    if not isinstance(sizes, dict) or task is not None:
        found = f"holds what `milan-pipe {task}` trained" if task else "does not say which student it holds"
        raise DataError(f"{checkpoint.path} {found}; name one that `milan-pipe pretrain` wrote")
    settings: StudentSettings = StudentSettings.parse(sizes, f"{checkpoint.path}, student")
    return settings, _loaded(settings, checkpoint.weights("student"), str(checkpoint.path))


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
    if str(checkpoint).startswith(TIMM):
        raise SettingError(
            f"{checkpoint} is a model of timm, which knn, linear-probe and embed take; fine-tuning and segmentation "
            "begin with a student: name a run or a checkpoint"
        )
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
    position_1SD = weights.get("pos_embed")
    if grid != old and position_1SD is not None:
        prefix = position_1SD.shape[1] - old[0] * old[1]
        weights["pos_embed"] = resample_abs_pos_embed(position_1SD, grid, old, num_prefix_tokens=prefix)
    return settings, weights
