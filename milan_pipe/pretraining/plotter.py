"""Every few epochs, the same few samples: what the student saw of them and how well it predicted each patch."""

from __future__ import annotations

from pathlib import Path

import torch

from milan_pipe.drawing.sheet import draw_sheet, mask_sheet
from milan_pipe.loader.order import Block
from milan_pipe.loader.stream import Batch, read_batch
from milan_pipe.pretraining.objective import Objective
from milan_pipe.storage.local import write_file
from milan_pipe.targets.schema import TargetReader

_SAMPLES = 8


class PredictionPlotter:
    """Draws RUN/images/epoch-NNNN.png.

    Args:
        draws: False only computes, for ranks that hold shards of the student and do not write.
    """

    def __init__(self, run: Path, reader: TargetReader, objective: Objective, every: int, draws: bool) -> None:
        self._run = run
        self._objective = objective
        self._every = every
        self._draws = draws
        shard = reader.shards[0]
        self._grid = reader.header.teacher.grid
        self._batch: Batch = read_batch(reader, Block(0, 0, 0, min(_SAMPLES, reader.samples(shard))))

    def after_epoch(self, epoch: int) -> Path | None:
        """Draw the image of an epoch, counted from 0, if it is due; returns its file.

        Raises:
            StoreError: it cannot be written.
        """
        if (epoch + 1) % self._every:
            return None
        split, cosine_BL = self._objective.cosine(self._batch, epoch)
        if not self._draws:
            return None
        visible_BL = torch.zeros(cosine_BL.shape, dtype=torch.bool)
        visible_BL.scatter_(1, split.keep_BV.cpu(), True)
        file = self._run / "predictions" / f"epoch-{epoch + 1:04d}.png"
        sheet = mask_sheet(
            f"after epoch {epoch + 1}",
            self._batch.keys,
            self._batch.pixels_BHWC.numpy(),
            visible_BL.numpy(),
            cosine_BL.float().cpu().numpy(),
            self._grid,
        )
        write_file(file, draw_sheet(sheet))
        return file
