"""A loader in processes of its own, so that training shares its interpreter with no thread that decodes."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from milan_pipe.errors import MilanError, SettingError, StoreError, one_line
from milan_pipe.loader.order import BatchPlan, Block
from milan_pipe.loader.stream import Batch, DrawNoise, Loader, joined, read_batch
from milan_pipe.spawning import script_unseen, without_signals
from milan_pipe.targets.several import SeveralStores

_PREFETCH = 2
_SHARED = Path("/dev/shm")  # where Linux keeps what processes share


@dataclass(frozen=True)
class _Answer:
    """A part of a batch, or why there is none: the loader would wrap what is raised into its own text and traceback."""

    part: Batch | None
    error: MilanError | None = None


@dataclass(frozen=True, kw_only=True)
class _Parts(IterableDataset[_Answer]):
    """What each process makes: its part of every batch, as if it were a rank."""

    reader: SeveralStores
    plan: BatchPlan
    threads: int
    with_targets: bool
    draw_noise: DrawNoise | None
    epochs: tuple[int, int, int | None]

    def __iter__(self) -> Iterator[_Answer]:
        worker: Any = get_worker_info()
        plan, count = self.plan, worker.num_workers
        try:
            with Loader(
                self.reader,
                plan.of_rank(plan.rank * count + worker.id, plan.ranks * count),
                threads=self.threads,
                with_targets=self.with_targets,
                draw_noise=self.draw_noise,
            ) as loader:
                for part in loader.batches(*self.epochs):
                    yield _Answer(part)
        except MilanError as error:
            yield _Answer(None, error)


class WorkerLoader:
    """As `Loader`, in `workers` processes: each reads and decodes its part of every batch.

    Batches come to this process through shared memory; it only puts their parts together. Every process reads the
    streams that its part is of, so there should be as many `canonical_streams` as processes of all ranks.

    Args:
        draw_noise: is pickled.
        threads: of each process.

    Raises:
        SettingError: a batch has fewer samples than there are processes, or shared memory does not hold three batches.
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
        self._parts = _Parts(
            reader=reader,
            plan=plan,
            threads=threads,
            with_targets=with_targets,
            draw_noise=draw_noise,
            epochs=(0, 0, None),
        )
        self._require_shared_memory()

    def __enter__(self) -> WorkerLoader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, epoch: int, skip: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """As `Loader.batches`.

        Raises:
            DataError: the store is damaged.
            StoreError: a process ended by itself.
        """
        loader: DataLoader[_Answer] = DataLoader(
            replace(self._parts, epochs=(epoch, skip, stop)),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH,
            # A fork would have the parent's threads and CUDA in a state that cannot be used.
            multiprocessing_context="spawn",
        )
        before = set(multiprocessing.active_children())
        # This process answers to a signal, which may come while they start, and has them end.
        with script_unseen(), without_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            answers: Any = iter(loader)
        started = set(multiprocessing.active_children()) - before
        try:
            while len(parts := list(self._next(answers))) == self._workers:
                yield joined(parts, pin=self._pin)
        finally:
            answers._shutdown_workers()
            # One that reads from far away may not have ended in time.
            for process in started:
                with suppress(ValueError):
                    process.kill()

    def _next(self, answers: Iterator[_Answer]) -> Iterator[Batch]:
        """The parts of the next batch, none after the last."""
        for _ in range(self._workers):
            try:
                answer = next(answers, None)
            except RuntimeError as error:
                raise StoreError(
                    f"a process of pretrain.workers={self._workers} ended by itself: {one_line(error)}. The system may "
                    "have killed it for its memory; try fewer, or pretrain.workers=0"
                ) from error
            if answer is None:
                return
            if answer.error is not None:
                raise answer.error
            assert answer.part is not None
            yield answer.part

    def _require_shared_memory(self) -> None:
        """Refuse what would end a process by a bus error, without a word."""
        if not _SHARED.is_dir():
            return
        sample = read_batch(self._parts.reader, Block(0, 0, 0, 1))
        # One batch that is put together, and what is prefetched.
        needed = (1 + _PREFETCH) * self._parts.plan.batch_size // self._parts.plan.ranks * sample.bytes
        free = shutil.disk_usage(_SHARED).free
        if free < needed:
            raise SettingError(
                f"pretrain.workers={self._workers} needs {needed / 2**20:.0f} MiB of shared memory, {_SHARED} has "
                f"{free / 2**20:.0f} MiB free; give the container more (--shm-size), or set pretrain.workers=0"
            )
