"""The teacher in every step, on the views that the store holds: the baseline that stored targets are measured by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.targets.schema import StoreHeader, require_same_header
from milan_pipe.teacher.clip import load_teacher


def teacher_of(
    config: TeacherSettings | None, header: StoreHeader, device: torch.device, where: object
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that labels pixels as extraction did.

    Args:
        config: the teacher; none takes what the store's header says of it.
        where: names the store in messages.

    Raises:
        SettingError, MissingError, DataError: the teacher cannot be loaded.
        MismatchError: it is not the one that wrote the store.
    """
    if config is None:
        stored = header.teacher.model_dump(include=set(TeacherSettings.model_fields))
        config = TeacherSettings.parse(stored, f"{where}, teacher")
    teacher = load_teacher(config, device, grid=header.teacher.grid)
    require_same_header(header, header.model_copy(update={"teacher": teacher.info}), where)

    def teach(pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        output = teacher(pixels_BHWC)
        share_BL = output.importance_BL / output.importance_BL.sum(dim=1, keepdim=True)
        # Rounded as in a store, so that masks are the same; cloned, as what inference mode made cannot be trained on.
        return output.features_BST.clone(), share_BL.half().clone()

    return teach
