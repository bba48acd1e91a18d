"""A loader in processes of its own, so that training shares its interpreter with no thread that decodes."""

from __future__ import annotations

import multiprocessing.connection
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from milan_pipe.config.teachers import Importance
from milan_pipe.errors import MilanError, SettingError
from milan_pipe.loader.order import BatchPlan, Block
from milan_pipe.loader.stream import Batch, DrawNoise, Loader, ahead_of, empty_batch, read_run
from milan_pipe.lost_processes import lost_where_asked, next_answer
from milan_pipe.spawning import end_with, script_unseen, without_signals
from milan_pipe.storage import Location
from milan_pipe.targets.several import SeveralStores, open_several

_PREFETCH, _END_SECONDS = 2, 5
_SHARED = Path("/dev/shm")  # noqa: S108  # where Linux keeps what processes share


@dataclass(frozen=True)
class _Answer:
    """Keys of a part of a batch, or why there is none: the loader would wrap what is raised into its own traceback."""

    keys: tuple[str, ...]
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class _Parts(IterableDataset[_Answer]):
    """What each process makes: its part of every batch, as if it were a rank, in memory that all of them share.

    Attributes:
        stores: each process opens them anew.
        parent: process that takes the batches.
        slots: memory of some batches, (slots, B, ...); a batch lies in the one of its number, counted in turn.
    """

    stores: tuple[Location, ...]
    importance: Importance
    plan: BatchPlan
    threads: int
    with_targets: bool
    draw_noise: DrawNoise | None
    parent: int
    slots: Batch
    epochs: tuple[int, int, int | None] = (0, 0, None)

    def __iter__(self) -> Iterator[_Answer]:
        # Torch looks for it between two parts, and not while the pipe to it is full.
        end_with(self.parent)
        worker: Any = get_worker_info()
        first = self.plan.batch_size * self.plan.rank // self.plan.ranks
        plan = _part_of(self.plan, worker.id, worker.num_workers)
        start, stop = (plan.batch_size * (plan.rank + more) // plan.ranks - first for more in (0, 1))
        try:
            with Loader(
                open_several([location.address for location in self.stores], self.importance),
                plan,
                threads=self.threads,
                with_targets=self.with_targets,
                draw_noise=self.draw_noise,
                memory=lambda number: self.slot(number).rows(start, stop),
            ) as loader:
                for part in loader.batches(*self.epochs):
                    yield _Answer(part.keys)
        except Exception as error:  # any: it is raised where batches are taken
            if not isinstance(error, MilanError):
                error.add_note(traceback.format_exc())
            yield _Answer((), error)

    def slot(self, number: int) -> Batch:
        """The memory of a batch."""
        return replace(self.slots, **self.slots.each(lambda values: values[number % len(values)]))


def _part_of(plan: BatchPlan, worker: int, workers: int) -> BatchPlan:
    return plan.of_rank(plan.rank * workers + worker, plan.ranks * workers)


class WorkerLoader:
    """As `Loader`, in `workers` processes: each reads and decodes its part of every batch.

    They write to memory that they share with this process, which copies each batch as a whole. Every process reads the
    streams that its part is of, so there should be as many `canonical_streams` as processes of all ranks. One iterator
    of batches at a time.

    Args:
        draw_noise: is pickled.
        threads: of each process.

    Raises:
        SettingError: a batch has fewer samples than there are processes, or shared memory is too small.
        DataError: the store is damaged.
    """

    def __init__(
        self,
        reader: SeveralStores,
        plan: BatchPlan,
        *,
        workers: int,
        threads: int,
        with_targets: bool,
        draw_noise: DrawNoise | None = None,
        pin: bool = False,
    ) -> None:
        if plan.ranks * workers > plan.batch_size:
            raise SettingError(
                f"pretrain.batch_size is {plan.batch_size} for {plan.ranks} ranks of {workers} worker processes each; "
                "every process needs a sample of each batch: lower pretrain.workers"
            )
        self._workers, self._pin = workers, pin
        ahead = max(ahead_of(_part_of(plan, worker, workers), threads) for worker in range(workers))
        # What is prefetched, what each process has begun beyond, what is copied, and the next that it may begin.
        count = _PREFETCH + ahead + 2
        rows = plan.batch_size * (plan.rank + 1) // plan.ranks - plan.batch_size * plan.rank // plan.ranks
        run = read_run(reader, Block(0, 0, 0, 1))
        batch = empty_batch(run, rows, reader, with_targets=with_targets, noise=draw_noise is not None)
        _require_shared_memory(count * batch.bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), workers)
        self._parts = _Parts(
            stores=tuple(store.location for store in reader.stores),
            importance=reader.importance,
            plan=plan,
            threads=threads,
            with_targets=with_targets,
            draw_noise=draw_noise,
            parent=os.getpid(),
            slots=replace(batch, **batch.each(lambda values: _shared(values, count))),
        )

    def __enter__(self) -> WorkerLoader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, epoch: int, skip: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """As `Loader.batches`; its processes end with it.

        Raises:
            DataError: the store is damaged.
            ProcessLostError: a process ended by itself.
        """
        loader: DataLoader[_Answer] = DataLoader(
            replace(self._parts, epochs=(epoch, skip, stop)),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH,
            # A fork would have the parent's threads and CUDA in a state that cannot be used.
            multiprocessing_context="spawn",
            # Else it draws from this process's own numbers.
            generator=torch.Generator(),
        )
        # This process answers to a signal, which may come while they start, and has them end.
        with script_unseen(), without_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            answers: Any = iter(loader)
        lost_where_asked(answers)
        # One that reads from far away may not end in time.
        last = threading.Timer(_END_SECONDS, lambda: [process.kill() for process in answers._workers])
        over = threading.Event()
        threading.Thread(target=_give_up_with_one, args=(answers, over), daemon=True).start()
        try:
            number = 0
            while len(keys := list(self._next(answers))) == self._workers:
                slot = self._parts.slot(number)
                yield replace(slot, keys=tuple(key for part in keys for key in part), **slot.each(self._copy))
                number += 1
        finally:
            over.set()
            last.start()
            answers._shutdown_workers()
            last.cancel()

    def _next(self, answers: Iterator[_Answer]) -> Iterator[tuple[str, ...]]:
        """Keys of the parts of the next batch, none after the last."""
        for _ in range(self._workers):
            answer = next_answer(answers, "pretrain.workers", self._workers)
            if answer is None:
                return
            if answer.error is not None:
                raise answer.error
            yield answer.keys

    def _copy(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=self._pin).copy_(values)


def _give_up_with_one(answers: Any, over: threading.Event) -> None:
    """End all processes with the first that was killed, and what waits for them.

    It may have written half of an answer; as long as another could write the rest, the reader would wait for it.
    """
    left = {process.sentinel: number for number, process in enumerate(answers._workers)}
    while left and not over.is_set():
        ended = [left.pop(sentinel) for sentinel in multiprocessing.connection.wait(list(left), timeout=1)]
        # One that is through is told to end, and no longer counted before.
        if any(answers._workers_status[number] for number in ended) and not over.is_set():
            for process in answers._workers:
                process.kill()
            answers._worker_result_queue._writer.close()
            return


def _shared(values: Tensor, count: int) -> Tensor:
    shared: Tensor = values.new_empty((count, *values.shape)).share_memory_()  # type: ignore[no-untyped-call]
    return shared


def _require_shared_memory(needed: int, workers: int) -> None:
    """Refuse what would end a process by a bus error, without a word."""
    free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else needed
    if free < needed:
        raise SettingError(
            f"pretrain.workers={workers} needs {needed / 2**20:.0f} MiB of shared memory, {_SHARED} has "
            f"{free / 2**20:.0f} MiB free; give the container more (--shm-size), or set pretrain.workers=0"
        )
