"""How fast teacher and student are on this machine, and what that comes to in hours.

Shape suffixes: N images of the sample, one view of each; the others as in `milan_pipe.pretraining`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.devices import resolve_device
from milan_pipe.loader.stream import Batch
from milan_pipe.planning.store import EncodedSample, ImageSample
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.teacher.clip import Teacher, TeacherOutput
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.step import Stepper, resolve_precision

DEVICES = (1, 8, 64)
"""Numbers of devices for which hours are given."""

# A measurement ends after this many seconds, but not before the first batch behind the warm-up.
_LONGEST_SECONDS = 8.0
_MOST_BATCHES = 8
_FEWEST_BATCHES = 3
_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A rate that was measured here, after a warm-up, or that follows from counted arithmetic.

    Attributes:
        per_second: views of the teacher, or images of the student.
        device: where it ran, with the accelerator's name; of a counted rate, how it was computed.
        precision: of the teacher's forward pass, or of the student's weights.
        batch_size: of the measurement.
        threads: of torch on a CPU; 0 elsewhere.
        batches: that were timed; 0 where nothing was.
    """

    per_second: float
    device: str
    precision: str
    batch_size: int
    threads: int
    batches: int

    @property
    def source(self) -> str:
        """`measured` or `counted`."""
        return "measured" if self.batches else "counted"

    def __str__(self) -> str:
        if not self.batches:
            return self.device
        threads = f", {self.threads} threads" if self.threads > 1 else ", 1 thread" if self.threads else ""
        return f"{self.device}, {self.precision}, batch {self.batch_size}{threads}"


