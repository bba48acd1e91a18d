"""Training on labelled images: what fine-tuning, the linear probe by protocol and segmentation have in common.

Shape suffixes are explained in `milan_pipe.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import default_collate

from milan_pipe.config.command import record_of
from milan_pipe.config.evaluation import FinetuneSettings, LarsProbeSettings, SegmentSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.training import RESUMABLE
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.backbone import Backbone, backbone_of
from milan_pipe.evaluation.batches import (
    BadImages,
    Batch,
    SampleRequest,
    StepPlan,
    in_turn,
    load_batches,
    share_of_classes,
)
from milan_pipe.images.labelled import LabelledImages
from milan_pipe.images.masked import MaskedImages
from milan_pipe.random_bits import seed_of
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import run_task
from milan_pipe.training.step import resolve_precision
from milan_pipe.training.task import RunReport, Task

ImageSet = LabelledImages | MaskedImages
S = TypeVar("S", bound=FinetuneSettings | LarsProbeSettings | SegmentSettings)
T = TypeVar("T")


@dataclass(frozen=True)
class ImageBatch:
    """B training images: normalised floats, and class indices (B,), shares of classes (B, G) or masks (B, H, W)."""

    pixels_BCHW: Tensor
    target: Tensor
    keys: tuple[str, ...]
    step: int

    def __getitem__(self, cut: slice) -> ImageBatch:
        return ImageBatch(self.pixels_BCHW[cut], self.target[cut], self.keys[cut], self.step)


@dataclass(frozen=True, kw_only=True)
class Start(Generic[S]):
    """What a run on labelled images begins with, on one rank.

    Attributes:
        sections: names of the settings that the weights depend on; the last one is the task's own.
        settings: of the task, with the precision that the device has.
        record: command, data and settings, for checkpoints.
    """

    name: str
    sections: Sequence[str]
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


class SupervisedTask(Task[ImageBatch], Generic[S]):
    """Training on labelled images. A subclass says what is learnt and how it is judged.

    Attributes:
        least_part: fewest images that a rank computes with at a time, and `least_reason` why.
        take: makes a training sample, pixels (C, H, W) and target; runs in a worker process.
    """

    settings: S
    least_part, least_reason = 1, ""
    take: Callable[[SampleRequest], tuple[Tensor, Tensor | int]]

    def __init__(
        self,
        start: Start[S],
        *,
        train: ImageSet,
        val: ImageSet,
        label_N: NDArray[np.int64],
        classes: Sequence[str] | int,
        train_fraction: float,
        sizes: StudentSettings,
        model: nn.Module,
        data: Mapping[str, Any] = MappingProxyType({}),
        record: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Check the batch, plan the steps, and say what the run depends on.

        Args:
            label_N: classes of the train images; `train_fraction` of each is trained on.
            data, record: more to keep of the data and of the model.
        """
        settings, ranks, section = start.settings, start.ranks, start.sections[-1]
        batch_size = settings.batch_size
        self.name, self.settings = start.name, settings
        self.advice = f"lower {section}.lr, or look at the images"
        self.batch_size = batch_size
        self.model = model.to(ranks.device)
        self.modules = {"model": model}
        self._ranks, self._run, self._train, self._val, self._bad = ranks, start.run, train, val, start.bad
        number_N = share_of_classes(label_N, train_fraction, settings.seed)
        if len(number_N) < batch_size:
            raise SettingError(
                f"{section}.batch_size is {batch_size}, {train.where} has {len(number_N)} images to train on; set a "
                "smaller batch_size"
            )
        if batch_size // ranks.count // settings.accumulate < self.least_part:
            raise SettingError(
                f"{section}.batch_size is {batch_size}: {ranks.count} ranks with accumulate={settings.accumulate} "
                f"need at least {ranks.count * settings.accumulate * self.least_part}{self.least_reason}"
            )
        self._plan = StepPlan(
            number_N=number_N, batch_size=batch_size, seed=settings.seed, rank=ranks.rank, ranks=ranks.count
        )
        self.steps_per_epoch = self._plan.steps_per_epoch
        if settings.compile:
            model.compile()
        start.bad.limit(len(train) + len(val), settings.max_bad_fraction)
        student = sizes.model_dump(mode="json")
        named = classes if isinstance(classes, int) else list(classes)
        dumped = {name: getattr(start.params, name) for name in start.sections} | {section: settings}
        self.configuration = {
            # The class list is part of the data, whatever file it came from.
            **{name: value.model_dump(mode="json", exclude=RESUMABLE | {"classes"}) for name, value in dumped.items()},
            "student": {**student, "weights": start.backbone.digest()},
            "data": {"train": train.fingerprint, "val": val.fingerprint, "classes": named, **data},
        }
        self.record = {
            "student": student,
            "classes": named,
            **record,
            "backbone": start.backbone.name,
            **start.record,
        }

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
        return load_batches(take, collate, images.keys, requests, workers=self.settings.workers, bad=self._bad)

    def batches(self, first_step: int) -> Generator[ImageBatch]:
        """This rank's images, augmented."""
        requests = self._plan.batches(first_step, self.steps)
        for step, batch in enumerate(self._load(self.take, default_collate, self._train, requests), first_step):
            pixels_BCHW, target = batch.value
            yield ImageBatch(pixels_BCHW, target, batch.keys, step)

    def mixed(self, batch: ImageBatch) -> ImageBatch:
        """A batch on the device, its images mixed with each other where the recipe says so."""
        return batch

    def parts(self, batch: ImageBatch) -> Sequence[tuple[ImageBatch, float]]:
        """On the device, mixed, and cut for accumulation."""
        device, count, size = self._ranks.device, self.settings.accumulate, len(batch.keys)
        moved = replace(batch, pixels_BCHW=batch.pixels_BCHW.to(device), target=batch.target.to(device))
        whole = self.mixed(moved)
        cuts = [slice(number * size // count, (number + 1) * size // count) for number in range(count)]
        return [(whole[cut], (cut.stop - cut.start) / size) for cut in cuts]

    def _shown(
        self, take: Callable[[SampleRequest], Any], collate: Callable[[list[Any]], T], batch_size: int
    ) -> Iterator[Batch[T]]:
        """This rank's images of VAL."""
        requests = in_turn(len(self._val), batch_size, self._ranks.rank, self._ranks.count)
        return self._load(take, collate, self._val, requests)

    def _autocast(self) -> torch.autocast:
        precision = self.settings.precision
        return torch.autocast(self._ranks.device.type, dtype=getattr(torch, precision), enabled=precision != "float32")

    def bad(self) -> int:
        """Images that could not be read, on this rank."""
        return len(self._bad.keys)


def run_supervised(
    name: str,
    sections: Sequence[str],
    settings: S,
    places: tuple[str | Path, str | Path, str | Path, str | Path],
    params: Params,
    task_of: Callable[[Start[S]], SupervisedTask[S]],
    on_progress: Callable[[TrainProgress], None],
) -> RunReport:
    """Do the run of a command, or go on with it.

    Args:
        name: of the command.
        sections, settings: as in `Start`; the settings are those of the last section.
        places: checkpoint, train, val and run, as the user named them.
    """
    checkpoint, train, val, run = places
    record = record_of(name, places, params, sections, data=f"{train} -> {val}")

    def build(ranks: Ranks, folder: Path) -> SupervisedTask[S]:
        precision = resolve_precision(settings.precision, ranks.device)
        resolved: Any = settings.model_copy(update={"precision": precision})
        return task_of(
            Start(
                name=name,
                sections=sections,
                params=params,
                settings=resolved,
                backbone=backbone_of(checkpoint, params.student, settings.seed),
                bad=BadImages(folder / "bad_samples.jsonl" if ranks.first else None),
                record=record,
                ranks=ranks,
                run=folder,
            )
        )

    return run_task(run, settings.device, build, on_progress)
