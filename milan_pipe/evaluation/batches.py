"""Images to batches: decoded and augmented in processes, in an order that is arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from milan_pipe.errors import DataError, LabelError, MilanError, StoreError, one_line, printable_json, system_reason
from milan_pipe.lost_processes import lost_where_asked, next_answer
from milan_pipe.random_bits import permutation
from milan_pipe.storage.local import open_own, read_whole

T = TypeVar("T")
B = TypeVar("B")
_TRIES = 16
_LINE = b'{"key": '


@dataclass(frozen=True)
class SampleRequest:
    """One sample of a training epoch; of an evaluation, `epoch` is -1."""

    epoch: int
    number: int


@dataclass(frozen=True)
class Batch(Generic[B]):
    """Collated samples, and the keys of those that are in it."""

    value: B
    keys: tuple[str, ...]

    def pin_memory(self) -> Batch[B]:
        """Called by the loader: tensors in pinned memory, from which copies to a CUDA device do not wait."""
        if not isinstance(self.value, tuple):
            return self
        pinned: Any = tuple(torch.as_tensor(each).pin_memory() for each in self.value)
        return Batch(pinned, self.keys)


@dataclass(frozen=True)
class _Answer(Generic[B]):
    """What a worker makes of a list of requests: a batch, if any image can be read, and key and reason of bad ones."""

    batch: Batch[B] | None
    bad: Sequence[tuple[str, str]]
    # A value: the loader would wrap what is raised into its own text and traceback.
    error: MilanError | None = None

    def pin_memory(self) -> _Answer[B]:
        return replace(self, batch=None if self.batch is None else self.batch.pin_memory())


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Which images each step takes: every epoch all `number_N` in another order, the last incomplete batch left out.

    A rank takes its contiguous share of `batch_size`; with `mirrored` its share of either half, so that it has both of
    the images that lie alike from the two ends of the batch.
    """

    number_N: NDArray[np.int64]
    batch_size: int
    seed: int
    rank: int
    ranks: int
    mirrored: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self.number_N) // self.batch_size

    @property
    def share(self) -> NDArray[np.int64]:
        """Positions of this rank's images in a batch."""
        size = self.batch_size // 2 if self.mirrored else self.batch_size
        mine = np.arange(self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks)
        return np.concatenate([mine, self.batch_size - 1 - mine[::-1]]) if self.mirrored else mine

    def batches(self, first_step: int, steps: int) -> Iterator[list[SampleRequest]]:
        """Requests of this rank in steps `first_step` to `steps` - 1."""
        for step in range(first_step, steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == first_step or place == 0:
                order_N = self.number_N[permutation(len(self.number_N), self.seed, epoch)]
            batch = order_N[place * self.batch_size + self.share]
            yield [SampleRequest(epoch, int(number)) for number in batch]


@dataclass(frozen=True)
class _Batches(Dataset[Any], Generic[T, B]):
    take: Callable[[SampleRequest], T]
    collate: Callable[[list[T]], B]
    image_keys: Sequence[str]

    def __getitem__(self, requests: list[SampleRequest]) -> _Answer[B]:
        bad: list[tuple[str, str]] = []
        try:
            read = [sample for request in requests for sample in self._read(request, bad)]
        except MilanError as error:
            return _Answer(None, bad, error)
        keys = tuple(key for key, _ in read)
        return _Answer(Batch(self.collate([value for _, value in read]), keys) if read else None, bad)

    def _read(self, request: SampleRequest, bad: list[tuple[str, str]]) -> Iterator[tuple[str, T]]:
        """Key and sample of the first image that can be read; in evaluation of this one, if it can."""
        training = request.epoch >= 0
        for offset in range(_TRIES if training else 1):
            number = (request.number + offset) % len(self.image_keys)
            try:
                yield self.image_keys[number], self.take(SampleRequest(request.epoch, number))
                return
            except LabelError:
                raise
            except DataError as error:
                bad.append((self.image_keys[number], str(error)))
        if training:
            key, reason = bad[-_TRIES]
            raise DataError(f"{_TRIES} images in a row cannot be read, the first is {key!r}: {reason}")


def _listed(file: Path) -> set[str]:
    try:
        with open(file, "rb", buffering=0, opener=open_own) as opened:
            data = read_whole(opened)
        whole = data.rfind(b"\n") + 1
        keys = {str(json.loads(line)["key"]) for line in data[:whole].decode().split("\n") if line}
        # A full disk, or a lost power supply, cuts the last line: that image is listed anew when it comes again.
        if rest := data[whole:]:
            if not rest.startswith(_LINE[: len(rest)]):
                raise ValueError(f"found {rest[:20]!r}")
            with open(file, "r+b", opener=open_own) as opened:
                opened.truncate(whole)
        return keys
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {system_reason(error)}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({one_line(error)}); remove it, and the run lists them anew") from error


class BadImages:
    """Images that cannot be read, each once; too many of them end the run.

    Args:
        file: gets a line for each key that it does not have yet; None, as on all ranks but the first, writes nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._written = _listed(file) if file is not None else set()
        self._images, self._most = 0, float("inf")
        self.keys: dict[str, str] = {}

    def limit(self, readable: int, max_fraction: float) -> None:
        """Say how many images were listed; from then on more than `max_fraction` of them bad is a DataError."""
        self._images = readable + len(self.keys)
        self._most = max_fraction * self._images
        self._check()

    def add(self, key: str, reason: str) -> None:
        """Count an image; raises DataError where they are too many."""
        if key in self.keys:
            return
        self.keys[key] = reason
        if self._file is not None and key not in self._written:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._file, "a", encoding="utf-8", opener=open_own) as opened:
                    opened.write(printable_json({"key": key, "reason": reason}) + "\n")
            except OSError as error:
                raise StoreError(f"{self._file} cannot be written: {system_reason(error)}") from error
        self._check()

    def _check(self) -> None:
        if len(self.keys) > self._most:
            key, reason = next(reversed(self.keys.items()))
            raise DataError(
                f"{len(self.keys)} of {self._images} images cannot be read, the last is {key!r}: {reason}; repair "
                "them, or raise max_bad_fraction"
            )


def load_batches(
    take: Callable[[SampleRequest], T],
    collate: Callable[[list[T]], B],
    keys: Sequence[str],
    batches: Iterator[list[SampleRequest]],
    *,
    workers: int,
    setting: str,
    bad: BadImages,
    pin: bool = False,
) -> Iterator[Batch[B]]:
    """The batches, in order, read ahead by processes: two for each worker and one that is pinned are in memory.

    In training an image that cannot be read is replaced by the next one that can; in evaluation it is left out, and an
    empty batch as well.

    Args:
        take: makes a sample; runs in a worker process, and may raise DataError.
        collate: makes one value of the samples, in the worker too. It should hold few tensors: each takes a file
            descriptor of both processes as long as it lives.
        keys: of all images, by number.
        workers: processes; 0 makes the batches here, one at a time.
        setting: what says how many, for the message.
        pin: hand out pinned memory.

    Raises:
        DataError: too many images cannot be read.
        ProcessLostError: a worker ended by itself.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(take, collate, keys),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
    )
    answers = iter(loader)
    if workers:
        lost_where_asked(answers)
    while (answer := next_answer(answers, setting, workers)) is not None:
        for key, reason in answer.bad:
            bad.add(key, reason)
        if answer.error is not None:
            raise answer.error
        if answer.batch is not None:
            yield answer.batch


def in_turn(count: int, batch_size: int, rank: int, ranks: int) -> Iterator[list[SampleRequest]]:
    """Numbers 0 to `count` - 1 for an evaluation: a rank takes every `ranks`-th."""
    mine = range(rank, count, ranks)
    for start in range(0, len(mine), batch_size):
        yield [SampleRequest(-1, number) for number in mine[start : start + batch_size]]


def share_of_classes(label_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Numbers of a share of each class, one image at least, rising; 1.0 is all of them."""
    if fraction == 1.0:
        return np.arange(len(label_N))
    order_N = permutation(len(label_N), seed, "fraction")
    kept: list[NDArray[np.int64]] = []
    for label in np.unique(label_N):
        of_class = order_N[label_N[order_N] == label]
        kept.append(of_class[: max(1, round(fraction * len(of_class)))])
    return np.sort(np.concatenate(kept))
