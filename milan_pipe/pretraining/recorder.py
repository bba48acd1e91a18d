"""What a run measures: losses, and a point of the metrics every few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from dvclive.live import Live

from milan_pipe.devices import memory_in_use
from milan_pipe.errors import DataError
from milan_pipe.loader.stream import Batch
from milan_pipe.training.loop import StepReport


@dataclass(frozen=True, kw_only=True)
class PretrainProgress:
    """Told every few steps; `memory` in bytes, see `milan_pipe.devices.memory_in_use`."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    images_per_second: float
    data_wait: float
    seconds: float
    memory: int


class LossWatch:
    """Losses of an epoch and since the last point. They are read now and then: reading makes an accelerator wait.

    Sums are taken step by step in double precision, so that they do not depend on when they are read.
    """

    def __init__(self, told_of_checkpoint: Callable[[], str]) -> None:
        self._told_of_checkpoint = told_of_checkpoint
        self._unread: list[tuple[StepReport, tuple[str, ...]]] = []
        self._epoch = -1
        self._sums: dict[str, list[float]] = {"epoch": [0.0, 0], "recent": [0.0, 0]}

    def add(self, report: StepReport, keys: tuple[str, ...]) -> None:
        """Remember a step."""
        self._unread.append((report, keys))

    def settle(self) -> None:
        """Read the losses.

        Raises:
            DataError: one is not finite; names the first such step and its batch.
        """
        if not self._unread:
            return
        losses = torch.stack([report.loss for report, _ in self._unread]).cpu().tolist()
        for loss, (report, keys) in zip(losses, self._unread, strict=True):
            if not math.isfinite(loss):
                raise DataError(
                    f"the loss is {loss:g} at step {report.step} (batch of {len(keys)}: {keys[0]} ... {keys[-1]}); "
                    f"lower pretrain.lr, or check the targets. {self._told_of_checkpoint()}"
                )
            if report.epoch != self._epoch:
                self._epoch = report.epoch
                self._sums["epoch"] = [0.0, 0]
            for sums in self._sums.values():
                sums[0] += loss
                sums[1] += 1
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
    """Writes RUN/metrics and tells of progress every few steps."""

    def __init__(
        self,
        live: Live,
        losses: LossWatch,
        *,
        first_step: int,
        steps: int,
        batch_size: int,
        log_every: int,
        device: torch.device,
        on_progress: Callable[[PretrainProgress], None],
    ) -> None:
        self._live = live
        self._first_step = first_step
        self._steps = steps
        self._batch_size = batch_size
        self._log_every = log_every
        self._device = device
        self._on_progress = on_progress
        self.losses = losses
        self.progress: PretrainProgress | None = None

    def __call__(self, report: StepReport, batch: Batch) -> None:
        """Take one step in.

        Raises:
            DataError: a loss is not finite.
        """
        self.losses.add(report, batch.keys)
        if report.step % self._log_every and report.step != self._steps:
            return
        self.progress = PretrainProgress(
            step=report.step,
            steps=self._steps,
            epoch=report.epoch,
            loss=self.losses.recent_mean(),
            lr=report.lr,
            images_per_second=(report.step - self._first_step) * self._batch_size / report.seconds,
            data_wait=report.data_wait_seconds / report.seconds,
            seconds=report.seconds,
            memory=memory_in_use(self._device),
        )
        self._live.step = report.step
        for name in ("loss", "lr", "images_per_second", "data_wait", "memory"):
            self._live.log_metric(f"train/{name}", getattr(self.progress, name))
        self._live.sync()  # type: ignore[no-untyped-call]
        self._on_progress(self.progress)
