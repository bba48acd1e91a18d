"""The mean and standard deviation that a teacher was trained with, or those that the published code feeds it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from milan_pipe.errors import DataError

logger = logging.getLogger(__name__)

_SIDECAR = "open_clip_config.json"


class MeanStd(NamedTuple):
    """Per channel R, G, B, of pixels in 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = MeanStd(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
OPENAI = MeanStd(tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD))


def _of(config: Any) -> MeanStd | None:
    try:
        mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    except (KeyError, TypeError, ValueError):
        return None
    return MeanStd(mean, std) if len(mean) == len(std) == 3 and min(std) > 0 else None


def stated_normalization(preprocess: Any) -> MeanStd | None:
    """What a model's `preprocess_cfg` says, OpenAI's where it says nothing; None where it is damaged."""
    if not isinstance(preprocess, dict):
        return None
    said = {key: value for key, value in preprocess.items() if value is not None}
    # open_clip takes one number for all channels too.
    spread = {key: [value] * 3 if isinstance(value, int | float) else value for key, value in said.items()}
    return _of({**OPENAI._asdict(), **spread})


def _of_sidecar(checkpoint: Path) -> MeanStd | None:
    """What open_clip's description beside a checkpoint says; model hubs keep the two in one folder."""
    path = checkpoint.parent / _SIDECAR
    if not path.is_file():
        return None
    try:
        found = _of(json.loads(path.read_text(encoding="utf-8"))["preprocess_cfg"])
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise DataError(
            f"{path} says no mean and std of its checkpoint {checkpoint.name}, expected three numbers each under "
            "preprocess_cfg. Repair it, or move the checkpoint out of its folder"
        )
    return found


def normalization_of(
    kind: Literal["clip", "imagenet"],
    name: str,
    pretrained: str | None,
    checkpoint: Path | None,
    visual: nn.Module,
    stated: MeanStd | None = None,
) -> MeanStd:
    """Mean and std for a teacher's input.

    Args:
        kind: `imagenet` is the published code's; `clip` is the first of these that is known: what open_clip says of the
            tag, what `open_clip_config.json` beside a local checkpoint says, what the model's own description says,
            what all tags of the model share, what timm says of the tower, OpenAI's.
        name: open_clip name of the model.
        pretrained: a tag that open_clip may know.
        checkpoint: the local file that was loaded instead of a tag.
        stated: by the description of a model that open_clip does not know by name.

    Raises:
        DataError: the description beside a local checkpoint cannot be read.
    """
    if kind == "imagenet":
        return IMAGENET
    tags = open_clip.list_pretrained_tags_by_model(name)
    by_tag = {tag: _of(open_clip.get_pretrained_cfg(name, tag)) or OPENAI for tag in tags}
    if checkpoint is None and pretrained in by_tag:
        return by_tag[pretrained]
    if checkpoint is not None and (found := _of_sidecar(checkpoint)):
        return found
    if stated is not None:
        return stated
    if by_tag:
        ((common, _), *others) = Counter(by_tag.values()).most_common()
        if others and checkpoint is not None:
            logger.warning(
                "checkpoints of %s differ in their normalization and %s has no %s beside it: taking mean %s, std %s",
                name, checkpoint, _SIDECAR, common.mean, common.std,
            )  # fmt: skip
        return common
    return _of(getattr(getattr(visual, "trunk", None), "pretrained_cfg", None)) or OPENAI