@contextmanager
def same_threads() -> Iterator[None]:
    """Leave torch with the number of threads that it has now."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measured(device: torch.device, precision: str, batch_size: int, batches: int, per_second: float) -> Speed:
    return Speed(
        per_second=per_second,
        device=f"{device.type} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type,
        precision=precision,
        batch_size=batch_size,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        batches=batches,
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_teacher(teacher: Teacher, pixels_NHWC: Tensor, batch_size: int) -> tuple[TeacherOutput, Speed]:
    """Outputs for the sample, on the CPU, and the rate at which they came: forward pass and way to the device.

    The sample is repeated until there are enough batches, or the measurement has taken long enough.
    """
    batches = torch.split(pixels_NHWC, batch_size)
    outputs: list[TeacherOutput] = []
    device = teacher.mean.device
    teacher(batches[0])
    _finish(device)
    views = timed = 0
    began = time.perf_counter()
    while timed < max(_FEWEST_BATCHES, len(batches)):
        batch = batches[timed % len(batches)]
        output = teacher(batch)
        _finish(device)
        views, timed = views + len(batch), timed + 1
        if len(outputs) < len(batches):
            outputs.append(output)
        elif time.perf_counter() - began > _LONGEST_SECONDS:
            break
    seconds = time.perf_counter() - began
    speed = _measured(device, teacher.info.precision, len(batches[0]), timed, views / seconds)
    features = torch.cat([output.features_BST.cpu() for output in outputs])
    return TeacherOutput(features, torch.cat([output.importance_BL.cpu() for output in outputs])), speed


def batch_of(sample: ImageSample, encoded: EncodedSample, size: int) -> Batch:
    """The first `size` images of the sample, as the loader would give them."""
    return Batch(
        keys=tuple(rendered.key for rendered in sample.rendered[:size]),
        pixels_BHWC=sample.pixels_NHWC[:size],
        code_BST=encoded.code_NST[:size],
        scale_BS=None if encoded.scale_NS is None else encoded.scale_NS[:size],
        attention_BL=encoded.attention_NL[:size],
    )


def run_student(params: Params, header: StoreHeader, sample: ImageSample, encoded: EncodedSample) -> Speed:
    """Images a second of pretraining's own step on one batch of the sample: forward, backward and AdamW.

    The batch has `pretrain.batch_size` images, or as many as the sample has where those are fewer.

    Args:
        header: of the store that it would learn from.

    Raises:
        SettingError: there is no such student or device.
    """
    device = resolve_device(params.pretrain.device)
    objective = build_objective(header, params, device)
    precision = resolve_precision(params.pretrain.precision, device)
    optimiser = build_adamw(
        objective.student, lr=params.pretrain.lr, betas=params.pretrain.betas, weight_decay=params.pretrain.weight_decay
    )
    batch = batch_of(sample, encoded, min(params.pretrain.batch_size, len(sample.rendered)))
    stepper = Stepper(
        optimiser,
        objective,
        split=lambda whole: whole.parts(params.pretrain.accumulate),
        device=device,
        precision=precision,
        clip_grad=params.pretrain.clip_grad,
    )
    ends: list[float] = []
    # One more: the first step warms up.
    while len(ends) <= _MOST_BATCHES and (len(ends) < 2 or ends[-1] - ends[0] < _LONGEST_SECONDS):
        stepper(batch, 0, 0.0)
        _finish(device)
        ends.append(time.perf_counter())
    steps = len(ends) - 1
    return _measured(device, precision, len(batch.keys), steps, steps * len(batch.keys) / (ends[-1] - ends[0]))


@dataclass(frozen=True, kw_only=True)
class ExtractionHours:
    """How long stage 1 will take, extrapolated.

    Attributes:
        views_per_second: of one device, rendering beside it; writing is not counted.
        limited_by: what decides the rate: `teacher`, `rendering`, or the `processors` that both share.
        hours: by number of devices, each like this one with as many processors. A shard is done by one of them: more
            devices than shards gain nothing.
    """

    views_per_second: float
    limited_by: str
    hours: dict[int, float]


def extraction_hours(
    views: int,
    shards: int,
    teacher: Speed,
    render_seconds: float,
    threads: int,
    cores: int,
    devices: Sequence[int] = DEVICES,
) -> ExtractionHours:
    """Hours of stage 1 for numbers of devices, with rendering and teacher side by side.

    Args:
        render_seconds: of one thread for one view.
        threads: that render.
        cores: processors that rendering, and a teacher on the CPU, share.
    """
    alone = 1 / teacher.per_second
    rendering = render_seconds / min(threads, cores)
    together = (alone * min(teacher.threads, cores) + render_seconds) / cores
    seconds, limit = max((alone, "teacher"), (rendering, "rendering"), (together, "processors"), key=lambda p: p[0])
    shard_hours = views / shards * seconds / _HOUR
    return ExtractionHours(
        views_per_second=1 / seconds,
        limited_by=limit,
        hours={count: ceil(shards / count) * shard_hours for count in devices},
    )


@dataclass(frozen=True, kw_only=True)
class PretrainingHours:
    """Stage 2 with stored targets, and with its teacher in every step; one device, extrapolated, reading not counted.

    Attributes:
        pretrain_hours: of the student's steps.
        extraction_hours: what the targets cost once.
        online_hours: of the same steps with the teacher's forward pass in each.
        saved_hours: online less both of the others; negative where storing targets does not pay.
        pays_from_epochs: fewest epochs at which it does; None where it never does, as with a target of pixels.
    """

    epochs: int
    pretrain_hours: float
    extraction_hours: float
    online_hours: float
    saved_hours: float
    pays_from_epochs: int | None


def pretraining_hours(
    images: int, epochs: int, student: Speed, teacher: Speed | None, extraction: float
) -> PretrainingHours:
    """Compare the two ways.

    Args:
        teacher: on batches of the student's size; None where the target needs no teacher.
        extraction: hours of one device.
    """
    steps = epochs * images / student.per_second / _HOUR
    teaching = images / teacher.per_second / _HOUR if teacher is not None else 0.0
    return PretrainingHours(
        epochs=epochs,
        pretrain_hours=steps,
        extraction_hours=extraction,
        online_hours=steps + epochs * teaching,
        saved_hours=epochs * teaching - extraction,
        pays_from_epochs=floor(extraction / teaching) + 1 if teaching else None,
    )
