"""Teachers by their open_clip names, and the one that ships with the package."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import get_model_config
from pydantic import Field
from torch import Tensor, nn

from milan_pipe.errors import MissingError, SettingError, ShapeError
from milan_pipe.settings import Settings
from milan_pipe.targets.schema import TeacherInfo
from milan_pipe.teacher.tower import check_tower, grid_of, input_size_of, output_width_of, tower_outputs

DEMO = "demo"
RANDOM = "random"
_DEMO_MODEL = "milan-demo-ViT-S-8-64"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TeacherConfig(Settings):
    """Which CLIP image tower gives the targets."""

    model: str = Field(
        DEMO, description="`demo`, the scenes' teacher that ships with the package, or an open_clip name"
    )
    pretrained: str | None = Field(
        None, description="open_clip tag, path of a local checkpoint, or `random` (untrained weights, for measurements)"
    )
    normalization: Literal["clip", "imagenet"] = Field(
        "clip", description="clip: the teacher's own mean and std; imagenet: as the published code feeds it"
    )
    image_size: int | None = Field(None, ge=1, description="input side in pixels; none is the model's own")


@dataclass(frozen=True)
class TeacherOutput:
    """What one forward pass gives.

    Attributes:
        features_BST: float32, CLS first, not unit length.
        importance_BL: float32, share of the CLS query's attention on each patch; a row sums to less than 1.
    """

    features_BST: Tensor
    importance_BL: Tensor


class Teacher(nn.Module):
    """A frozen CLIP image tower that takes raw pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, info: TeacherInfo, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.info = info
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

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
        features, importance = tower_outputs(self.visual, (pixels - self.mean) / self.std)
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


def _weights_sha256(visual: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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


def _create(config: TeacherConfig) -> Any:
    name, pretrained = _resolve(config)
    arguments: dict[str, Any] = {"force_image_size": config.image_size} if config.image_size else {}
    # Untrained weights must be the same in every process, as targets of one store come from many.
    with torch.random.fork_rng(devices=[]), _quiet(None, "huggingface_hub", "huggingface_hub.utils._http"):
        torch.manual_seed(0)
        try:
            return open_clip.create_model(name, pretrained=pretrained, **arguments)
        # Readers of damaged checkpoints raise UnpicklingError, SafetensorError, AttributeError and more.
        except Exception as error:
            reason = " ".join(str(error).split())[:240] or type(error).__name__
            if pretrained is not None and Path(pretrained).is_file():
                raise SettingError(
                    f"checkpoint {pretrained} does not load as open_clip model {name!r}: {reason}"
                ) from error
            if not isinstance(error, OSError | RuntimeError | ValueError | ImportError):
                raise
            raise MissingError(
                f"weights {pretrained!r} of teacher {name!r} cannot be had: {reason}. Connect to the model hub once, "
                "or name a local checkpoint with --set teacher.pretrained=PATH"
            ) from error


def load_teacher(config: TeacherConfig, device: str | torch.device = "cpu") -> Teacher:
    """Load a frozen teacher.

    Raises:
        SettingError: unknown model, no weights named, a checkpoint of another model, or a tower of another kind.
        MissingError: unknown tag, or the hub is out of reach.
    """
    model = _create(config)
    visual = model.visual
    check_tower(visual, config.model)
    if config.normalization == "imagenet":
        mean, std = _IMAGENET_MEAN, _IMAGENET_STD
    else:
        mean = tuple(getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN)
        std = tuple(getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD)
    info = TeacherInfo(
        model=config.model,
        # A checkpoint's place says nothing of its content, the digest does: targets are the same on another machine.
        pretrained=config.pretrained and Path(config.pretrained).name,
        weights_sha256=_weights_sha256(visual),
        normalization=config.normalization,
        image_size=input_size_of(visual, config.model),
        grid=grid_of(visual),
        width=output_width_of(visual),
    )
    return Teacher(visual, info, mean, std).to(device)
