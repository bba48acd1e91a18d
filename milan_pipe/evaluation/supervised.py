"""Training on labelled images: what fine-tuning, the linear probe by protocol and segmentation have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from milan_pipe.config.command import record_of
from milan_pipe.config.evaluation import FinetuneSettings, LarsProbeSettings, SegmentSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.training import RESUMABLE
from milan_pipe.devices import autocast, resolve_precision
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.augment import kept_generators
from milan_pipe.evaluation.backbone import Backbone, backbone_of
from milan_pipe.evaluation.batches import BadImages, Batch, SampleRequest, StepPlan, in_turn, load_batches
from milan_pipe.images.labelled import LabelledImages, warn_if_images_shared
from milan_pipe.images.masked import MaskedImages
from milan_pipe.random_bits import seed_of
from milan_pipe.student.pixels import normalise
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import run_task
from milan_pipe.training.task import RunReport, Task

ImageSet = LabelledImages | MaskedImages
S = TypeVar("S", bound=FinetuneSettings | LarsProbeSettings | SegmentSettings)
T = TypeVar("T")


@dataclass(frozen=True)
class ReadBatch:
    """B training images of a step as they are read: pixels_BHWC uint8, target, and what else a task reads of each."""

    values: tuple[Tensor, ...]
    keys: tuple[str, ...]
    step: int

    def to(self, device: torch.device) -> ReadBatch:
        """The batch on a device; from pinned memory the copies are under way when this returns."""
        return replace(self, values=tuple(value.to(device, non_blocking=True) for value in self.values))


@dataclass(frozen=True)
class ImageBatch:
    """B training images: normalised floats, and class indices (B,), shares of classes (B, G) or masks (B, H, W)."""

    images_BCHW: Tensor
    target: Tensor


@dataclass(frozen=True, kw_only=True)
class Start(Generic[S]):
    """What a run on labelled images begins with, on one rank.

    Attributes:
        train, val: images, as the user named them.
        settings: of the task, with the precision that the device has.
        record: command, data and settings, for checkpoints.
    """

    train: str | Path
    val: str | Path
    params: Params
    settings: S
    backbone: Backbone
    bad: BadImages
    record: Mapping[str, Any]
    ranks: Ranks
    run: Path

    @property
    def head_seed(self) -> int:
        """Seed of a fresh head's weights, apart from all others."""
        return seed_of(self.settings.seed, "head") % 2**63


def collate(samples: Sequence[tuple[Any, ...]]) -> tuple[Tensor | NDArray[Any], ...]:
    """Pixels, masks, labels and the like of several samples, each in one piece.

    Only images and masks become tensors here: a tensor of a worker process takes a file descriptor.
    """
    columns = [np.stack([np.asarray(value) for value in column]) for column in zip(*samples, strict=True)]
    return tuple(torch.from_numpy(column) if column.ndim > 2 else column for column in columns)


