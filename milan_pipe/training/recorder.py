"""What a run measures: losses, and a point of the metrics every few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milan_pipe.devices import memory_in_use
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.sinks import Sink
from milan_pipe.training.step import StepResult
from milan_pipe.training.task import NotFiniteError, Task

_METRICS = ("loss", "lr", "grad_norm", "images_per_second", "data_wait", "memory")


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Reported every few steps; `memory` in bytes, see `milan_pipe.devices.memory_in_use`.

    `loss` is the mean since the last report, `grad_norm` that of the last step, before clipping; `score` the main score
    of the last evaluation, if there was one.
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
    score: float | None = None


OnProgress = Callable[[TrainProgress], None]


class Recorder:
    """Sums of the losses, and points of the metrics for the sinks and the listener.

    Losses are read now and then, because reading makes an accelerator wait. Sums are taken step by step in double
    precision, so they do not depend on when they are read. All ranks read at the same steps.

    Attributes:
        sinks: set before the first step; empty on all ranks but the first.
        progress: last report; None before the first.
        score: of the last evaluation, for the listener.
    """

    def __init__(self, task: Task[Any], ranks: Ranks, on_progress: OnProgress, *, first_step: int) -> None:
        self._task, self._ranks, self._on_progress, self._first_step = task, ranks, on_progress, first_step
        # With float16 the loss scale handles gradients that are not finite.
        self._checked = ("loss",) if task.settings.precision == "float16" else ("loss", "norm of the gradient")
        self._unread: list[tuple[int, tuple[str, ...], StepResult]] = []
        self._epoch = -1
        self._sums: dict[str, list[float]] = {"epoch": [0.0, 0], "recent": [0.0, 0]}
        self._grad_norm = math.nan
        self.sinks: Sequence[Sink] = ()
        self.progress: TrainProgress | None = None
        self.score: float | None = None

    def add(
        self, step: int, keys: tuple[str, ...], result: StepResult, *, lr: float, seconds: float, waited: float
    ) -> None:
        """Take in a step, counted from 1, and report it if due; raises as `settle`.

        Args:
            seconds: since the first step, and `waited` those of them spent waiting for batches.
        """
        self._unread.append((step, keys, result))
        if step % self._task.settings.log_every and step != self._task.steps:
            return
        self.settle()
        total, count = self._sums["recent"]
        self._sums["recent"] = [0.0, 0]
        self.progress = TrainProgress(
            step=step,
            steps=self._task.steps,
            epoch=self._epoch,
            loss=total / count,
            lr=lr,
            grad_norm=self._grad_norm,
            images_per_second=(step - self._first_step) * self._task.batch_size / seconds,
            data_wait=waited / seconds,
            seconds=seconds,
            memory=memory_in_use(self._ranks.device),
            score=self.score,
        )
        self.point(step, {f"train/{name}": float(getattr(self.progress, name)) for name in _METRICS})
        if self._ranks.first:
            self._on_progress(self.progress)

    def settle(self) -> None:
        """Read the losses and gradient norms.

        Raises:
            NotFiniteError: one is not finite; names the first step with one, and its batch.
        """
        if not self._unread:
            return
        losses = self._ranks.all_reduce_sum(torch.stack([result.loss for *_, result in self._unread]))
        norms = torch.stack([result.grad_norm for *_, result in self._unread])
        # Each rank's loss is weighted for a mean over ranks.
        values = zip((losses / self._ranks.count).tolist(), norms.tolist(), self._unread, strict=True)
        for loss, norm, (step, keys, _) in values:
            for name, value in zip(self._checked, (loss, norm), strict=False):
                if not math.isfinite(value):
                    raise NotFiniteError(
                        f"the {name} is {value:g} at step {step} (batch of {len(keys)}: {keys[0]} ... {keys[-1]}); "
                        f"{self._task.advice}",
                        step,
                    )
            epoch = (step - 1) // self._task.steps_per_epoch
            if epoch != self._epoch:
                self._epoch, self._sums["epoch"] = epoch, [0.0, 0]
            self._sums = {name: [total + loss, count + 1] for name, (total, count) in self._sums.items()}
            self._grad_norm = norm
        self._unread.clear()

    def epoch_mean(self) -> float:
        """Mean loss of the epoch so far; raises as `settle`."""
        self.settle()
        total, count = self._sums["epoch"]
        return total / count

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Give a point to the sinks."""
        for sink in self.sinks:
            sink.point(step, values)

    def image(self, step: int, file: Path | None) -> None:
        """Give an image, if there is one, to the sinks."""
        if file is not None:
            for sink in self.sinks:
                sink.image(step, file)

    def state(self) -> dict[str, Any]:
        """For checkpoints; raises as `settle`."""
        self.settle()
        return {"epoch": self._epoch, "sums": self._sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._epoch = int(state["epoch"])
        self._sums = {name: [total, count] for name, (total, count) in state["sums"].items()}
