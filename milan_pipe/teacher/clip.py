"""Teachers by their open_clip names, and the one that ships with the package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import get_model_config
from open_clip.model import _build_vision_tower
from pydantic import Field
from torch import Tensor, nn

from milan_pipe.errors import MissingError, SettingError, ShapeError
from milan_pipe.settings import Settings
from milan_pipe.targets.schema import TeacherInfo
from milan_pipe.teacher.checkpoint import load_tower_weights, read_tower_weights, weights_sha256
from milan_pipe.teacher.normalization import MeanStd, normalization_of
from milan_pipe.teacher.tower import (
    check_tower,
    choose_input_size,
    grid_of,
    output_width_of,
    resize_tower,
    tower_outputs,
)

DEMO = "demo"
RANDOM = "random"
_DEMO_MODEL = "milan-demo-ViT-S-8-64"


class TeacherConfig(Settings):
    """Which CLIP or SigLIP image tower gives the targets."""

    model: str = Field(
        DEMO, description="`demo`, the scenes' teacher that ships with the package, or an open_clip name"
    )
    pretrained: str | None = Field(
        None, description="open_clip tag, path of a local checkpoint, or `random` (untrained weights, for measurements)"
    )
    normalization: Literal["clip", "imagenet"] = Field(
        "clip", description="clip: the teacher's own mean and std; imagenet: as the published code feeds it"
    )
    image_size: int | None = Field(
        None, ge=1, description="input side in pixels; none: where the teacher has as many patches as the student"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass; auto: bfloat16 autocast on CUDA, float32 elsewhere"
    )


@dataclass(frozen=True)
class TeacherOutput:
    """What one forward pass gives.

    Attributes:
        features_BST: float32, CLS or pooled token first, not unit length.
        importance_BL: float32, share of the pooling query's attention on each patch; a row sums to at most 1.
    """

    features_BST: Tensor
    importance_BL: Tensor


class Teacher(nn.Module):
    """A frozen image tower that takes raw pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, info: TeacherInfo, normalization: MeanStd) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.info = info
        self.register_buffer("mean", torch.tensor(normalization.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(normalization.std).view(1, 3, 1, 1) * 255)

    @torch.inference_mode()
    def forward(self, pixels_BHWC: Tensor) -> TeacherOutput:
        """Features and importance of uint8 pixels.

        Args:
            pixels_BHWC: (B, H, W, 3) uint8 RGB of any size; resized (bicubic, antialiased) where it is not the tower's.

        Raises:
            ShapeError: not (B, H, W, 3) uint8.
        """
        if pixels_BHWC.ndim != 4 or pixels_BHWC.shape[-1] != 3 or pixels_BHWC.dtype != torch.uint8:
            raise ShapeError(
                f"expected (B, H, W, 3) uint8 pixels, found {tuple(pixels_BHWC.shape)} {pixels_BHWC.dtype}"
            )
        pixels = pixels_BHWC.to(self.mean.device).permute(0, 3, 1, 2).float()
        side = self.info.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)
        normalised = (pixels - self.mean) / self.std
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.info.precision == "bfloat16"):
            features, importance = tower_outputs(self.visual, normalised)
        return TeacherOutput(features.float(), importance.float())


@contextmanager
def _quiet(*names: str | None) -> Iterator[None]:
    """Keep libraries from logging what is about to be raised as one clear error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def demo_folder() -> Path:
    """Where the bundled teacher's model config and weights lie."""
    return Path(str(resources.files("milan_pipe.teacher") / "demo"))


