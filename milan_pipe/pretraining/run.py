"""One run from its first step, or from where it was interrupted, to its last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from dvclive.live import Live

from milan_pipe import __version__
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, SettingError, StoppedError, StoreError
from milan_pipe.loader.order import EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Batch, Prefetcher, epoch_batches
from milan_pipe.pretraining.objective import Teach, build_objective, require_fit
from milan_pipe.pretraining.recorder import LossWatch, PretrainProgress, Recorder
from milan_pipe.pretraining.saver import Saver
from milan_pipe.pretraining.settings import FREE, PretrainConfig, Target
from milan_pipe.storage import local_folder
from milan_pipe.student.decoder import DecoderConfig
from milan_pipe.student.encoder import StudentConfig
from milan_pipe.student.masking import MaskConfig
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.store import open_targets
from milan_pipe.training.checkpoint import Checkpoint
from milan_pipe.training.loop import StepReport, train
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.resume import cut_metrics, last_checkpoint, require_same_configuration
from milan_pipe.training.schedule import cosine_lr
from milan_pipe.training.step import Stepper, resolve_precision
from milan_pipe.training.stopping import stop_requests

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
        "pretrain": config.model_dump(mode="json", exclude=FREE),
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


def pretrain(
    targets: str | Path,
    run: str | Path,
    *,
    student: StudentConfig,
    decoder: DecoderConfig,
    masking: MaskConfig,
    target: Target,
    config: PretrainConfig,
    teacher_for: Callable[[StoreHeader, torch.device], Teach] | None = None,
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
        teacher_for: gives the teacher of a store on a device, where `config.targets` is `online`.
        stated: settings of `teacher` and `views` that the store must have; see `require_stated`.
        record: settings to keep in the checkpoint beside what it needs itself.

    Raises:
        MissingError, DataError: the store is not there or damaged, or the loss is not finite.
        MismatchError: the store does not fit the student or the settings, or RUN holds a run of another configuration.
        SettingError: the store has fewer samples than a batch, RUN is a URL, or online targets are not to be had.
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
    device = resolve_device(config.device)
    config = config.model_copy(update={"precision": resolve_precision(config.precision, device)})
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
    teach = None
    if config.targets == "online":
        if teacher_for is None or target != "clip":
            raise SettingError(
                f"pretrain.targets is 'online' with target {target!r}; it needs target 'clip' and, from Python, "
                "teacher_for"
            )
        teach = teacher_for(reader.header, device)
    objective = build_objective(
        reader.header,
        student=student,
        decoder=decoder,
        masking=masking,
        target=target,
        config=config,
        device=device,
        teach=teach,
    )
    model = objective.student
    peak = config.lr * config.batch_size / 256
    optimiser = build_adamw(model, lr=peak, betas=config.betas, weight_decay=config.weight_decay)
    step_of = Stepper(
        optimiser,
        objective,
        split=lambda batch: batch.parts(config.accumulate),
        device=device,
        precision=config.precision,
        clip_grad=config.clip_grad,
    )
    saver = Saver(run, model, optimiser, step_of.scaler, config)
    saver.record = {
        "package_version": __version__,
        "epochs": config.epochs,
        "student": student.model_dump(mode="json"),
        "teacher": reader.header.teacher.model_dump(mode="json"),
        "settings": record or {},
        "configuration": configuration,
    }
    losses = LossWatch(saver.told)
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
        recorder = Recorder(
            live,
            losses,
            first_step=first_step,
            steps=steps,
            batch_size=config.batch_size,
            log_every=config.log_every,
            device=device,
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
                        with_targets=target == "clip" and teach is None,
                        skip=skip if epoch == first_epoch else 0,
                    )
                    for epoch in range(first_epoch, config.epochs)
                ),
                ahead=8,
            )
        ) as prefetcher:
            batches = iter(prefetcher)
            train(
                step_of,
                epochs=config.epochs,
                batches_of=lambda epoch: islice(batches, steps_per_epoch - (skip if epoch == first_epoch else 0)),
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
