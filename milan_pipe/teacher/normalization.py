"""The mean and standard deviation that a teacher was trained with, or those that the published code feeds it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import open_clip
from open_clip.constants import HF_CONFIG_NAME
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from milan_pipe.errors import DataError
from milan_pipe.pretrained.source import MeanStd, ModelSource, mean_std

logger = logging.getLogger(__name__)


IMAGENET = MeanStd(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
OPENAI = MeanStd(tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD))


def stated_normalization(preprocess: Any) -> MeanStd | None:
    """What a model's `preprocess_cfg` says, OpenAI's where it says nothing; None where it is damaged."""
    if not isinstance(preprocess, dict):
        return None
    # open_clip takes one number for all channels too.
    spread = {key: [value] * 3 if isinstance(value, int | float) else value for key, value in preprocess.items()}
    return mean_std(OPENAI._asdict() | {key: value for key, value in spread.items() if value is not None})


def _of_sidecar(checkpoint: Path) -> MeanStd | None:
    """What open_clip's description beside a checkpoint says; model hubs keep the two in one folder."""
    path = checkpoint.parent / HF_CONFIG_NAME
    if not path.is_file():
        return None
    found = None
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = mean_std(json.loads(path.read_text(encoding="utf-8"))["preprocess_cfg"])
    if found is None:
        raise DataError(
            f"{path} says no mean and std of its checkpoint {checkpoint.name}, expected three numbers each under "
            "preprocess_cfg. Repair it, or move the checkpoint out of its folder"
        )
    return found


def normalization_of(kind: Literal["clip", "imagenet"], source: ModelSource, visual: nn.Module) -> MeanStd:
    """Mean and std for a teacher's input.

    `imagenet` is the published code's. `clip` is the first that is known of: open_clip's for the tag, those of
    `open_clip_config.json` beside a local checkpoint, the model description's, those of most of the model's tags,
    timm's for the tower, OpenAI's.

    Raises:
        DataError: the description beside a local checkpoint cannot be read.
    """
    if kind == "imagenet":
        return IMAGENET
    tags = open_clip.list_pretrained_tags_by_model(source.model)
    by_tag = {tag: mean_std(open_clip.get_pretrained_cfg(source.model, tag)) or OPENAI for tag in tags}
    if source.tag is not None:
        return by_tag[source.tag]
    if source.file is not None and (found := _of_sidecar(source.file)):
        return found
    if source.stated is not None:
        return source.stated
    if by_tag:
        ((common, _), *others) = Counter(by_tag.values()).most_common()
        if others and source.file is not None:
            logger.warning(
                "checkpoints of %s differ in their normalization and %s has no %s beside it: taking mean %s, std %s",
                source.model, source.file, HF_CONFIG_NAME, common.mean, common.std,
            )  # fmt: skip
        return common
    return mean_std(getattr(getattr(visual, "trunk", None), "pretrained_cfg", None)) or OPENAI
