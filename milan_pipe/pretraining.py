"""Stage 2: the student learns from stored targets; no teacher and no source image is touched.

Shape suffixes: B batch, C channels, H height, W width, S = L + 1 tokens (CLS first), L patches, T feature width.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from dvclive.live import Live
from pydantic import Field
from torch import Tensor, nn

from milan_pipe import __version__
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MismatchError, StoppedError, StoreError
from milan_pipe.loader.order import EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Batch, Prefetcher, epoch_batches
from milan_pipe.settings import Settings
from milan_pipe.storage import local_folder
from milan_pipe.student.decoder import DecoderConfig
from milan_pipe.student.encoder import StudentConfig
from milan_pipe.student.loss import feature_loss, pixel_loss, pixel_target
from milan_pipe.student.masking import MaskConfig, draw_split, mask_noise, visible_count
from milan_pipe.student.model import MaskedStudent, build_student
from milan_pipe.student.pixels import normalise
from milan_pipe.student.weights import load_weights
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import Checkpoint, keep_last, save_checkpoint
from milan_pipe.training.loop import StepReport, train
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.resume import cut_metrics, last_checkpoint, require_same_configuration
from milan_pipe.training.schedule import cosine_lr
from milan_pipe.training.state import first_not_finite, load_optimiser, optimiser_tensors
from milan_pipe.training.stopping import stop_requests

Target = Literal["clip", "pixels"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class PretrainConfig(Settings):
    """The recipe of pretraining; defaults are those of the scenes."""

    epochs: int = Field(16, ge=1)
    warmup_epochs: float = Field(1, ge=0)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(5e-3, gt=0, description="for a batch of 256; the rate used is lr x batch_size / 256")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the order of samples")
    window: int = Field(16, ge=1, description=f"blocks of {BLOCK_SAMPLES} samples that are shuffled together")
    threads: int = Field(1, ge=1, description="threads that decode stored views")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    log_every: int = Field(10, ge=1, description="steps between two points of the metrics")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between two checkpoints")
    checkpoint_minutes: float | None = Field(15, gt=0, description="minutes between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="the last ones are kept")


# What may change between two parts of a run: where and how fast it runs, and what is written down.
_FREE = {"threads", "device", "log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"}
_REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """What a run came to; `loss` is the mean over the last epoch, `data_wait` a share of the time.

    Rates and `seconds` are those of the process that finished it, which began after step `resumed_from`. `steps_now` is
    0 where the run was finished before.
    """

    steps: int
    epochs: int
    loss: float
    images_per_second: float
    data_wait: float
    seconds: float
    checkpoint: str
    resumed_from: int
    steps_now: int


@dataclass(frozen=True, kw_only=True)
class PretrainProgress:
    """Told every few steps."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    images_per_second: float
    data_wait: float
    seconds: float


class Objective(nn.Module):
    """Student, masking and loss: a batch as it is stored becomes a scalar, all of it on the training device."""

    def __init__(
        self, student: MaskedStudent, header: StoreHeader, masking: MaskConfig, target: Target, patch_size: int
    ) -> None:
        super().__init__()
        self.student = student
        self.codec = codec_of(header.codec)
        self.masking = masking
        self.target = target
        self.patch_size = patch_size
        self.patches = header.patches
        self.visible = visible_count(header.patches, masking.ratio)

    def forward(self, batch: Batch, epoch: int) -> Tensor:
        """Loss of one batch.

        Masks are drawn per sample from (seed, epoch, key): they depend on no neighbour.
        """
        device = next(self.student.parameters()).device
        images_BCHW = normalise(batch.pixels_BHWC.to(device, non_blocking=True))
        noise_BL = mask_noise(self.masking.seed, epoch, batch.keys, self.patches).to(device)
        importance_BL = batch.attention_BL.to(device).float() if self.masking.kind == "semantic" else None
        split = draw_split(importance_BL, noise_BL, self.visible)
        prediction_BST = self.student(images_BCHW, split)
        if self.target == "pixels":
            return pixel_loss(prediction_BST, pixel_target(images_BCHW, self.patch_size), split)
        scale_BS = None if batch.scale_BS is None else batch.scale_BS.to(device)
        return feature_loss(prediction_BST, self.codec.decode(batch.code_BST.to(device), scale_BS))


