"""The teacher in every step, on the views that the store holds: the baseline that stored targets are measured by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.teacher.clip import load_teacher_of


def teacher_of(
    config: TeacherSettings | None, header: StoreHeader, device: torch.device, where: object
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that labels pixels as extraction did; see `load_teacher_of`.

    What extraction refuses gets features that are not finite, so that the run stops and names the batch.
    """
    teacher = load_teacher_of(header, config, device, where)

    def teach(pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        output = teacher(pixels_BHWC)
        # Marked and not raised: to read the faults would wait for the device in every step.
        faulty_B11 = output.faults_BF().any(dim=1)[:, None, None]
        # Shares are rounded as in a store, so that masks are the same.
        return output.features_BST.masked_fill(faulty_B11, math.nan), output.share_BL().half()

    return teach
