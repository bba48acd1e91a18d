"""When a run's state is saved, and how it is taken over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milan_pipe.errors import DataError
from milan_pipe.pretraining.settings import PretrainConfig
from milan_pipe.student.model import MaskedStudent
from milan_pipe.student.weights import load_weights
from milan_pipe.training.checkpoint import Checkpoint, checkpoint_path, keep_last, save_checkpoint
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.resume import tell_last_checkpoint
from milan_pipe.training.state import first_not_finite, gathered, load_optimiser, optimiser_tensors


class Saver:
    """Writes checkpoints when they are due, and when the run is told to stop."""

    def __init__(
        self,
        run: Path,
        model: MaskedStudent,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: PretrainConfig,
        ranks: Ranks,
        record: Mapping[str, Any],
    ) -> None:
        self._run = run
        self._model = model
        self._optimiser = optimiser
        self._scaler = scaler
        self._config = config
        self._ranks = ranks
        self._record = record
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        every, minutes = self._config.checkpoint_every, self._config.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def save(self, step: int, losses: Mapping[str, Any], *, finished: bool) -> Path:
        """Write the checkpoint of a step and remove those that are too many. Every rank calls it, the first one writes.

        Raises:
            DataError: a weight is not finite.
            StoreError: it cannot be written.
        """
        parts = self.weights()
        if not finished:
            state = optimiser_tensors(self._model, self._optimiser)
            parts["optimizer"] = gathered(state, keep=self._ranks.first)
        if self._ranks.first:
            for name, tensors in parts.items():
                broken = first_not_finite(tensors)
                if broken is not None:
                    raise DataError(
                        f"after step {step} {broken!r} of the {name} is not finite; lower pretrain.lr, or check the "
                        f"targets. {tell_last_checkpoint(self._run)}"
                    )
            record = {**self._record, "finished": finished, "losses": losses, "scaler": self._scaler.state_dict()}
            save_checkpoint(self._run, step, parts, record)
            keep_last(self._run, self._config.keep_checkpoints)
        self._ranks.wait()
        self._saved_at = time.monotonic()
        return checkpoint_path(self._run, step)

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """Student and decoder, whole and on the CPU, on the first rank; every rank must call it."""
        return {
            "student": gathered(self._model.encoder.state_dict(), keep=self._ranks.first),
            "decoder": gathered(self._model.decoder.state_dict(), keep=self._ranks.first),
        }

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take the optimiser's state over; returns the steps that were done."""
        load_optimiser(self._model, self._optimiser, checkpoint.weights("optimizer"), str(checkpoint.path))
        if checkpoint.record["scaler"]:
            self._scaler.load_state_dict(dict(checkpoint.record["scaler"]))
        return int(checkpoint.record["step"])


def restore_weights(model: MaskedStudent, checkpoint: Checkpoint) -> None:
    """Take the weights over, into a model that is not sharded yet."""
    where = str(checkpoint.path)
    load_weights(model.encoder, checkpoint.weights("student"), where)
    load_weights(model.decoder, checkpoint.weights("decoder"), where)
