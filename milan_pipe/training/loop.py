"""One loop for every kind of training: batches in, loss out, steps counted, time told apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from milan_pipe.training.step import StepResult

B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Told after every step.

    Attributes:
        step: steps done, 1 for the first.
        epoch: counted from 0.
        result: loss and gradient norm of this step's batch; read them only when needed, it makes an accelerator wait.
        lr: used in this step.
        seconds: since the loop began.
        data_wait_seconds: of these, spent waiting for batches.
    """

    step: int
    epoch: int
    result: StepResult
    lr: float
    seconds: float
    data_wait_seconds: float


def train(
    step_of: Callable[[B, int, float], StepResult],
    *,
    epochs: int,
    batches_of: Callable[[int], Iterator[B]],
    lr_of: Callable[[int], float],
    on_step: Callable[[StepReport, B], None],
    first_epoch: int = 0,
    first_step: int = 0,
) -> int:
    """Run epochs `first_epoch` to `epochs` - 1.

    Args:
        step_of: does one step with a batch, its epoch and a learning rate.
        batches_of: batches of an epoch; of the first one, those that are left.
        lr_of: learning rate of step 0, 1, ...
        on_step: told after each step; may raise to stop.
        first_step: steps that were done before.

    Returns:
        Steps done, those before included.
    """
    began = time.monotonic()
    waited = 0.0
    step = first_step
    for epoch in range(first_epoch, epochs):
        batches = batches_of(epoch)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is None:
                break
            lr = lr_of(step)
            result = step_of(batch, epoch, lr)
            step += 1
            on_step(
                StepReport(
                    step=step,
                    epoch=epoch,
                    result=result,
                    lr=lr,
                    seconds=time.monotonic() - began,
                    data_wait_seconds=waited,
                ),
                batch,
            )
    return step
