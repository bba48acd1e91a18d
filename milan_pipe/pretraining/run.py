"""Pretraining as a task: batches of a target store, the masked student, and what is kept of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from milan_pipe.background import Background
from milan_pipe.config.command import command_of
from milan_pipe.config.params import Params, stated_of
from milan_pipe.errors import SettingError
from milan_pipe.loader.order import BatchPlan, EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Batch, Loader
from milan_pipe.pretraining.bad_batch import write_bad_batch
from milan_pipe.pretraining.configuration import configuration_of
from milan_pipe.pretraining.objective import Objective, Teach, build_objective, require_fit
from milan_pipe.pretraining.plotter import PredictionPlotter
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.store import TargetStore, open_targets
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import build_adamw, cosine_lr
from milan_pipe.training.recorder import NotFiniteError, TrainProgress
from milan_pipe.training.runner import RunReport, Task, run_task
from milan_pipe.training.step import StepReport, resolve_precision

_SECTIONS = ("student", "masking", "decoder", "target", "pretrain")
_AHEAD = 8


class PretrainTask(Task[Batch]):
    """A student that learns from a target store."""

    name = None
    section = "pretrain"
    advice = "lower pretrain.lr, or check the targets"

    def __init__(
        self,
        run: Path,
        reader: TargetStore,
        params: Params,
        ranks: Ranks,
        teacher_for: Callable[[StoreHeader, torch.device], Teach] | None,
    ) -> None:
        precision = resolve_precision(params.pretrain.precision, ranks.device)
        self.settings = self._config = params.pretrain.model_copy(update={"precision": precision})
        self._params = params.model_copy(update={"pretrain": self._config})
        self._run, self._reader, self._ranks, self._teacher_for = run, reader, ranks, teacher_for
        config = self._config
        if config.parallel == "fsdp" and precision == "float16":
            raise SettingError("pretrain.parallel='fsdp' has no loss scale for precision 'float16'; use bfloat16")
        self._plan = _plan_of(reader, params, ranks)
        self.parallel = config.parallel
        self.batch_size = config.batch_size
        self.steps_per_epoch = self._plan.steps
        self.steps = self._plan.steps * config.epochs
        self.configuration = configuration_of(reader.header, self._plan.order.samples, self._params)
        self.record = {
            "epochs": config.epochs,
            "student": params.student.model_dump(mode="json"),
            "teacher": reader.header.teacher.model_dump(mode="json"),
            "settings": params.model_dump(mode="json", include={"decoder", "masking", "target", "pretrain"}),
            "targets": str(reader.location),
            "command": command_of("pretrain", [reader.location, run], params, _SECTIONS),
        }

    def build(self) -> None:
        """Teacher, where it runs in every step, student and loss."""
        params, device = self._params, self._ranks.device
        teach = None
        if self._config.targets == "online":
            if self._teacher_for is None or params.target != "clip":
                raise SettingError(
                    f"pretrain.targets is 'online' with target {params.target!r}; it needs target 'clip' and, from "
                    "Python, teacher_for"
                )
            teach = self._teacher_for(self._reader.header, device)
        self._with_targets = params.target == "clip" and teach is None
        self.objective: Objective = build_objective(self._reader.header, params, device, teach)
        self.model = student = self.objective.student
        self.modules = {"student": student.encoder, "decoder": student.decoder}
        every, first = self._config.plot_every, self._ranks.first
        self._images = PredictionPlotter(self._run, self._reader, self.objective, every, first) if every else None

    def optimiser(self) -> torch.optim.Optimizer:
        """AdamW; its rate is set before each step."""
        config = self._config
        return build_adamw(self.model, lr=self._peak, betas=config.betas, weight_decay=config.weight_decay)

    @property
    def _peak(self) -> float:
        return self._config.lr * self._config.batch_size / 256

    def lr(self, step: int) -> float:
        """Cosine per step after a linear warm-up."""
        warmup = round(self._config.warmup_epochs * self.steps_per_epoch)
        return cosine_lr(step, steps=self.steps, warmup_steps=warmup, peak=self._peak)

    def units(self) -> Iterable[nn.Module]:
        """The student's blocks."""
        return self.objective.student.units()

    def batches(self, first_step: int) -> Iterator[Batch]:
        """This rank's part of every batch, read ahead across the borders of epochs: no epoch begins by waiting."""
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        with Loader(self._reader, self._plan, threads=self._config.threads, with_targets=self._with_targets) as loader:
            epochs = (
                loader.batches(number, skip if number == epoch else 0) for number in range(epoch, self._config.epochs)
            )
            with closing(Background(chain.from_iterable(epochs), _AHEAD, "prefetch")) as ahead:
                yield from ahead

    def parts(self, batch: Batch) -> Sequence[tuple[Batch, float]]:
        """Cut for accumulation; the objective brings it to the device."""
        return batch.parts(self._config.accumulate)

    def after_step(self, report: StepReport) -> Path | None:
        """Draw predictions at the end of every few epochs."""
        if self._images is None or report.step % self.steps_per_epoch:
            return None
        return self._images.after_epoch(report.epoch)

    def explain(self, error: NotFiniteError, weights: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> str:
        """Have the first rank write the batch of a step, all ranks' parts of it, with the weights that met it."""
        met = weights()
        file = self._write_bad_batch(error, met) if self._ranks.first else None
        file = self._ranks.broadcast(file or self._run)
        return f". `milan-pipe replay {file}` computes the batch again, with the weights that met it"

    def _write_bad_batch(self, error: NotFiniteError, weights: Mapping[str, Mapping[str, Tensor]]) -> Path:
        plan = self._plan.of_rank(0, 1)
        with Loader(self._reader, plan, threads=self._config.threads, with_targets=True) as loader:
            batch = next(loader.batches(error.epoch, (error.step - 1) % self.steps_per_epoch))
        return write_bad_batch(
            self._run,
            batch,
            weights,
            step=error.step,
            epoch=error.epoch,
            header=self._reader.header,
            configuration=self.configuration,
        )


def _plan_of(reader: TargetStore, params: Params, ranks: Ranks) -> BatchPlan:
    """What this rank takes of the store's samples.

    Raises:
        SettingError: there are too few of them, or too few for each rank.
    """
    config = params.pretrain
    if ranks.count > 1 and config.batch_size // ranks.count < config.accumulate:
        raise SettingError(
            f"pretrain.batch_size is {config.batch_size}: {ranks.count} ranks with pretrain.accumulate="
            f"{config.accumulate} need at least {ranks.count * config.accumulate}"
        )
    if ranks.first and config.canonical_streams < ranks.count:
        warnings.warn(
            f"pretrain.canonical_streams is {config.canonical_streams} for {ranks.count} ranks: some read what others "
            f"use; set it to a multiple of {ranks.count} for a new run",
            RuntimeWarning,
            stacklevel=2,
        )
    order = EpochOrder(
        samples=tuple(reader.samples(shard) for shard in reader.shards),
        views=reader.header.views.count,
        block=BLOCK_SAMPLES,
        shuffle_blocks=config.shuffle_blocks,
        seed=config.seed,
    )
    batches_per_epoch(sum(order.samples), config.batch_size)
    return BatchPlan(
        order=order,
        batch_size=config.batch_size,
        canonical_streams=config.canonical_streams,
        rank=ranks.rank,
        ranks=ranks.count,
    )


def pretrain(
    targets: str | Path,
    run: str | Path,
    params: Params,
    *,
    teacher_for: Callable[[StoreHeader, torch.device], Teach] | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train a student on a target store and write RUN/checkpoints and RUN/metrics; see `run_task`.

    Under torchrun all ranks call it: each takes its part of every batch, the first one writes, and all return the
    report.

    Args:
        targets: folder or URL of the target store, of either format.
        run: folder of the run.
        params: what is said in it of teacher and views the store must have; see `require_stated`.
        teacher_for: gives the teacher of a store on a device, where `pretrain.targets` is `online`.

    Raises:
        MissingError, DataError: the store is not there or damaged, or the loss is not finite.
        MismatchError: the store does not fit the student or the settings, or RUN holds a run of another configuration.
        SettingError: the store has fewer samples than a batch, RUN is a URL, or online targets are not to be had.
        StoreError, StoppedError, RankLostError, ReportedElsewhereError: as `run_task`.
    """

    def task_of(ranks: Ranks, folder: Path) -> PretrainTask:
        reader = open_targets(targets)
        require_stated(reader.header, stated_of(params), targets)
        require_fit(reader.header, params.student, targets)
        return PretrainTask(folder, reader, params, ranks, teacher_for)

    return run_task(run, params.pretrain.device, task_of, on_progress)