def _resolve(config: TeacherConfig) -> tuple[str, str | None]:
    """Model name and `pretrained` as open_clip takes them.

    Raises:
        SettingError: unknown model or tag, or no weights named.
    """
    if config.model == DEMO:
        if config.pretrained not in (None, RANDOM):
            raise SettingError(
                f"teacher 'demo' brings its own weights, found pretrained {config.pretrained!r}; leave it out"
            )
        open_clip.add_model_config(demo_folder())
        weights = demo_folder() / f"{_DEMO_MODEL}.safetensors"
        return _DEMO_MODEL, None if config.pretrained == RANDOM else str(weights)
    name = config.model.replace("/", "-")
    if get_model_config(name) is None:
        near = get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        hint = f"; nearest are {', '.join(near)}" if near else ""
        raise SettingError(f"unknown teacher {config.model!r}, expected `demo` or a model name of open_clip{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if config.pretrained is None:
        raise SettingError(
            f"teacher {config.model!r} needs `teacher.pretrained`: one of {', '.join(tags) or 'no known tag'}, "
            "the path of a local checkpoint, or `random`"
        )
    if config.pretrained == RANDOM:
        return name, None
    if config.pretrained not in tags and not Path(config.pretrained).is_file():
        raise MissingError(
            f"teacher {config.model!r} has no pretrained tag {config.pretrained!r} and no such file is there; "
            f"known tags are {', '.join(tags) or 'none'}"
        )
    return name, config.pretrained


def _weights_file(name: str, pretrained: str) -> Path:
    """The checkpoint that a path or a tag stands for; a tag's is fetched from its model hub once.

    Raises:
        MissingError: the hub is out of reach.
    """
    if pretrained not in open_clip.list_pretrained_tags_by_model(name):
        return Path(pretrained)
    with _quiet(None, "huggingface_hub", "huggingface_hub.utils._http"):
        try:
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained)))
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            reason = shorten(str(error), 240, placeholder=" ...") or type(error).__name__
            raise MissingError(
                f"weights {pretrained!r} of teacher {name!r} cannot be had ({reason}). Connect to the model hub once, "
                "or name a local checkpoint with --set teacher.pretrained=PATH"
            ) from error


def _build_tower(name: str, pretrained: str | None) -> nn.Module:
    """The image tower alone, untrained: text towers are never needed, and some ask a model hub for their parts."""
    config = get_model_config(name)
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    # Untrained weights must be the same in every process, as targets of one store come from many.
    with torch.random.fork_rng(devices=[]), _quiet(None):
        torch.manual_seed(0)
        visual: nn.Module = _build_vision_tower(
            config["embed_dim"],
            vision,
            # The activation is the weights' own: open_clip only warns where ViT-B-16 is asked for OpenAI's weights.
            quick_gelu=bool(tag.get("quick_gelu", False) if tag else config.get("quick_gelu", False)),
        )
    return visual.eval()


def _resolve_precision(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> str:
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" else "float32"


def load_teacher(
    config: TeacherConfig, device: str | torch.device = "cpu", *, grid: tuple[int, int] | None = None
) -> Teacher:
    """Load a frozen teacher.

    Args:
        device: where it runs; with `precision: auto` it decides the precision too.
        grid: the student's patches, down and across. Without `image_size` in the settings, the teacher then reads the
            size at which its own grid is the same, with its position embedding interpolated.

    Raises:
        SettingError: unknown model, no weights named, a tower that cannot serve, or a size that does not fit it.
        MissingError: unknown tag, or the hub is out of reach.
        DataError: a local checkpoint cannot be read.
        MismatchError: a checkpoint of another model.
    """
    name, pretrained = _resolve(config)
    visual = _build_tower(name, pretrained)
    check_tower(visual, config.model)
    checkpoint = None
    if pretrained is not None:
        checkpoint = _weights_file(name, pretrained)
        load_tower_weights(visual, read_tower_weights(checkpoint), config.model, str(checkpoint))
    # Over the weights as trained: the same teacher at another input size keeps its identity.
    digest = weights_sha256(visual)
    side = choose_input_size(visual, config.model, config.image_size, grid)
    resize_tower(visual, side)
    local = checkpoint if checkpoint is not None and str(checkpoint) == pretrained else None
    info = TeacherInfo(
        model=config.model,
        # A checkpoint's place says nothing of its content, the digest does: targets are the same on another machine.
        pretrained=config.pretrained and Path(config.pretrained).name,
        weights_sha256=digest,
        normalization=config.normalization,
        precision=_resolve_precision(config.precision, torch.device(device)),
        image_size=side,
        grid=grid_of(visual),
        width=output_width_of(visual),
    )
    normalization = normalization_of(config.normalization, name, pretrained, local, visual)
    return Teacher(visual, info, normalization).to(device)
