"""What a run measures: losses, and a point of the metrics every few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from milan_pipe.devices import memory_in_use
from milan_pipe.errors import DataError
from milan_pipe.training.sinks import Sink
from milan_pipe.training.step import StepReport

_METRICS = ("loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory")


class Keyed(Protocol):
    """A batch that knows the keys of its samples."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of this rank's part of the batch."""


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Reported every few steps; `memory` in bytes, see `milan_pipe.devices.memory_in_use`.

    `loss` is the mean since the last time, `grad_norm` that of the last step, before clipping.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    images_per_second: float
    data_wait: float
    seconds: float
    memory: int


class NotFiniteError(DataError):
    """A loss or gradient is not finite; `step` and `epoch` are those of the first such batch."""

    def __init__(self, message: str, step: int, epoch: int) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch


class LossWatch:
    """Losses of an epoch and since the last point. They are read now and then: reading makes an accelerator wait.

    Sums are taken step by step in double precision, so that they do not depend on when they are read. Of several ranks
    each gives its share of a batch's loss; all of them read at the same steps.

    Args:
        mean: of a tensor over ranks.
        norm_must_be_finite: False where a loss scale takes care of gradients that are not.
        advice: what to do about a loss that is not finite.
    """

    def __init__(self, mean: Callable[[Tensor], Tensor], *, norm_must_be_finite: bool, advice: str) -> None:
        self._mean = mean
        self._advice = advice
        self._norm_must_be_finite = norm_must_be_finite
        self._unread: list[tuple[StepReport, tuple[str, ...]]] = []
        self._epoch = -1
        self._sums: dict[str, list[float]] = {"epoch": [0.0, 0], "recent": [0.0, 0]}
        self.grad_norm = math.nan

    def add(self, report: StepReport, keys: tuple[str, ...]) -> None:
        """Remember a step."""
        self._unread.append((report, keys))

    def settle(self) -> None:
        """Read the losses and gradient norms.

        Raises:
            NotFiniteError: one is not finite; names the first such step and its batch.
        """
        if not self._unread:
            return
        results = [report.result for report, _ in self._unread]
        losses = self._mean(torch.stack([result.loss for result in results])).tolist()
        norms = torch.stack([result.grad_norm for result in results]).tolist()
        for loss, norm, (report, keys) in zip(losses, norms, self._unread, strict=True):
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not math.isfinite(value) and (name == "loss" or self._norm_must_be_finite):
                    raise NotFiniteError(
                        f"the {name} is {value:g} at step {report.step} (batch of {len(keys)}: {keys[0]} ... "
                        f"{keys[-1]}); {self._advice}",
                        report.step,
                        report.epoch,
                    )
            if report.epoch != self._epoch:
                self._epoch = report.epoch
                self._sums["epoch"] = [0.0, 0]
            for sums in self._sums.values():
                sums[0] += loss
                sums[1] += 1
            self.grad_norm = norm
        self._unread.clear()

    def recent_mean(self) -> float:
        """Mean over the steps since the last call; raises as `settle`."""
        self.settle()
        total, count = self._sums["recent"]
        self._sums["recent"] = [0.0, 0]
        return total / count

    def epoch_mean(self) -> float:
        """Mean over the epoch so far; raises as `settle`."""
        self.settle()
        total, count = self._sums["epoch"]
        return total / count

    def state(self) -> dict[str, Any]:
        """What a process that goes on needs; raises as `settle`."""
        self.settle()
        return {"epoch": self._epoch, "sums": self._sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a state over."""
        self._epoch = int(state["epoch"])
        self._sums = {name: [total, count] for name, (total, count) in state["sums"].items()}


class Recorder:
    """Measures, and reports to the sinks and the listener every few steps."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        losses: LossWatch,
        *,
        first_step: int,
        steps: int,
        batch_size: int,
        log_every: int,
        device: torch.device,
        on_progress: Callable[[TrainProgress], None],
    ) -> None:
        self._sinks = sinks
        self._first_step = first_step
        self._steps = steps
        self._batch_size = batch_size
        self._log_every = log_every
        self._device = device
        self._on_progress = on_progress
        self.losses = losses
        self.progress: TrainProgress | None = None

    def __call__(self, report: StepReport, batch: Keyed) -> None:
        """Take one step in.

        Raises:
            NotFiniteError: a loss or gradient is not finite.
        """
        self.losses.add(report, batch.keys)
        if report.step % self._log_every and report.step != self._steps:
            return
        self.progress = TrainProgress(
            step=report.step,
            steps=self._steps,
            epoch=report.epoch,
            loss=self.losses.recent_mean(),
            lr=report.lr,
            grad_norm=self.losses.grad_norm,
            images_per_second=(report.step - self._first_step) * self._batch_size / report.seconds,
            data_wait=report.data_wait_seconds / report.seconds,
            seconds=report.seconds,
            memory=memory_in_use(self._device),
        )
        values = {f"train/{name}": float(getattr(self.progress, name)) for name in _METRICS}
        for sink in self._sinks:
            sink.point(report.step, values)
        self._on_progress(self.progress)
