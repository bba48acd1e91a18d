"""Images to batches: which ones each step takes, decoded and augmented in processes, in an order that is arithmetic.

Shape suffixes are explained in `milan_pipe.evaluation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from milan_pipe.errors import DataError, LabelError, MilanError
from milan_pipe.images.tar import OnBad
from milan_pipe.random_bits import permutation

T = TypeVar("T")
B = TypeVar("B")
_TRIES = 16


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


@dataclass(frozen=True)
class _Answer(Generic[B]):
    """What a worker says to a list of requests: the batch, None where nothing is in it, and key and reason of bad ones.

    Errors are handed over as values: the loader would wrap what is raised into its own text and traceback.
    """

    batch: Batch[B] | None
    bad: tuple[tuple[str, str], ...]
    error: MilanError | None = None


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Which images each step takes: every epoch all of them in another order, the last incomplete batch left out.

    Attributes:
        number_N: the images that are trained on.
        batch_size: over all ranks; a rank takes its contiguous share.
    """

    number_N: NDArray[np.int64]
    batch_size: int
    seed: int
    rank: int
    ranks: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self.number_N) // self.batch_size

    @property
    def share(self) -> slice:
        """This rank's part of a batch."""
        return slice(self.rank * self.batch_size // self.ranks, (self.rank + 1) * self.batch_size // self.ranks)

    def batches(self, first_step: int, steps: int) -> Iterator[list[SampleRequest]]:
        """What this rank takes in steps `first_step` to `steps` - 1."""
        for step in range(first_step, steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == first_step or place == 0:
                order_N = self.number_N[permutation(len(self.number_N), self.seed, epoch)]
            batch = order_N[place * self.batch_size : (place + 1) * self.batch_size][self.share]
            yield [SampleRequest(epoch, int(number)) for number in batch]


class _Batches(Dataset[Any], Generic[T, B]):
    def __init__(
        self, take: Callable[[SampleRequest], T], collate: Callable[[list[T]], B], keys: Sequence[str]
    ) -> None:
        self._take = take
        self._collate = collate
        self._keys = keys

    def __getitem__(self, asked: list[SampleRequest]) -> _Answer[B]:
        bad: list[tuple[str, str]] = []
        try:
            read = [sample for request in asked for sample in self._read(request, bad)]
        except MilanError as error:
            return _Answer(None, tuple(bad), error)
        keys = tuple(key for key, _ in read)
        batch = Batch(self._collate([value for _, value in read]), keys) if read else None
        return _Answer(batch, tuple(bad))

    def _read(self, request: SampleRequest, bad: list[tuple[str, str]]) -> Iterator[tuple[str, T]]:
        """Key and sample of the first that can be read; none where that is allowed."""
        training = request.epoch >= 0
        for offset in range(_TRIES if training else 1):
            number = (request.number + offset) % len(self._keys)
            try:
                yield self._keys[number], self._take(SampleRequest(request.epoch, number))
                return
            except LabelError:
                raise
            except DataError as error:
                bad.append((self._keys[number], str(error)))
        if training:
            key, reason = bad[-_TRIES]
            raise DataError(f"{_TRIES} images in a row cannot be read, the first is {key!r}: {reason}")


class BadImages:
    """Images that cannot be read, each once; too many of them end the run.

    Args:
        on_bad: called with key and reason.
    """

    def __init__(self, images: int, max_fraction: float, on_bad: OnBad) -> None:
        self._most = max_fraction * images
        self._images = images
        self._on_bad = on_bad
        self.keys: set[str] = set()

    def add(self, key: str, reason: str) -> None:
        """Raises DataError where they are too many."""
        if key in self.keys:
            return
        self.keys.add(key)
        self._on_bad(key, reason)
        if len(self.keys) > self._most:
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
    bad: BadImages,
) -> Iterator[Batch[B]]:
    """The batches, in order, read ahead by processes.

    In training an image that cannot be read gives its place to the next one that can; in evaluation it is left out,
    and a batch without any as well.

    Args:
        take: makes a sample of what is asked for; runs in a worker process, and may raise DataError.
        collate: makes one value of the samples; runs there as well. Every torch tensor in it takes a file descriptor
            of both processes as long as it lives, so it has a few tensors, however many samples there are.
        keys: of all images, by number.
        workers: processes; 0 makes them here, when they are asked for.

    Raises:
        DataError: too many images cannot be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(take, collate, keys),
        sampler=_Listed(batches),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=False,
        prefetch_factor=4 if workers else None,
    )
    for answer in loader:
        for key, reason in answer.bad:
            bad.add(key, reason)
        if answer.error is not None:
            raise answer.error
        if answer.batch is not None:
            yield answer.batch


class _Listed(torch.utils.data.Sampler[list[SampleRequest]]):
    def __init__(self, batches: Iterator[list[SampleRequest]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        return self._batches


def _as_it_is(answer: Any) -> Any:
    return answer


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


def bad_file(run: Path) -> OnBad:
    """Adds a line to RUN/bad_samples.jsonl, once per key."""
    file = run / "bad_samples.jsonl"
    seen: set[str] = set()
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            seen.add(str(json.loads(line)["key"]))

    def add(key: str, reason: str) -> None:
        if key not in seen:
            seen.add(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")

    return add
