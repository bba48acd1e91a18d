"""One supervised run, whatever the task: the loop, checkpoints and stops of pretraining, plus evaluation and a best.

A task says what is learnt; this says how a run of it goes.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from milan_pipe import __version__
from milan_pipe.config.training import RunSettings
from milan_pipe.errors import DataError, StoreError, resource_hint
from milan_pipe.evaluation.randomness import seed_of
from milan_pipe.storage import local_folder
from milan_pipe.student.weights import load_weights
from milan_pipe.training.checkpoint import Checkpoint, keep_last, save_checkpoint
from milan_pipe.training.distributed import Ranks, joined
from milan_pipe.training.lock import only_writer
from milan_pipe.training.loop import StepReport
from milan_pipe.training.metrics import cut_metrics
from milan_pipe.training.recorder import Keyed, LossWatch, NotFiniteError, Recorder, TrainProgress
from milan_pipe.training.resume import (
    last_checkpoint,
    require_same_configuration,
    tell_last_checkpoint,
)
from milan_pipe.training.runner import run_steps
from milan_pipe.training.saver import SavePolicy, Saver
from milan_pipe.training.sinks import Sink, open_sinks
from milan_pipe.training.step import Stepper, StepResult
from milan_pipe.training.stopping import StopRequest, stop_requests

B = TypeVar("B", bound=Keyed)
_REPORT = "report.json"
_BEST = "best"


@dataclass(frozen=True, kw_only=True)
class SupervisedReport:
    """What a run came to.

    `loss` is the mean over the last epoch; `scores` are those of the last weights on VAL, `best` those of the best
    step, by the task's main score. Rates and `seconds` are those of the process that finished it, evaluation left out.
    """

    steps: int
    loss: float
    scores: dict[str, float]
    best: dict[str, float]
    best_step: int
    images_per_second: float
    data_wait: float
    seconds: float
    bad: int
    checkpoint: str
    best_checkpoint: str
    resumed_from: int
    steps_now: int


class Task(ABC, Generic[B]):
    """What a supervised run learns, on this rank.

    Attributes:
        name: of the command, kept in checkpoints.
        section: of its settings.
        settings: where and how the run goes.
        objective: a batch to its scalar loss, called as (part, epoch); holds `model`.
        model: what is trained and evaluated.
        optimiser: over the model.
        modules: what a checkpoint holds, by the names of its files.
        configuration: JSON data, all that the weights depend on.
        record: JSON data that tells what the weights are.
        batch_size: over all ranks.
        main_score: name of the score that the best checkpoint has most of.
    """

    name: str
    section: str
    settings: RunSettings
    objective: nn.Module
    model: nn.Module
    optimiser: torch.optim.Optimizer
    modules: Mapping[str, nn.Module]
    configuration: Mapping[str, Any]
    record: Mapping[str, Any]
    batch_size: int
    steps: int
    steps_per_epoch: int
    main_score: str

    @abstractmethod
    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[B]:
        """This rank's batches of all steps that are left."""

    @abstractmethod
    def parts(self, batch: B) -> Sequence[tuple[B, float]]:
        """A batch on the device, in parts with their shares of it."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether to evaluate after this step; the last one always is."""

    @abstractmethod
    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Scores on VAL; every rank calls it, and all get the same. `last` says that training is over."""

    def after_step(self, step: int) -> None:
        """Told when the weights have changed."""

    def pictures(self, run: Path, step: int) -> Path | None:
        """Draw something of the last evaluation, on the first rank; returns the PNG."""
        del run, step
        return None

    def bad(self) -> int:
        """Pictures that could not be read so far, on this rank."""
        return 0


@torch.no_grad()
def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Have running statistics be the mean over ranks, which each has counted on its own pictures."""
    if ranks.count == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(ranks.mean(buffer).to(buffer.dtype))


