"""When a run's state is saved, and how it is taken over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milan_pipe.errors import DataError
from milan_pipe.training.checkpoint import Checkpoint, checkpoint_path, keep_last, save_checkpoint
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.resume import describe_last_checkpoint
from milan_pipe.training.state import first_not_finite, gathered, load_optimiser, optimiser_tensors


@dataclass(frozen=True, kw_only=True)
class SavePolicy:
    """Steps and minutes between two checkpoints, None for never, and how many of them stay."""

    every: int | None
    minutes: float | None
    keep: int


class Saver:
    """Writes checkpoints when they are due, and when the run is asked to stop.

    Args:
        modules: what a checkpoint holds, by the names of its files.
        trained: the module that holds all that the optimiser trains.
        record: kept in every checkpoint.
        advice: what to do about a weight that is not finite.
    """

    def __init__(
        self,
        run: Path,
        modules: Mapping[str, nn.Module],
        trained: nn.Module,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        policy: SavePolicy,
        ranks: Ranks,
        record: Mapping[str, Any],
        advice: str,
    ) -> None:
        self._run = run
        self._modules = modules
        self._trained = trained
        self._optimiser = optimiser
        self._scaler = scaler
        self._policy = policy
        self._ranks = ranks
        self._record = record
        self._advice = advice
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        every, minutes = self._policy.every, self._policy.minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def save(self, step: int, state: Mapping[str, Any], *, finished: bool) -> Path:
        """Write the checkpoint of a step and remove those that are too many. Every rank calls it, the first one writes.

        Args:
            state: JSON data of this step, beside the record of the run.

        Raises:
            DataError: a weight is not finite.
            StoreError: it cannot be written.
        """
        parts = self.weights()
        if not finished:
            tensors = optimiser_tensors(self._trained, self._optimiser)
            parts["optimizer"] = gathered(tensors, keep=self._ranks.first)
        if self._ranks.first:
            for name, tensors in parts.items():
                broken = first_not_finite(tensors)
                if broken is not None:
                    raise DataError(
                        f"after step {step} {broken!r} of the {name} is not finite; {self._advice}. "
                        f"{describe_last_checkpoint(self._run)}"
                    )
            record = {**self._record, **state, "finished": finished, "scaler": self._scaler.state_dict()}
            save_checkpoint(self._run, step, parts, record)
            keep_last(self._run, self._policy.keep)
        self._ranks.barrier()
        self._saved_at = time.monotonic()
        return checkpoint_path(self._run, step)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of the modules, whole and on the CPU, on the first rank; every rank must call it."""
        return {name: gathered(module.state_dict(), keep=self._ranks.first) for name, module in self._modules.items()}

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take the optimiser's state over; returns the steps that were done."""
        load_optimiser(self._trained, self._optimiser, checkpoint.weights("optimizer"), str(checkpoint.path))
        if checkpoint.record["scaler"]:
            self._scaler.load_state_dict(dict(checkpoint.record["scaler"]))
        return int(checkpoint.record["step"])
