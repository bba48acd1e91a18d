"""The smallest task: one number, whose gradient is the batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milan_pipe.config.training import RunSettings
from milan_pipe.training.task import Task


@dataclass(frozen=True)
class Number:
    value: float
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Number:
        del device
        return self


class Weight(nn.Module):
    """Loss w x (batch + epoch); `seen` counts batches, as the running statistics of a norm do."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Number, epoch: int) -> Tensor:
        self.seen += 1
        return self.w * (batch.value + epoch)


class NumberTask(Task[Number]):
    """Batches 1, 2, 3, ... at the rates 1, 10, 100, ... of plain gradient descent."""

    name, section = "numbers", "numbers"
    advice = "take smaller numbers"

    def __init__(self, *, steps: int = 3, steps_per_epoch: int = 2, scores: Sequence[float] = (), **settings: Any):
        defaults = {"precision": "float32", "log_every": 1, "checkpoint_minutes": None, "device": "cpu"}
        self.settings = RunSettings(**{**defaults, **settings})
        self.steps, self.steps_per_epoch, self.batch_size = steps, steps_per_epoch, 1
        self.configuration = {"steps": steps}
        self.record = {"kind": "number"}
        self.model = self.objective = self.weight = Weight()
        self.modules = {"model": self.model}
        self.main_score = "top1" if scores else None
        self.calls: list[tuple[Any, ...]] = []
        self._scores = scores
        self._step = 0

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=99.0, momentum=0.0)

    def lr(self, step: int) -> float:
        return 10.0**step

    def batches(self, first_step: int) -> Generator[Number]:
        try:
            for number in range(first_step, self.steps):
                yield Number(number + 1.0, (f"key-{number + 1}",))
        finally:
            self.calls.append(("closed",))

    def parts(self, batch: Number) -> Sequence[tuple[Number, float]]:
        return [(batch, 1.0)]

    def before_step(self, step: int) -> None:
        self.calls.append(("before", step))

    def after_step(self, step: int) -> Path | None:
        self._step = step
        self.calls.append(("after", step, self.weight.w.item()))
        return None

    def due(self, step: int) -> bool:
        del step
        return True

    def evaluate(self, *, last: bool) -> dict[str, float]:
        self.calls.append(("evaluate", last, self.model.training))
        return {"top1": self._scores[self._step - 1]}


class AdamTask(NumberTask):
    """The same with AdamW, which has a state."""

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), fused=True)

    def lr(self, step: int) -> float:
        return 0.1 / (step + 1)