class SupervisedTask(Task[ReadBatch], Generic[S]):
    """Training on labelled images. A subclass says what is learned, and how it is judged.

    Attributes:
        sections: names of the settings that the weights depend on; the last one is the task's own.
        least_part: fewest images that a rank computes with at a time, and `least_reason` why.
        take: makes a training sample, pixels (H, W, C) uint8, target, and more; runs in a worker process.
        mirrored: see `StepPlan`.
        backbone_of: what CHECKPOINT may name.
    """

    name: str
    sections: tuple[str, ...]
    settings: S
    least_part, least_reason = 1, ""
    take: Callable[[SampleRequest], tuple[Any, ...]]
    mirrored = False
    backbone_of: Callable[[str | Path, StudentSettings, int], Backbone] = staticmethod(backbone_of)

    @abstractmethod
    def __init__(self, start: Start[S]) -> None:
        """Find the images, make the model, and call `set_up`."""

    def set_up(
        self,
        start: Start[S],
        train: ImageSet,
        val: ImageSet,
        number_N: NDArray[np.int64],
        classes: Sequence[str] | int,
        sizes: StudentSettings,
        model: nn.Module,
        **data: Any,
    ) -> None:
        """Check the batch, plan the steps, and say what the run depends on.

        Args:
            number_N: images of `train` to train on.
            data: more that the data depend on.
        """
        settings, ranks, section = start.settings, start.ranks, self.sections[-1]
        self.section = section
        self.settings, self.batch_size = settings, settings.batch_size
        self.advice = f"lower {section}.lr, or look at the images"
        self._ranks, self._bad, self._run = ranks, start.bad, start.run
        self.model, self.modules = model.to(ranks.device), {"model": model}
        self._train, self._val = train, val
        if len(number_N) < self.batch_size:
            raise SettingError(
                f"{section}.batch_size is {self.batch_size}, {train.where} has {len(number_N)} images to train on; "
                "set a smaller batch_size"
            )
        if self.batch_size // ranks.count // settings.accumulate < self.least_part:
            raise SettingError(
                f"{section}.batch_size is {self.batch_size}: {ranks.count} ranks with accumulate={settings.accumulate} "
                f"need at least {ranks.count * settings.accumulate * self.least_part}{self.least_reason}"
            )
        self._plan = StepPlan(
            number_N=number_N,
            batch_size=self.batch_size,
            seed=settings.seed,
            rank=ranks.rank,
            ranks=ranks.count,
            mirrored=self.mirrored,
        )
        self.steps_per_epoch = self._plan.steps_per_epoch
        if settings.compile:
            model.compile()
        if ranks.first:
            warn_if_images_shared(train, val)
        start.bad.limit(len(train) + len(val), settings.max_bad_fraction)
        student = sizes.model_dump(mode="json")
        named = classes if isinstance(classes, int) else list(classes)
        dumped = {name: getattr(start.params, name) for name in self.sections} | {section: settings}
        self.configuration = {
            # The class list is part of the data, whatever file it came from.
            **{name: value.model_dump(mode="json", exclude=RESUMABLE | {"classes"}) for name, value in dumped.items()},
            # Other limits skip other images.
            **({"images": limits} if (limits := start.params.images.model_dump(exclude_defaults=True)) else {}),
            "student": {**student, "weights": start.backbone.digest()},
            "data": {
                "train": train.fingerprint,
                "train_sizes": train.sizes,
                "val": val.fingerprint,
                "val_sizes": val.sizes,
                "classes": named,
                **data,
            },
        }
        self.record = {"student": student, "classes": named, "backbone": start.backbone.name, **start.record}

    def before_step(self, step: int) -> None:
        """Drop path draws from the device's global generator."""
        torch.manual_seed(seed_of(self.settings.seed, step, self._ranks.rank))

    def _load(
        self,
        take: Callable[[SampleRequest], Any],
        collate: Callable[[list[Any]], T],
        images: ImageSet,
        requests: Iterator[list[SampleRequest]],
    ) -> Iterator[Batch[T]]:
        return load_batches(
            take,
            collate,
            images.keys,
            requests,
            workers=self.settings.workers,
            setting=f"{self.section}.workers",
            bad=self._bad,
            pin=self._ranks.device.type == "cuda",
        )

    def batches(self, first_step: int) -> Generator[ReadBatch]:
        """This rank's images, augmented."""
        requests = self._plan.batches(first_step, self.steps)
        for step, batch in enumerate(self._load(self.take, collate, self._train, requests), first_step):
            yield ReadBatch(tuple(map(torch.as_tensor, batch.value)), batch.keys, step)

    def prepared(self, batch: ReadBatch) -> ImageBatch:
        """Normalised and augmented, where that is done on the device."""
        pixels_BHWC, target = batch.values
        return ImageBatch(normalise(pixels_BHWC), target)

    def parts(self, batch: ReadBatch) -> Sequence[tuple[ImageBatch, float]]:
        """Prepared, and cut for accumulation."""
        count, size, whole = self.settings.accumulate, len(batch.keys), self.prepared(batch)
        cuts = [slice(number * size // count, (number + 1) * size // count) for number in range(count)]
        return [(ImageBatch(whole.images_BCHW[cut], whole.target[cut]), (cut.stop - cut.start) / size) for cut in cuts]

    def _shown(
        self, take: Callable[[SampleRequest], Any], collate: Callable[[list[Any]], T], batch_size: int
    ) -> Iterator[Batch[T]]:
        """This rank's images of VAL."""
        requests = in_turn(len(self._val), batch_size, self._ranks.rank, self._ranks.count)
        return self._load(take, collate, self._val, requests)

    def _autocast(self) -> torch.autocast:
        return autocast(self.settings.precision, self._ranks.device)

    def bad(self) -> int:
        """Images that could not be read, on this rank."""
        return len(self._bad.keys)


def run_supervised(
    task: type[SupervisedTask[S]],
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train, or go on with a run; writes RUN/checkpoints, RUN/best and RUN/metrics.

    On a CPU curve and weights of an interrupted run are those of an unbroken one, to the bit, whatever the number of
    workers. Under torchrun all ranks call it: neither order nor augmentation of images nor mixup depends on their
    number.

    Args:
        checkpoint: as the task's `backbone_of` takes it.
        train, val: as `labelled_images` takes them; a segmentation's as `masked_images` does.
        params: `student` has the sizes of a student with fresh weights.

    Raises:
        LabelError: a mask is of another size than its image, in colours, or has a value that is no class.
        MissingError, DataError, MismatchError, SettingError, StoreError: as those, `require_same_classes` and
            `run_task`.
    """
    settings: Any = getattr(params, task.sections[-1])
    sections = ("images", *task.sections)
    record = record_of(task.name, (checkpoint, train, val, run), params, sections, data=f"{train} -> {val}")

    def build(ranks: Ranks, folder: Path) -> SupervisedTask[S]:
        precision = resolve_precision(settings.precision, ranks.device)
        return task(
            Start(
                train=train,
                val=val,
                params=params,
                settings=settings.model_copy(update={"precision": precision}),
                backbone=task.backbone_of(checkpoint, params.student, settings.seed),
                bad=BadImages(folder / "bad_samples.jsonl" if ranks.first else None),
                record=record,
                ranks=ranks,
                run=folder,
            )
        )

    with kept_generators():
        return run_task(run, settings.device, build, on_progress)
