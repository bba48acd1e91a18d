"""Stage 2: the student learns from stored targets; no teacher and no source image is touched.

Shape suffixes: B batch, C channels, H height, W width, S = L + 1 tokens (CLS first), L patches, T feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from dvclive.live import Live
from pydantic import Field
from torch import Tensor, nn

from milan_pipe import __version__
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MismatchError, SettingError, StoreError
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
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import checkpoints_of, save_checkpoint
from milan_pipe.training.loop import StepReport, train
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.schedule import cosine_lr

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


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """What a run came to; `loss` is the mean over the last epoch, `data_wait` a share of the time."""

    steps: int
    epochs: int
    loss: float
    images_per_second: float
    data_wait: float
    seconds: float
    checkpoint: str


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
    """Losses of an epoch. They are looked at now and then: reading one makes an accelerator wait."""

    def __init__(self) -> None:
        self._epoch = -1
        self._losses: list[Tensor] = []
        self._unread: list[tuple[StepReport, tuple[str, ...]]] = []

    def add(self, report: StepReport, keys: tuple[str, ...]) -> None:
        """Remember a step; a new epoch begins a new mean."""
        if report.epoch != self._epoch:
            self._epoch = report.epoch
            self._losses.clear()
        self._losses.append(report.loss)
        self._unread.append((report, keys))

    def recent_mean(self) -> float:
        """Mean over the steps since the last call.

        Raises:
            DataError: a loss is not finite; names the first such step and its batch.
        """
        losses = torch.stack([report.loss for report, _ in self._unread]).cpu()
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            at = int((~finite).int().argmax())
            report, keys = self._unread[at]
            raise DataError(
                f"the loss is {losses[at]:g} at step {report.step} (batch of {len(keys)}: {keys[0]} ... {keys[-1]}); "
                "lower pretrain.lr, or check the targets. No checkpoint was written"
            )
        self._unread.clear()
        return float(losses.mean())

    def epoch_mean(self) -> float:
        """Mean over the epoch so far."""
        return float(torch.stack(self._losses).mean())


class _Recorder:
    """Writes RUN/metrics and tells of progress every few steps."""

    def __init__(
        self,
        live: Live,
        *,
        steps: int,
        batch_size: int,
        log_every: int,
        on_progress: Callable[[PretrainProgress], None],
    ) -> None:
        self._live = live
        self._steps = steps
        self._batch_size = batch_size
        self._log_every = log_every
        self._on_progress = on_progress
        self.losses = _LossWatch()
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
            images_per_second=report.step * self._batch_size / report.seconds,
            data_wait=report.data_wait_seconds / report.seconds,
            seconds=report.seconds,
        )
        self._live.step = report.step
        for name in ("loss", "lr", "images_per_second", "data_wait"):
            self._live.log_metric(f"train/{name}", getattr(self.progress, name))
        self._live.sync()  # type: ignore[no-untyped-call]
        self._on_progress(self.progress)


def _open_run(run: Path) -> None:
    """Make the folder of a run.

    Raises:
        SettingError: a finished run is there; its metrics and checkpoint must not mix with those of another.
        StoreError: the folder cannot be made.
    """
    there = checkpoints_of(run)
    if there:
        raise SettingError(f"{run} holds a finished run ({there[-1]}); name another folder, or remove this one first")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{run} cannot be made: {error.strerror or error}; choose another folder") from error


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

    Args:
        targets: folder or URL of the target store, of either format.
        run: folder of the run.
        target: `clip`, the stored features, or `pixels`, each patch's own normalised pixels.
        stated: settings of `teacher` and `views` that the store must have; see `require_stated`.
        record: settings to keep in the checkpoint beside what it needs itself.

    Raises:
        MissingError, DataError: the store is not there or damaged, or the loss is not finite.
        MismatchError: the store does not fit the student or the settings.
        SettingError: the store has fewer samples than a batch, or RUN is a URL or holds a finished run.
        StoreError: RUN cannot be written.
    """
    run = local_folder(run, "checkpoints and metrics")
    reader = open_targets(targets)
    require_stated(reader.header, stated or {}, targets)
    require_fit(reader.header, student, targets)
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    steps_per_epoch = batches_per_epoch(sum(samples), config.batch_size)
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
    steps = steps_per_epoch * config.epochs
    _open_run(run)
    with (
        Live(str(run / "metrics"), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False) as live,
        ThreadPoolExecutor(max_workers=config.threads, thread_name_prefix="decode") as pool,
    ):
        recorder = _Recorder(
            live, steps=steps, batch_size=config.batch_size, log_every=config.log_every, on_progress=on_progress
        )
        # One prefetcher for all epochs: it goes on across their borders, so that no epoch begins by waiting.
        with closing(
            Prefetcher(
                chain.from_iterable(
                    epoch_batches(reader, order, epoch, config.batch_size, pool, with_targets=target == "clip")
                    for epoch in range(config.epochs)
                ),
                ahead=8,
            )
        ) as prefetcher:
            batches = iter(prefetcher)
            train(
                optimiser,
                epochs=config.epochs,
                batches_of=lambda _: islice(batches, steps_per_epoch),
                loss_of=objective,
                lr_of=lambda step: cosine_lr(
                    step, steps=steps, warmup_steps=round(config.warmup_epochs * steps_per_epoch), peak=peak
                ),
                on_step=recorder,
            )
    last = recorder.progress
    if last is None:
        raise DataError(f"{targets}: no step was taken")
    path = save_checkpoint(
        run,
        last.step,
        {"student": model.encoder.state_dict(), "decoder": model.decoder.state_dict()},
        {
            "package_version": __version__,
            "epochs": config.epochs,
            "student": student.model_dump(mode="json"),
            "teacher": reader.header.teacher.model_dump(mode="json"),
            "settings": record or {},
        },
    )
    return PretrainReport(
        steps=last.step,
        epochs=config.epochs,
        loss=recorder.losses.epoch_mean(),
        images_per_second=last.images_per_second,
        data_wait=last.data_wait,
        seconds=last.seconds,
        checkpoint=str(path),
    )
