"""Batches on their way to the training device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from milan_pipe.devices import SideStream
from milan_pipe.training.task import B


def on_device(batches: Iterable[B], device: torch.device) -> Iterator[B]:
    """The batches on a device; to a CUDA device the next one is copied while one is used.

    Whoever takes them may use each until it has taken two more.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies, ahead = SideStream(device), None
    for batch in batches:
        current = torch.cuda.current_stream(device)
        with copies.beside() as queue:
            # What is copied may lie where an earlier batch did: the steps that read that one have all been begun.
            queue.wait_stream(current)
            moved = batch.to(device)
            ready = queue.record_event()
        if ahead is not None:
            current.wait_event(ahead[1])
            yield ahead[0]
        ahead = moved, ready
    if ahead is not None:
        torch.cuda.current_stream(device).wait_event(ahead[1])
        yield ahead[0]
