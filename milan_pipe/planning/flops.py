"""Arithmetic of one image, counted: what a rate comes to on a device that is not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from milan_pipe.config.params import Params
from milan_pipe.planning.speed import Speed, batch_of
from milan_pipe.planning.store import EncodedSample, ImageSample
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.teacher.clip import Teacher

_TERA = 1e12


def _count(run: Callable[[], Any]) -> int:
    # The counter knows no formula for the CPU's fused attention, nor for the encoder layer's; as plain matrix products
    # they are counted.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return int(counter.get_total_flops())


def teacher_flops(teacher: Teacher, pixels_NHWC: Tensor) -> int:
    """Floating point operations of one view's forward pass; a multiplication and its addition are two."""
    return _count(lambda: teacher(pixels_NHWC[:1]))


def student_flops(params: Params, header: StoreHeader, sample: ImageSample, encoded: EncodedSample) -> int:
    """Floating point operations of one image's share of a step, forward and backward; counted on the CPU.

    Args:
        header: of the store that it would learn from.

    Raises:
        SettingError: there is no such student.
    """
    objective = build_objective(header, params, torch.device("cpu"))
    batch = batch_of(sample, encoded, 1)
    return _count(lambda: objective(batch, 0).backward())


def speed_at(tflops: float, flops: int, batch_size: int) -> Speed:
    """The rate of a device that sustains `tflops` TFLOP/s."""
    return Speed(
        per_second=tflops * _TERA / flops,
        device=f"{flops / 1e9:.4g} GFLOP each at {tflops:g} TFLOP/s",
        precision="given",
        batch_size=batch_size,
        threads=0,
        batches=0,
    )
