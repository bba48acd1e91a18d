"""Views through the teacher; a CUDA device gets the next batch before the output of the last one is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from milan_pipe.devices import SideStream
from milan_pipe.extraction.render import Clock
from milan_pipe.teacher.clip import Teacher, TeacherOutput


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A batch that the teacher is at work on; `began` and `ended` are events of a CUDA device."""

    output: TeacherOutput
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None


class Forward:
    """The teacher's forward passes on its device."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._device = teacher.mean.device
        self._copies, self._looks = SideStream(self._device), SideStream(self._device)

    def launch(self, views: Sequence[NDArray[np.uint8]], clock: Clock) -> Launched:
        """Begin with a batch of views, each (H, W, 3) uint8; on a CPU it is done when this returns."""
        cuda = self._device.type == "cuda"
        pixels_BHWC = torch.empty((len(views), *views[0].shape), dtype=torch.uint8, pin_memory=cuda)
        np.stack(views, out=pixels_BHWC.numpy())
        if not cuda:
            with clock.of("teacher"):
                return Launched(output=self._teacher(pixels_BHWC), began=None, ended=None)
        with self._copies.beside():
            pixels_BHWC = pixels_BHWC.to(self._device, non_blocking=True)
        self._copies.hand_over(pixels_BHWC)
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Who waits for it sleeps: processes that share a GPU need their processors for views.
        ended = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        # Not that of the current device, which may be another one.
        queue = torch.cuda.current_stream(self._device)
        began.record(queue)
        output = self._teacher(pixels_BHWC)
        ended.record(queue)
        return Launched(output=output, began=began, ended=ended)

    @contextmanager
    def looking_at(self, launched: Launched, clock: Clock) -> Iterator[TeacherOutput]:
        """The output; what waits for it inside does not wait for batches that were launched later."""
        output, began, ended = launched.output, launched.began, launched.ended
        if began is None or ended is None:
            yield output
            return
        ended.synchronize()
        with self._looks.beside() as queue:
            for tensor in (output.features_BST, output.importance_BL):
                tensor.record_stream(queue)
            yield output
        clock.add("teacher", began.elapsed_time(ended) / 1000)
