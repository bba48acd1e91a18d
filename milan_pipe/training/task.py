"""What a run learns, and what a run reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from milan_pipe.config.training import Parallel, RunSettings
from milan_pipe.errors import DataError


class TrainBatch(Protocol):
    """A batch, or this rank's part of it, that knows the keys of its samples."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    def to(self, device: torch.device) -> Self:
        """Itself on a device; from pinned memory without waiting."""


B = TypeVar("B", bound=TrainBatch)


class NotFiniteError(DataError):
    """A loss or gradient is not finite; `step` is the first such step, counted from 1."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The result of a run.

    Attributes:
        loss: mean over the last epoch.
        scores, best: of the last weights, and of the best step by the main score; empty without evaluation.
        images_per_second, data_wait, seconds: of the process that finished the run, without evaluation; `data_wait` is
            a share of the time.
        bad: images that could not be read.
        resumed_from, steps_now: step after which that process began, and its steps; 0 if the run was finished before.
    """

    steps: int
    loss: float
    images_per_second: float
    data_wait: float
    seconds: float
    checkpoint: str
    resumed_from: int
    steps_now: int
    epochs: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_checkpoint: str = ""
    bad: int = 0


class Task(ABC, Generic[B]):
    """What a run learns, on this rank.

    Attributes:
        name: of the command, kept in checkpoints; None for pretraining.
        section: of the settings.
        settings: where and how the run goes.
        configuration: JSON data, all that the weights depend on.
        record: JSON data that describes the weights.
        batch_size: over all ranks.
        steps, steps_per_epoch: the last epoch may have fewer.
        main_score: the best checkpoint has the highest; None: there is no evaluation.
        scores_in: group of the scores in the metrics.
        judged_on: JSON data of the images that are evaluated on, where a run may go on with others.
        advice: what to do about a loss that is not finite.

    After `build`:
        objective: a batch to its scalar loss, called as (part, epoch); holds `model`.
        model: what is trained and evaluated.
        modules: what a checkpoint holds, by file name.
    """

    name: str | None
    section: str
    settings: RunSettings
    configuration: Mapping[str, Any]
    record: Mapping[str, Any]
    batch_size: int
    steps: int
    steps_per_epoch: int
    main_score: str | None = None
    scores_in: str = "val"
    judged_on: Mapping[str, Any] = MappingProxyType({})
    advice: str
    parallel: Parallel = "ddp"

    objective: nn.Module
    model: nn.Module
    modules: Mapping[str, nn.Module]

    def build(self) -> None:
        """Make the model; a finished run never gets here."""

    @abstractmethod
    def optimiser(self) -> torch.optim.Optimizer:
        """Called after the model is sharded."""

    @abstractmethod
    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""

    @abstractmethod
    def batches(self, first_step: int) -> Generator[B]:
        """This rank's batches of all remaining steps, pinned for a CUDA device; closed when the run ends."""

    @abstractmethod
    def parts(self, batch: B) -> Sequence[tuple[Any, float]]:
        """What the objective takes of a batch that is on the device, in parts with their shares of it."""

    def units(self) -> Iterable[nn.Module]:
        """Parts of the model that FSDP gathers one at a time."""
        return ()

    def before_step(self, step: int) -> None:
        """Called with the number of steps done."""

    def after_step(self, step: int) -> Path | None:  # noqa: ARG002
        """Called on every rank with the number of steps done; returns a PNG for the sinks on the first rank."""
        return None

    def due(self, step: int) -> bool:  # noqa: ARG002
        """Whether to evaluate after this step; the last one always is."""
        return False

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Scores by name; called on every rank, the same on all. `last`: training is over."""
        raise NotImplementedError

    def plot(self, run: Path, step: int) -> Path | None:  # noqa: ARG002
        """Draw the last evaluation, on the first rank; returns the PNG."""
        return None

    def bad(self) -> int:
        """Images that could not be read so far, on this rank."""
        return 0

    def explain(self, error: NotFiniteError, weights: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> str:  # noqa: ARG002
        """More about a loss that is not finite; called on every rank. `weights` gathers those that met it."""
        return ""
