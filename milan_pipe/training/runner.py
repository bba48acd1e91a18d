"""The steps that are left of a run: counted, recorded, saved when due, stopped when asked. It knows no model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from milan_pipe.errors import StoppedError
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.loop import StepReport, train
from milan_pipe.training.saver import Saver
from milan_pipe.training.step import StepResult
from milan_pipe.training.stopping import StopRequest

B = TypeVar("B")


def run_steps(
    step_of: Callable[[B, int, float], StepResult],
    batches: Iterator[B],
    *,
    steps: int,
    steps_per_epoch: int,
    first_step: int,
    lr_of: Callable[[int], float],
    on_step: Callable[[StepReport, B], None],
    saver: Saver,
    state: Callable[[], Mapping[str, Any]],
    ranks: Ranks,
    stop: StopRequest,
) -> None:
    """Do steps `first_step` to `steps` - 1.

    Args:
        step_of: does one step with a batch, its epoch and a learning rate.
        batches: of all steps that are left, across the borders of epochs.
        steps_per_epoch: the last epoch may have fewer.
        lr_of: learning rate of step 0, 1, ...
        on_step: told after each step, before it may be saved.
        state: JSON data that a process that goes on needs, asked for when a checkpoint is written.

    Raises:
        StoppedError: a signal asked to stop; a checkpoint was written.
    """
    epoch, skip = divmod(first_step, steps_per_epoch)

    def batches_of(now: int) -> Iterator[B]:
        begin = now * steps_per_epoch + (skip if now == epoch else 0)
        return islice(batches, min((now + 1) * steps_per_epoch, steps) - begin)

    def after_step(report: StepReport, batch: B) -> None:
        on_step(report, batch)
        if report.step == steps:
            return
        # The ranks have to agree on it.
        number, due = ranks.largest([stop.signal or 0, ranks.first and saver.due(report.step)])
        if number:
            path = saver.save(report.step, state(), finished=False)
            raise StoppedError(
                f"by {signal.Signals(number).name} after step {report.step} of {steps}; {path} was written, and "
                "the same command goes on from it",
                number,
            )
        if due:
            saver.save(report.step, state(), finished=False)

    train(
        step_of,
        epochs=-(-steps // steps_per_epoch),
        batches_of=batches_of,
        lr_of=lr_of,
        on_step=after_step,
        first_epoch=epoch,
        first_step=first_step,
    )