class _LossWatch:
    """Losses of an epoch and since the last point. They are read now and then: reading makes an accelerator wait.

    Sums are taken step by step in double precision, so that they do not depend on when they are read.
    """

    def __init__(self, told_of_checkpoint: Callable[[], str]) -> None:
        self._told_of_checkpoint = told_of_checkpoint
        self._unread: list[tuple[StepReport, tuple[str, ...]]] = []
        self._epoch = -1
        self._sums: dict[str, list[float]] = {"epoch": [0.0, 0], "recent": [0.0, 0]}

    def add(self, report: StepReport, keys: tuple[str, ...]) -> None:
        """Remember a step."""
        self._unread.append((report, keys))

    def settle(self) -> None:
        """Read the losses.

        Raises:
            DataError: one is not finite; names the first such step and its batch.
        """
        if not self._unread:
            return
        losses = torch.stack([report.loss for report, _ in self._unread]).cpu().tolist()
        for loss, (report, keys) in zip(losses, self._unread, strict=True):
            if not math.isfinite(loss):
                raise DataError(
                    f"the loss is {loss:g} at step {report.step} (batch of {len(keys)}: {keys[0]} ... {keys[-1]}); "
                    f"lower pretrain.lr, or check the targets. {self._told_of_checkpoint()}"
                )
            if report.epoch != self._epoch:
                self._epoch = report.epoch
                self._sums["epoch"] = [0.0, 0]
            for sums in self._sums.values():
                sums[0] += loss
                sums[1] += 1
        self._unread.clear()

    def recent_mean(self) -> float:
        """Mean over the steps since the last call; raises as `settle`."""
        self.settle()
        total, count = self._sums["recent"]
        self._sums["recent"] = [0.0, 0]
        return total / count

    def epoch_mean(self) -> float:
        """Mean over the epoch so far; raises as `settle`."""
        self.settle()
        total, count = self._sums["epoch"]
        return total / count

    def state(self) -> dict[str, Any]:
        """What a process that goes on needs; raises as `settle`."""
        self.settle()
        return {"epoch": self._epoch, "sums": self._sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a state over."""
        self._epoch = int(state["epoch"])
        self._sums = {name: [total, count] for name, (total, count) in state["sums"].items()}


class _Recorder:
    """Writes RUN/metrics and tells of progress every few steps."""

    def __init__(
        self,
        live: Live,
        losses: _LossWatch,
        *,
        first_step: int,
        steps: int,
        batch_size: int,
        log_every: int,
        on_progress: Callable[[PretrainProgress], None],
    ) -> None:
        self._live = live
        self._first_step = first_step
        self._steps = steps
        self._batch_size = batch_size
        self._log_every = log_every
        self._on_progress = on_progress
        self.losses = losses
        self.progress: PretrainProgress | None = None

    def __call__(self, report: StepReport, batch: Batch) -> None:
        """Take one step in.

        Raises:
            DataError: a loss is not finite.
        """
        self.losses.add(report, batch.keys)
        if report.step % self._log_every and report.step != self._steps:
            return
        self.progress = PretrainProgress(
            step=report.step,
            steps=self._steps,
            epoch=report.epoch,
            loss=self.losses.recent_mean(),
            lr=report.lr,
            images_per_second=(report.step - self._first_step) * self._batch_size / report.seconds,
            data_wait=report.data_wait_seconds / report.seconds,
            seconds=report.seconds,
        )
        self._live.step = report.step
        for name in ("loss", "lr", "images_per_second", "data_wait"):
            self._live.log_metric(f"train/{name}", getattr(self.progress, name))
        self._live.sync()  # type: ignore[no-untyped-call]
        self._on_progress(self.progress)


class _Saver:
    """Writes checkpoints when they are due, and when the run is told to stop."""

    def __init__(
        self, run: Path, model: MaskedStudent, optimiser: torch.optim.Optimizer, config: PretrainConfig
    ) -> None:
        self._run = run
        self._model = model
        self._optimiser = optimiser
        self._config = config
        self._saved_at = time.monotonic()
        self.path: Path | None = None
        self.record: dict[str, Any] = {}

    def told(self) -> str:
        """What to say of the last checkpoint when a run ends early."""
        if self.path is None:
            return "No checkpoint was written"
        return f"The last good checkpoint is {self.path}"

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        every, minutes = self._config.checkpoint_every, self._config.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (every is not None and step % every == 0)

    def save(self, step: int, losses: Mapping[str, Any], *, finished: bool) -> Path:
        """Write the checkpoint of a step and remove those that are too many.

        Raises:
            DataError: a weight is not finite.
            StoreError: it cannot be written.
        """
        broken = first_not_finite(self._model)
        if broken is not None:
            raise DataError(
                f"after step {step} the weights {broken!r} are not finite; lower pretrain.lr, or check the targets. "
                f"{self.told()}"
            )
        parts: dict[str, Mapping[str, Tensor]] = {
            "student": self._model.encoder.state_dict(),
            "decoder": self._model.decoder.state_dict(),
        }
        if not finished:
            parts["optimizer"] = optimiser_tensors(self._model, self._optimiser)
        self.path = save_checkpoint(self._run, step, parts, {**self.record, "finished": finished, "losses": losses})
        keep_last(self._run, self._config.keep_checkpoints)
        self._saved_at = time.monotonic()
        return self.path

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take weights and optimiser over; returns the steps that were done."""
        where = str(checkpoint.path)
        load_weights(self._model.encoder, checkpoint.weights("student"), where)
        load_weights(self._model.decoder, checkpoint.weights("decoder"), where)
        load_optimiser(self._model, self._optimiser, checkpoint.weights("optimizer"), where)
        self.path = checkpoint.path
        return int(checkpoint.record["step"])


def _make_folder(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{run} cannot be made: {error.strerror or error}; choose another folder") from error


def _configuration(
    header: StoreHeader,
    samples: tuple[int, ...],
    student: StudentConfig,
    decoder: DecoderConfig,
    masking: MaskConfig,
    target: Target,
    config: PretrainConfig,
) -> dict[str, Any]:
    """All that the weights of a run depend on."""
    # Neither where the store came from nor its format change what is read from it.
    stored = header.model_dump(mode="json", exclude={"package_version", "format", "source"})
    return {
        "student": student.model_dump(mode="json"),
        "decoder": decoder.model_dump(mode="json"),
        "masking": masking.model_dump(mode="json"),
        "target": target,
        "pretrain": config.model_dump(mode="json", exclude=_FREE),
        "targets": {
            **{name: stored[name] for name in ("teacher", "views")},
            "codec": hashlib.sha256(json.dumps(stored["codec"], sort_keys=True).encode()).hexdigest(),
            "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        },
    }


def _finished_report(run: Path, checkpoint: Checkpoint) -> PretrainReport:
    try:
        values = json.loads((run / _REPORT).read_text())
        return PretrainReport(**{**values, "checkpoint": str(checkpoint.path), "steps_now": 0})
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{run} holds a finished run ({checkpoint.path}) whose {_REPORT} cannot be read ({type(error).__name__}); "
            "its checkpoint can be used"
        ) from error


def require_fit(header: StoreHeader, student: StudentConfig, where: object) -> None:
    """Refuse targets that this student cannot learn from.

    Raises:
        MismatchError: view size or grid differ; says both.
    """
    if header.views.size != student.image_size:
        raise MismatchError(
            f"{where} has views of {header.views.size} pixels, the student reads {student.image_size}; set "
            f"student.image_size={header.views.size}, or extract with student.image_size={student.image_size}"
        )
    if tuple(header.teacher.grid) != tuple(student.grid):
        theirs, ours = header.teacher.grid, student.grid
        raise MismatchError(
            f"{where} has a grid of {theirs[0]} x {theirs[1]} patches (teacher {header.teacher.model!r} at "
            f"{header.teacher.image_size} pixels), the student has {ours[0]} x {ours[1]}; change student.patch_size, "
            "or extract with another teacher.image_size"
        )


def _output_width(target: Target, header: StoreHeader, patch_size: int) -> int:
    return 3 * patch_size**2 if target == "pixels" else header.teacher.width


def pretrain(
    targets: str | Path,
    run: str | Path,
    *,
    student: StudentConfig,
    decoder: DecoderConfig,
    masking: MaskConfig,
    target: Target,
    config: PretrainConfig,
    stated: Mapping[str, Mapping[str, Any]] | None = None,
    record: dict[str, Any] | None = None,
    on_progress: Callable[[PretrainProgress], None] = lambda _: None,
) -> PretrainReport:
    """Train a student on a target store and write RUN/checkpoints and RUN/metrics.

    A run that was interrupted goes on from its last checkpoint; on a CPU its losses and weights are then those of an
    unbroken run, to the bit. One that is finished is not done again.

    Args:
        targets: folder or URL of the target store, of either format.
        run: folder of the run.
        target: `clip`, the stored features, or `pixels`, each patch's own normalised pixels.
        stated: settings of `teacher` and `views` that the store must have; see `require_stated`.
        record: settings to keep in the checkpoint beside what it needs itself.

    Raises:
        MissingError, DataError: the store is not there or damaged, or the loss is not finite.
        MismatchError: the store does not fit the student or the settings, or RUN holds a run of another configuration.
        SettingError: the store has fewer samples than a batch, or RUN is a URL.
        StoreError: RUN cannot be written.
        StoppedError: SIGTERM or Ctrl-C came; a checkpoint was written.
    """
    run = local_folder(run, "checkpoints and metrics")
    reader = open_targets(targets)
    require_stated(reader.header, stated or {}, targets)
    require_fit(reader.header, student, targets)
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    steps_per_epoch = batches_per_epoch(sum(samples), config.batch_size)
    steps = steps_per_epoch * config.epochs
    configuration = _configuration(reader.header, samples, student, decoder, masking, target, config)
    there = last_checkpoint(run)
    if there is not None:
        require_same_configuration(there, configuration, run)
        if there.record["finished"]:
            return _finished_report(run, there)
    order = EpochOrder(
        samples=samples,
        views=reader.header.views.count,
        block=BLOCK_SAMPLES,
        window=config.window,
        seed=config.seed,
    )
    device = resolve_device(config.device)
    patch_size = student.image_size // student.grid[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_student(student, decoder, _output_width(target, reader.header, patch_size)).to(device)
    objective = Objective(model, reader.header, masking, target, patch_size)
    peak = config.lr * config.batch_size / 256
    optimiser = build_adamw(model, lr=peak, betas=config.betas, weight_decay=config.weight_decay)
    saver = _Saver(run, model, optimiser, config)
    saver.record = {
        "package_version": __version__,
        "epochs": config.epochs,
        "student": student.model_dump(mode="json"),
        "teacher": reader.header.teacher.model_dump(mode="json"),
        "settings": record or {},
        "configuration": configuration,
    }
    losses = _LossWatch(saver.told)
    first_step = 0
    _make_folder(run)
    if there is not None:
        first_step = saver.restore(there)
        losses.restore(there.record["losses"])
        cut_metrics(run / "metrics", first_step)
    first_epoch, skip = divmod(first_step, steps_per_epoch)
    with (
        stop_requests() as stop,
        Live(
            str(run / "metrics"),
            resume=there is not None,
            save_dvc_exp=False,
            dvcyaml=None,
            report=None,
            monitor_system=False,
        ) as live,
        ThreadPoolExecutor(max_workers=config.threads, thread_name_prefix="decode") as pool,
    ):
        recorder = _Recorder(
            live,
            losses,
            first_step=first_step,
            steps=steps,
            batch_size=config.batch_size,
            log_every=config.log_every,
            on_progress=on_progress,
        )

        def on_step(report: StepReport, batch: Batch) -> None:
            recorder(report, batch)
            if report.step == steps:
                return
            if stop.signal is not None:
                path = saver.save(report.step, losses.state(), finished=False)
                raise StoppedError(
                    f"by {stop.signal.name} after step {report.step} of {steps}; {path} was written, and the same "
                    "command goes on from it",
                    stop.signal,
                )
            if saver.due(report.step):
                saver.save(report.step, losses.state(), finished=False)

        # One prefetcher for all epochs: it goes on across their borders, so that no epoch begins by waiting.
        with closing(
            Prefetcher(
                chain.from_iterable(
                    epoch_batches(
                        reader,
                        order,
                        epoch,
                        config.batch_size,
                        pool,
                        with_targets=target == "clip",
                        skip=skip if epoch == first_epoch else 0,
                    )
                    for epoch in range(first_epoch, config.epochs)
                ),
                ahead=8,
            )
        ) as prefetcher:
            batches = iter(prefetcher)
            train(
                optimiser,
                epochs=config.epochs,
                batches_of=lambda epoch: islice(batches, steps_per_epoch - (skip if epoch == first_epoch else 0)),
                loss_of=objective,
                lr_of=lambda step: cosine_lr(
                    step, steps=steps, warmup_steps=round(config.warmup_epochs * steps_per_epoch), peak=peak
                ),
                on_step=on_step,
                first_epoch=first_epoch,
                first_step=first_step,
            )
    last = recorder.progress
    if last is None:
        raise DataError(f"{targets}: no step was taken")
    report = PretrainReport(
        steps=last.step,
        epochs=config.epochs,
        loss=losses.epoch_mean(),
        images_per_second=last.images_per_second,
        data_wait=last.data_wait,
        seconds=last.seconds,
        checkpoint="",
        resumed_from=first_step,
        steps_now=last.step - first_step,
    )
    # The checkpoint goes last: it is what says that the run is finished.
    (run / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return replace(report, checkpoint=str(saver.save(last.step, losses.state(), finished=True)))
