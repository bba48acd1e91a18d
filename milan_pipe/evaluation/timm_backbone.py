"""Models of timm as they stand, by name, from a hub or a folder: what a student is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from milan_pipe.config.student import StudentSettings
from milan_pipe.config.teacher import FOLDER, TIMM
from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, SettingError, one_line
from milan_pipe.evaluation.backbone import Backbone, Layout, backbone_of
from milan_pipe.pretrained.source import Asker, MeanStd, mean_std
from milan_pipe.pretrained.timm_source import TimmSource, find_timm_source, is_timm_folder

_ASKER = Asker(what="model", setting="CHECKPOINT")


@dataclass(frozen=True, kw_only=True)
class TimmBackbone(Backbone):
    """A model of timm, its classifier left out; `settings` hold its name and the side of its input.

    Attributes:
        architecture: timm's name of it; it was built with `arguments`.
    """

    model: nn.Module
    architecture: str
    arguments: Mapping[str, Any]
    given: Layout
    stated: MeanStd

    @property
    def layout(self) -> Layout:
        return self.given

    @property
    def normalization(self) -> MeanStd:
        return self.stated

    def encoder(self) -> nn.Module:
        """The model itself."""
        return self.model

    def digest(self) -> str:
        """sha256 over weights, what is built around them, mean and std."""
        return sha256_of(f"{super().digest()} {self.structure()} {self.stated}".encode())

    def structure(self) -> str:
        return json.dumps([self.architecture, self.settings.image_size, dict(self.arguments)], sort_keys=True)


def frozen_backbone_of(checkpoint: str | Path, student: StudentSettings, seed: int) -> Backbone:
    """What a CHECKPOINT argument names where nothing of it is trained: as of `backbone_of`, or a model of timm.

    Args:
        checkpoint: also `timm:NAME[.TAG]`, `timm:hf-hub:ORG/NAME`, `timm:local-dir:PATH`, or a folder that
            `milan-pipe export` wrote.

    Raises:
        MissingError, DataError, MismatchError, SettingError: as `backbone_of` and `find_timm_source`, or the model has
            no features that could be judged.
    """
    name = str(checkpoint)
    if name.startswith(TIMM):
        return _timm_backbone(name, name)
    if is_timm_folder(name):
        return _timm_backbone(name, f"{TIMM}{FOLDER}:{name}")
    return backbone_of(checkpoint, student, seed)


def _timm_backbone(name: str, full_name: str) -> TimmBackbone:
    source = find_timm_source(full_name, None, _ASKER, TimmSource)
    model: Any = source.trained()
    side = _side(model, full_name)
    return TimmBackbone(
        name=name,
        # What else it is made of, timm knows by its name.
        settings=StudentSettings(model=name, image_size=side, patch_size=None, width=None, depth=None, heads=None),
        weights=model.state_dict(),
        model=model,
        architecture=source.name,
        arguments=source.arguments,
        given=_layout(model, side, full_name),
        stated=mean_std(model.pretrained_cfg) or MeanStd(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )


def _side(model: Any, name: str) -> int:
    """Side of the square input in pixels: of positions that were made for one, else as the weights are described."""
    stated = model.pretrained_cfg.get("input_size")
    described = tuple(stated) if isinstance(stated, (list, tuple)) else ()
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = (*described[:1], *own) if own else described
    if len(size) != 3 or size[0] != 3 or size[1] != size[2] or not isinstance(size[1], int) or size[1] < 1:
        found = " x ".join(map(str, size)) or "nothing"
        raise SettingError(f"model {name!r} takes {found}, expected 3 channels and a square, as 3 x 224 x 224")
    return int(size[1])


@torch.no_grad()
def _layout(model: Any, side: int, name: str) -> Layout:
    """How the model lays out its features, by those of one image."""
    try:
        found = model.forward_features(torch.zeros(1, 3, side, side))
    # A model of anyone's making, at a size that a description says.
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(
            f"model {name!r} cannot be run at {side} x {side} pixels ({type(error).__name__}: {one_line(error)}); "
            "check its description"
        ) from error
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    if len(shape) == 4:
        last = getattr(model, "output_fmt", None) == "NHWC"
        return Layout(grid=shape[1:3] if last else shape[2:], width=shape[3 if last else 1], has_cls=False, last=last)
    prefix, grid = getattr(model, "num_prefix_tokens", None), _grid(model)
    # Without prefix tokens that timm knows of, nobody says which tokens are patches.
    if len(shape) != 3 or prefix is None or grid is None or shape[1] != prefix + grid[0] * grid[1]:
        what = f"of shape {shape}" if shape else f"as a {type(found).__name__}"
        raise SettingError(
            f"model {name!r} cannot be used: timm's {type(model).__name__} gives features {what}; expected one for "
            "each patch, as of a vision transformer, or a map of them, as of a convolutional network"
        )
    has_cls = getattr(model, "cls_token", None) is not None
    return Layout(grid=grid, width=shape[2], has_cls=has_cls, prefix=prefix)


def _grid(model: Any) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    return cast("tuple[int, int] | None", getattr(embed, "grid_size", None))
