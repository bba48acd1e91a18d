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
from milan_pipe.training.checkpoint import Checkpoint, keep_last, save_checkpoint
from milan_pipe.training.state import first_not_finite, load_optimiser, optimiser_tensors


class Saver:
    """Writes checkpoints when they are due, and when the run is told to stop."""

    def __init__(
        self,
        run: Path,
        model: MaskedStudent,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: PretrainConfig,
    ) -> None:
        self._run = run
        self._model = model
        self._optimiser = optimiser
        self._scaler = scaler
        self._config = config
        self._saved_at = time.monotonic()
        self.path: Path | None = None
        self.record: dict[str, Any] = {}

    def told(self) -> str:
        """What to say of the last checkpoint when a run ends early."""
        if self.path is None:
            return "No checkpoint was written"
        return f"The last good checkpoint is {self.path}"

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        every, minutes = self._config.checkpoint_every, self._config.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def save(self, step: int, losses: Mapping[str, Any], *, finished: bool) -> Path:
        """Write the checkpoint of a step and remove those that are too many.

        Raises:
            DataError: a weight is not finite.
            StoreError: it cannot be written.
        """
        broken = first_not_finite(self._model)
        if broken is not None:
            raise DataError(
                f"after step {step} the weights {broken!r} are not finite; lower pretrain.lr, or check the targets. "
                f"{self.told()}"
            )
        parts: dict[str, Mapping[str, Tensor]] = {
            "student": self._model.encoder.state_dict(),
            "decoder": self._model.decoder.state_dict(),
        }
        if not finished:
            parts["optimizer"] = optimiser_tensors(self._model, self._optimiser)
        record = {**self.record, "finished": finished, "losses": losses, "scaler": self._scaler.state_dict()}
        self.path = save_checkpoint(self._run, step, parts, record)
        keep_last(self._run, self._config.keep_checkpoints)
        self._saved_at = time.monotonic()
        return self.path

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take weights and optimiser over; returns the steps that were done."""
        where = str(checkpoint.path)
        load_weights(self._model.encoder, checkpoint.weights("student"), where)
        load_weights(self._model.decoder, checkpoint.weights("decoder"), where)
        load_optimiser(self._model, self._optimiser, checkpoint.weights("optimizer"), where)
        if checkpoint.record["scaler"]:
            self._scaler.load_state_dict(dict(checkpoint.record["scaler"]))
        self.path = checkpoint.path
        return int(checkpoint.record["step"])
