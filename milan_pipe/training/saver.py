"""When a run's state is saved, and how it is restored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milan_pipe import __version__
from milan_pipe.errors import DataError
from milan_pipe.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    describe_last_checkpoint,
    keep_last,
    keep_steps,
    save_checkpoint,
)
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.state import first_not_finite, gathered, load_optimiser, optimiser_tensors
from milan_pipe.training.task import Task

BEST = "best"


class Saver:
    """Writes checkpoints, and RUN/best, which holds the best one. Every rank calls it, the first one writes."""

    def __init__(
        self, run: Path, task: Task[Any], optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, ranks: Ranks
    ) -> None:
        self._run, self._task, self._optimiser, self._scaler, self._ranks = run, task, optimiser, scaler, ranks
        self._saved_at = time.monotonic()
        # The step of the best one that the last checkpoint of the run names.
        self._best: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        every, minutes = self._task.settings.checkpoint_every, self._task.settings.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def save(self, step: int, state: Mapping[str, Any], *, finished: bool) -> Path:
        """Write the checkpoint of a step with JSON data, and remove the oldest ones; a finished run's has no optimiser.

        Raises:
            DataError: a weight is not finite.
            StoreError: it cannot be written.
        """
        parts = self.weights()
        if not finished:
            tensors = optimiser_tensors(self._task.model, self._optimiser)
            parts["optimizer"] = gathered(tensors, keep=self._ranks.first)
        record = {**state, "finished": finished, "scaler": self._scaler.state_dict()}
        self._write(self._run, step, parts, record)
        if self._ranks.first:
            keep_last(self._run, self._task.settings.keep_checkpoints)
        self._keep_named_best(state)
        self._saved_at = time.monotonic()
        return checkpoint_path(self._run, step)

    def save_best(self, step: int, scores: Mapping[str, float]) -> None:
        """Write the checkpoint in RUN/best; errors as `save`.

        The one before stays until a checkpoint of the run names this one: a run that goes on from an earlier step need
        not come to the same scores.
        """
        self._write(self._run / BEST, step, self.weights(), {"finished": True, "scores": scores})
        if self._ranks.first:
            keep_steps(self._run / BEST, {self._best, step})

    def _keep_named_best(self, state: Mapping[str, Any]) -> None:
        self._best = state.get("best_step")
        if self._ranks.first and self._best is not None:
            keep_steps(self._run / BEST, {self._best})

    def _write(
        self, folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]
    ) -> None:
        task = self._task
        if self._ranks.first:
            for name, tensors in parts.items():
                broken = first_not_finite(tensors)
                if broken is not None:
                    raise DataError(
                        f"after step {step} {broken!r} of the {name} is not finite; {task.advice}. "
                        f"{describe_last_checkpoint(self._run)}"
                    )
            fixed = {"package_version": __version__, "configuration": task.configuration, **task.record}
            command = {} if task.name is None else {"task": task.name}
            save_checkpoint(folder, step, parts, {**fixed, **command, **record})
        self._ranks.barrier()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors on the CPU, by module, on the first rank; every rank must call it."""
        modules = self._task.modules
        return {name: gathered(module.state_dict(), keep=self._ranks.first) for name, module in modules.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint's optimiser and loss scale, with the best one that it names."""
        self._keep_named_best(checkpoint.record)
        load_optimiser(self._task.model, self._optimiser, checkpoint.weights("optimizer"), str(checkpoint.path))
        if checkpoint.record["scaler"]:
            self._scaler.load_state_dict(dict(checkpoint.record["scaler"]))