class _Run(Generic[B]):
    def __init__(self, run: Path, task: Task[B], ranks: Ranks, there: Checkpoint | None) -> None:
        self.run = run
        self.task = task
        self.ranks = ranks
        settings = task.settings
        advice = f"lower {task.section}.lr, or look at the pictures"
        if there is not None:
            for name, module in task.modules.items():
                load_weights(module, there.weights(name), str(there.path))
        if settings.compile:
            task.model.compile()
        loss_of, exchange = ranks.spread(task.objective, "ddp", (), task.objective)
        weight = self._weight()
        self.stepper = Stepper[B](
            task.optimiser,
            loss_of,
            split=lambda batch: [(part, share * weight) for part, share in task.parts(batch)],
            device=ranks.device,
            precision=settings.precision,
            clip_grad=settings.clip_grad,
            exchange=exchange,
        )
        record = {
            "package_version": __version__,
            "task": task.name,
            "configuration": task.configuration,
            **task.record,
        }
        self.record = record
        self.saver = Saver(
            run,
            task.modules,
            task.model,
            task.optimiser,
            self.stepper.scaler,
            policy=SavePolicy(
                every=settings.checkpoint_every, minutes=settings.checkpoint_minutes, keep=settings.keep_checkpoints
            ),
            ranks=ranks,
            record=record,
            advice=advice,
        )
        self.losses = LossWatch(ranks.mean, norm_must_be_finite=not self.stepper.scaler.is_enabled(), advice=advice)
        self.first_step = 0
        self.scores: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.paused = 0.0
        if there is not None:
            self.first_step = self.saver.restore(there)
            self.losses.restore(there.record["losses"])
            self.scores, self.best = dict(there.record["scores"]), dict(there.record["best"])
            self.best_step = int(there.record["best_step"])

    def _weight(self) -> float:
        # Gradients and losses are averaged over ranks as if their parts were of one size.
        rank, ranks, size = self.ranks.rank, self.ranks.count, self.task.batch_size
        return ((rank + 1) * size // ranks - rank * size // ranks) * ranks / size

    def state(self) -> dict[str, Any]:
        average_buffers(self.task.model, self.ranks)
        return {
            "losses": self.losses.state(),
            "scores": self.scores,
            "best": self.best,
            "best_step": self.best_step,
        }

    def step(self, batch: B, epoch: int, lr: float) -> StepResult:
        # Drop path draws from the device's global generator.
        torch.manual_seed(seed_of(self.task.settings.seed, self.steps_done, self.ranks.rank))
        self.steps_done += 1
        return self.stepper(batch, epoch, lr)

    def _evaluate(self, step: int, sinks: Sequence[Sink]) -> None:
        average_buffers(self.task.model, self.ranks)
        was_training = self.task.model.training
        self.task.model.eval()
        try:
            self.scores = self.task.evaluate(last=step == self.task.steps)
        finally:
            self.task.model.train(was_training)
        main = self.task.main_score
        if not self.best or self.scores[main] > self.best[main]:
            self.best, self.best_step = self.scores, step
            self._save_best(step)
        if self.ranks.first:
            for sink in sinks:
                sink.point(step, {f"val/{name}": value for name, value in self.scores.items()})
            file = self.task.pictures(self.run, step)
            for sink in sinks if file is not None else ():
                assert file is not None
                sink.picture(step, file)

    def _save_best(self, step: int) -> None:
        parts = self.saver.weights()
        if self.ranks.first:
            folder = self.run / _BEST
            save_checkpoint(folder, step, parts, {**self.record, "finished": True, "scores": self.scores})
            keep_last(folder, 1)
        self.ranks.wait()

    def go(self, on_progress: Callable[[TrainProgress], None], stop: StopRequest, sinks: Sequence[Sink]) -> None:
        task = self.task
        self.steps_done = self.first_step
        recorder = Recorder(
            sinks,
            self.losses,
            first_step=self.first_step,
            steps=task.steps,
            batch_size=task.batch_size,
            log_every=task.settings.log_every,
            device=self.ranks.device,
            on_progress=on_progress if self.ranks.first else lambda _: None,
        )
        clock = _Clock()

        def on_step(report: StepReport, batch: B) -> None:
            task.after_step(report.step)
            recorder(replace(report, seconds=max(report.seconds - clock.seconds, 1e-9)), batch)
            if report.step == task.steps or task.due(report.step):
                self.losses.settle()
                with clock:
                    self._evaluate(report.step, sinks)

        task.model.train()
        run_steps(
            self.step,
            task.batches(self.first_step),
            steps=task.steps,
            steps_per_epoch=task.steps_per_epoch,
            first_step=self.first_step,
            lr_of=task.lr,
            on_step=on_step,
            saver=self.saver,
            state=self.state,
            ranks=self.ranks,
            stop=stop,
        )
        if recorder.progress is None:
            raise DataError("no step was taken")
        self.last = recorder.progress

    def finish(self) -> SupervisedReport:
        """Write report and last checkpoint."""
        last = self.last
        best = self.run / _BEST
        report = SupervisedReport(
            steps=last.step,
            loss=self.losses.epoch_mean(),
            scores=self.scores,
            best=self.best,
            best_step=self.best_step,
            images_per_second=last.images_per_second,
            data_wait=last.data_wait,
            seconds=last.seconds,
            bad=self.task.bad(),
            checkpoint="",
            best_checkpoint=str(best),
            resumed_from=self.first_step,
            steps_now=last.step - self.first_step,
        )
        state = self.state()
        if self.ranks.first:
            # The checkpoint goes last: it is what says that the run is finished.
            (self.run / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
        return replace(report, checkpoint=str(self.saver.save(last.step, state, finished=True)))


class _Clock(AbstractContextManager["_Clock"]):
    """Seconds spent inside of it, all together."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> _Clock:
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._began


def _finished(run: Path, checkpoint: Checkpoint) -> SupervisedReport:
    try:
        values = json.loads((run / _REPORT).read_text())
        return SupervisedReport(**{**values, "checkpoint": str(checkpoint.path), "steps_now": 0})
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


def run_supervised(
    run: str | Path,
    device: str,
    build: Callable[[Ranks, Path], Task[Any]],
    on_progress: Callable[[TrainProgress], None],
) -> SupervisedReport:
    """Do a run, or go on with it; under torchrun all ranks call it.

    Args:
        build: makes the task of a rank; told the run's folder, which is there.

    Raises:
        MismatchError: RUN holds a run of another configuration.
        DataError: a loss is not finite, or the data cannot be used.
        StoreError: RUN cannot be written, or another process writes it.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C came; a checkpoint was written.
        RankLostError, ToldElsewhereError: see `milan_pipe.training.distributed`.
    """
    folder = local_folder(run, "checkpoints and metrics")
    with (
        joined(device, lambda: tell_last_checkpoint(folder)) as ranks,
        only_writer(folder, ranks),
        torch.random.fork_rng(devices=[]),
    ):
        there = last_checkpoint(folder)
        task = build(ranks, folder)
        shared = f"the run's folder {folder} must be one that all ranks share"
        ranks.require_same(there and there.path.name, "last checkpoints", shared)
        ranks.require_same(task.configuration, "settings or data", "start all of them with the same")
        if there is not None:
            require_same_configuration(there, task.configuration, folder)
            if there.record["finished"]:
                return _finished(folder, there)
        going = _Run(folder, task, ranks, there)
        if there is not None and ranks.first:
            cut_metrics(folder / "metrics", going.first_step)
        with ExitStack() as stack:
            stop = stack.enter_context(stop_requests())
            sinks: Sequence[Sink] = ()
            if ranks.first:
                sinks = stack.enter_context(
                    open_sinks(
                        folder / "metrics",
                        task.settings.sinks,
                        goes_on=going.first_step,
                        configuration=task.configuration,
                    )
                )
            try:
                going.go(on_progress, stop, sinks)
            except NotFiniteError as error:
                raise DataError(f"{error}. {tell_last_checkpoint(folder)}") from error
            return going.finish()
