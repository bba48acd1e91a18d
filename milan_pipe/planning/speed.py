"""How fast teacher and student are, measured here or from counted arithmetic, and what that comes to in hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from milan_pipe.attention import choose_attention
from milan_pipe.config.params import Params
from milan_pipe.devices import resolve_device, resolve_precision
from milan_pipe.loader.stream import Batch
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.teacher.clip import Teacher, TeacherOutput
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.step import Stepper

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


def _measure(
    step: Callable[[int], object], sizes: Sequence[int], device: torch.device, precision: str, fewest: int, most: int
) -> Speed:
    """The rate of steps on batches of `sizes`, in turn: of `most` steps, or at least `fewest` where they take long."""

    def run(number: int) -> None:
        step(number % len(sizes))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run(0)  # warms up
    began, seconds, images, done = time.perf_counter(), 0.0, 0, 0
    while done < most and (done < fewest or seconds < _LONGEST_SECONDS):
        run(done)
        seconds = time.perf_counter() - began
        images, done = images + sizes[done % len(sizes)], done + 1
    return Speed(
        per_second=images / seconds,
        device=f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type,
        precision=precision,
        batch_size=sizes[0],
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        batches=done,
    )


def run_teacher(teacher: Teacher, pixels_NHWC: Tensor, batch_size: int) -> tuple[TeacherOutput, Speed]:
    """Outputs for the N images, on the CPU, and the rate at which they came: forward pass and way to the device.

    The images are repeated until there are enough batches, or the measurement has taken long enough.
    """
    batches = torch.split(pixels_NHWC, batch_size)
    outputs: dict[int, TeacherOutput] = {}
    speed = _measure(
        lambda number: outputs.update({number: teacher(batches[number])}),
        [len(batch) for batch in batches],
        teacher.mean.device,
        teacher.info.precision,
        len(batches),
        max(_FEWEST_BATCHES, len(batches)),
    )
    features = torch.cat([outputs[number].features_BST.cpu() for number in range(len(batches))])
    return TeacherOutput(
        features, torch.cat([outputs[number].importance_BL.cpu() for number in range(len(batches))])
    ), speed


def run_student(params: Params, headers: Sequence[StoreHeader], batch: Batch) -> Speed:
    """Images a second of pretraining's own step on one batch of one store or several: forward, backward and AdamW.

    Raises:
        SettingError: there is no such student or device.
    """
    settings, device = params.pretrain, resolve_device(params.pretrain.device)
    objective = build_objective(headers[0], params, device, others=headers[1:])
    precision = resolve_precision(settings.precision, device)
    choose_attention(objective, device, getattr(torch, precision))
    optimiser = build_adamw(objective.student, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    stepper = Stepper[Batch](
        optimiser,
        objective,
        split=lambda whole: whole.parts(settings.accumulate),
        device=device,
        precision=precision,
        clip_grad=settings.clip_grad,
    )
    return _measure(lambda _: stepper(batch, 0, 0.0), [len(batch.keys)], device, precision, 1, _MOST_BATCHES)


def _count(run: Callable[[], object]) -> int:
    # The counter knows no formula for the CPU's fused attention, nor for the encoder layer's; as plain matrix products
    # they are counted.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return int(counter.get_total_flops())


def teacher_flops(teacher: Teacher, pixels_NHWC: Tensor) -> int:
    """Floating point operations of one view's forward pass; a multiplication and its addition are two."""
    return _count(lambda: teacher(pixels_NHWC[:1]))


def student_flops(params: Params, headers: Sequence[StoreHeader], batch: Batch) -> int:
    """Floating point operations of one image's share of a step, forward and backward; counted on the CPU.

    Raises:
        SettingError: there is no such student.
    """
    objective = build_objective(headers[0], params, torch.device("cpu"), others=headers[1:])
    return _count(lambda: objective(batch.rows(0, 1), 0).backward())


def speed_at(tflops: float, flops: int, batch_size: int) -> Speed:
    """The rate of a device that sustains `tflops` TFLOP/s."""
    how = f"{flops / 1e9:.4g} GFLOP each at {tflops:g} TFLOP/s"
    return Speed(
        per_second=tflops * 1e12 / flops, device=how, precision="given", batch_size=batch_size, threads=0, batches=0
    )


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
    views: int, shards: int, teacher: Speed, render_seconds: float, threads: int, cores: int, devices: int = 1
) -> ExtractionHours:
    """Hours of stage 1 for `devices` and the usual numbers of them, with rendering and teacher side by side.

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
        hours={count: ceil(shards / count) * shard_hours for count in sorted({*DEVICES, devices})},
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
