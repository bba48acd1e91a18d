"""One run from its first step, or from where it was interrupted, to its last."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milan_pipe import __version__
from milan_pipe.background import Background
from milan_pipe.config.command import command_of
from milan_pipe.config.params import Params, stated_of
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.errors import DataError, SettingError, StoreError, resource_hint
from milan_pipe.loader.order import BatchPlan, EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Batch, Loader
from milan_pipe.pretraining.bad_batch import write_bad_batch
from milan_pipe.pretraining.configuration import configuration_of
from milan_pipe.pretraining.objective import Objective, Teach, build_objective, require_fit
from milan_pipe.pretraining.pictures import PictureBook
from milan_pipe.storage import local_folder
from milan_pipe.student.model import MaskedStudent
from milan_pipe.student.weights import load_weights
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.store import TargetStore, open_targets
from milan_pipe.training.checkpoint import Checkpoint
from milan_pipe.training.distributed import Ranks, joined
from milan_pipe.training.lock import only_writer
from milan_pipe.training.loop import StepReport
from milan_pipe.training.metrics import cut_metrics
from milan_pipe.training.optim import build_adamw, cosine_lr
from milan_pipe.training.recorder import LossWatch, NotFiniteError, Recorder, TrainProgress
from milan_pipe.training.resume import (
    last_checkpoint,
    require_same_configuration,
    tell_last_checkpoint,
)
from milan_pipe.training.runner import run_steps
from milan_pipe.training.saver import SavePolicy, Saver
from milan_pipe.training.sinks import Sink, open_sinks
from milan_pipe.training.step import Stepper, resolve_precision
from milan_pipe.training.stopping import StopRequest, stop_requests

_REPORT = "report.json"
_SECTIONS = ("student", "masking", "decoder", "target", "pretrain")
_ADVICE = "lower pretrain.lr, or check the targets"


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


def _finished_report(run: Path, checkpoint: Checkpoint) -> PretrainReport:
    try:
        values = json.loads((run / _REPORT).read_text())
        return PretrainReport(**{**values, "checkpoint": str(checkpoint.path), "steps_now": 0})
    except OSError as error:
        raise StoreError(
            f"{run / _REPORT} cannot be read: {resource_hint(error) or error.strerror or error}; {checkpoint.path} is "
            "that of the finished run"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{run} holds a finished run ({checkpoint.path}) whose {_REPORT} cannot be read ({type(error).__name__}); "
            "its checkpoint can be used"
        ) from error


class _Run:
    """The parts of one run, put together."""

    def __init__(
        self,
        run: Path,
        reader: TargetStore,
        objective: Objective,
        plan: BatchPlan,
        config: PretrainSettings,
        ranks: Ranks,
        configuration: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> None:
        self.run = run
        self.reader = reader
        self.plan = plan
        self.config = config
        self.ranks = ranks
        self.configuration = configuration
        self.record = record
        self.steps_per_epoch = plan.steps
        self.steps = plan.steps * config.epochs
        self.peak = config.lr * config.batch_size / 256
        self.first_step = 0
        student = objective.student
        loss_of, exchange = ranks.spread(objective, config.parallel, student.units(), student)
        optimiser = build_adamw(student, lr=self.peak, betas=config.betas, weight_decay=config.weight_decay)
        # Gradients and losses are averaged over ranks as if their parts were of one size.
        weight = plan.size * plan.ranks / plan.batch_size
        self.stepper = Stepper[Batch](
            optimiser,
            loss_of,
            split=lambda batch: [(part, share * weight) for part, share in batch.parts(config.accumulate)],
            device=ranks.device,
            precision=config.precision,
            clip_grad=config.clip_grad,
            exchange=exchange,
        )
        self.pictures = (
            PictureBook(run, reader, objective, config.picture_every, ranks.first) if config.picture_every else None
        )
        self.saver = Saver(
            run,
            {"student": student.encoder, "decoder": student.decoder},
            student,
            optimiser,
            self.stepper.scaler,
            policy=SavePolicy(
                every=config.checkpoint_every, minutes=config.checkpoint_minutes, keep=config.keep_checkpoints
            ),
            ranks=ranks,
            record=record,
            advice=_ADVICE,
        )
        self.losses = LossWatch(ranks.mean, norm_must_be_finite=not self.stepper.scaler.is_enabled(), advice=_ADVICE)

    def resume(self, there: Checkpoint) -> None:
        """Take over all but the weights, which were there before they were sharded."""
        self.first_step = self.saver.restore(there)
        self.losses.restore(there.record["losses"])

    def _batches(self, loader: Loader) -> Iterator[Batch]:
        epoch, skip = divmod(self.first_step, self.steps_per_epoch)
        return chain.from_iterable(
            loader.batches(number, skip if number == epoch else 0) for number in range(epoch, self.config.epochs)
        )

    def _state(self) -> dict[str, Any]:
        return {"losses": self.losses.state()}

    def _draw(self, report: StepReport, sinks: Sequence[Sink]) -> None:
        if self.pictures is None or report.step % self.steps_per_epoch:
            return
        file = self.pictures.after_epoch(report.epoch)
        if file is not None:
            for sink in sinks:
                sink.picture(report.step, file)

    def train(self, recorder: Recorder, loader: Loader, sinks: Sequence[Sink], stop: StopRequest) -> None:
        """All steps that are left."""
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)

        def on_step(report: StepReport, batch: Batch) -> None:
            recorder(report, batch)
            self._draw(report, sinks)

        # One prefetcher for all epochs: it goes on across their borders, so that no epoch begins by waiting.
        with closing(Background(self._batches(loader), 8, "prefetch")) as prefetcher:
            run_steps(
                self.stepper,
                iter(prefetcher),
                steps=self.steps,
                steps_per_epoch=self.steps_per_epoch,
                first_step=self.first_step,
                lr_of=lambda step: cosine_lr(step, steps=self.steps, warmup_steps=warmup, peak=self.peak),
                on_step=on_step,
                saver=self.saver,
                state=self._state,
                ranks=self.ranks,
                stop=stop,
            )

    def keep_bad_batch(self, error: NotFiniteError) -> Path:
        """Have the first rank write the batch of a step, all ranks' parts of it, with the weights that met it."""
        weights = self.saver.weights()
        file = self._write_bad_batch(error, weights) if self.ranks.first else None
        return self.ranks.of_first(file or self.run)

    def _write_bad_batch(self, error: NotFiniteError, weights: Mapping[str, Mapping[str, Tensor]]) -> Path:
        with Loader(self.reader, self.plan.of_rank(0, 1), threads=self.config.threads, with_targets=True) as loader:
            batch = next(loader.batches(error.epoch, (error.step - 1) % self.steps_per_epoch))
        return write_bad_batch(
            self.run,
            batch,
            weights,
            step=error.step,
            epoch=error.epoch,
            header=self.reader.header,
            configuration=self.configuration,
        )

    def finish(self, last: TrainProgress) -> PretrainReport:
        """Write report and last checkpoint."""
        report = PretrainReport(
            steps=last.step,
            epochs=self.config.epochs,
            loss=self.losses.epoch_mean(),
            images_per_second=last.images_per_second,
            data_wait=last.data_wait,
            seconds=last.seconds,
            checkpoint="",
            resumed_from=self.first_step,
            steps_now=last.step - self.first_step,
        )
        if self.ranks.first:
            # The checkpoint goes last: it is what says that the run is finished.
            (self.run / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
        return replace(report, checkpoint=str(self.saver.save(last.step, self._state(), finished=True)))


def _restore_weights(student: MaskedStudent, checkpoint: Checkpoint) -> None:
    """Take the weights over, into a model that is not sharded yet."""
    where = str(checkpoint.path)
    load_weights(student.encoder, checkpoint.weights("student"), where)
    load_weights(student.decoder, checkpoint.weights("decoder"), where)


def _go(run: _Run, with_targets: bool, on_progress: Callable[[TrainProgress], None]) -> PretrainReport:
    config = run.config
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        sinks: Sequence[Sink] = ()
        if run.ranks.first:
            sinks = stack.enter_context(
                open_sinks(run.run / "metrics", config.sinks, goes_on=run.first_step, configuration=run.configuration)
            )
        loader = stack.enter_context(Loader(run.reader, run.plan, threads=config.threads, with_targets=with_targets))
        recorder = Recorder(
            sinks,
            run.losses,
            first_step=run.first_step,
            steps=run.steps,
            batch_size=config.batch_size,
            log_every=config.log_every,
            device=run.ranks.device,
            on_progress=on_progress if run.ranks.first else lambda _: None,
        )
        try:
            run.train(recorder, loader, sinks, stop)
        except NotFiniteError as error:
            file = run.keep_bad_batch(error)
            raise DataError(
                f"{error}. {tell_last_checkpoint(run.run)}. `milan-pipe replay {file}` computes the batch again, with "
                "the weights that met it"
            ) from error
        if recorder.progress is None:
            raise DataError(f"{run.reader.place}: no step was taken")
        return run.finish(recorder.progress)


def _plan_of(reader: TargetStore, config: PretrainSettings, ranks: Ranks) -> BatchPlan:
    """What this rank takes of the store's samples.

    Raises:
        SettingError: there are too few of them, or too few for each rank.
    """
    if ranks.count > 1 and config.batch_size // ranks.count < config.accumulate:
        raise SettingError(
            f"pretrain.batch_size is {config.batch_size}: {ranks.count} ranks with pretrain.accumulate="
            f"{config.accumulate} need at least {ranks.count * config.accumulate}"
        )
    if ranks.first and config.lanes < ranks.count:
        warnings.warn(
            f"pretrain.lanes is {config.lanes} for {ranks.count} ranks: some read what others use; set it to a "
            f"multiple of {ranks.count} for a new run",
            RuntimeWarning,
            stacklevel=2,
        )
    order = EpochOrder(
        samples=tuple(reader.samples(shard) for shard in reader.shards),
        views=reader.header.views.count,
        block=BLOCK_SAMPLES,
        window=config.window,
        seed=config.seed,
    )
    batches_per_epoch(sum(order.samples), config.batch_size)
    return BatchPlan(order=order, batch_size=config.batch_size, lanes=config.lanes, rank=ranks.rank, ranks=ranks.count)


def pretrain(
    targets: str | Path,
    run: str | Path,
    params: Params,
    *,
    teacher_for: Callable[[StoreHeader, torch.device], Teach] | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> PretrainReport:
    """Train a student on a target store and write RUN/checkpoints and RUN/metrics.

    Under torchrun all ranks call it: each takes its part of every batch, the first
    one writes, and all return the report.

    A run that was interrupted goes on from its last checkpoint; on a CPU its losses and weights are then those of an
    unbroken run, to the bit. One that is finished is not done again.

    Args:
        targets: folder or URL of the target store, of either format.
        run: folder of the run.
        params: what is said in it of teacher and views the store must have; see `require_stated`.
        teacher_for: gives the teacher of a store on a device, where `pretrain.targets` is `online`.

    Raises:
        MissingError, DataError: the store is not there or damaged, or the loss is not finite.
        MismatchError: the store does not fit the student or the settings, or RUN holds a run of another configuration.
        SettingError: the store has fewer samples than a batch, RUN is a URL, or online targets are not to be had.
        StoreError: RUN cannot be written, or another process writes it.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C came; a checkpoint was written.
        RankLostError: another rank has died.
        ToldElsewhereError: another rank raised the error that ends all of them.
    """
    run, asked = local_folder(run, "checkpoints and metrics"), params
    with joined(params.pretrain.device, lambda: tell_last_checkpoint(run)) as ranks, only_writer(run, ranks):
        reader = open_targets(targets)
        header = reader.header
        require_stated(header, stated_of(params), targets)
        require_fit(header, params.student, targets)
        precision = resolve_precision(params.pretrain.precision, ranks.device)
        config = params.pretrain.model_copy(update={"precision": precision})
        params = params.model_copy(update={"pretrain": config})
        if config.parallel == "fsdp" and config.precision == "float16":
            raise SettingError("pretrain.parallel='fsdp' has no loss scale for precision 'float16'; use bfloat16")
        plan = _plan_of(reader, config, ranks)
        configuration = configuration_of(header, plan.order.samples, params)
        there = last_checkpoint(run)
        shared = f"the run's folder {run} must be one that all ranks share"
        ranks.require_same(there and there.path.name, "last checkpoints", shared)
        ranks.require_same(configuration, "settings or targets", "start all of them with the same")
        if there is not None:
            require_same_configuration(there, configuration, run)
            if there.record["finished"]:
                return _finished_report(run, there)
        teach = None
        if config.targets == "online":
            if teacher_for is None or params.target != "clip":
                raise SettingError(
                    f"pretrain.targets is 'online' with target {params.target!r}; it needs target 'clip' and, from "
                    "Python, teacher_for"
                )
            teach = teacher_for(header, ranks.device)
        objective = build_objective(header, params, ranks.device, teach)
        if there is not None:
            _restore_weights(objective.student, there)
        kept = {
            "package_version": __version__,
            "epochs": config.epochs,
            "student": params.student.model_dump(mode="json"),
            "teacher": header.teacher.model_dump(mode="json"),
            "settings": asked.model_dump(mode="json", include={"decoder", "masking", "target", "pretrain"}),
            "targets": str(targets),
            "command": command_of("pretrain", [targets, run], asked, _SECTIONS),
            "configuration": configuration,
        }
        going = _Run(run, reader, objective, plan, config, ranks, configuration, kept)
        if there is not None:
            going.resume(there)
            if ranks.first:
                cut_metrics(run / "metrics", going.first_step)
        return _go(going, params.target == "clip" and teach is None, on_progress)
