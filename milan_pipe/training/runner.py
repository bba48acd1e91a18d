"""One run of any kind of training, from its first step, or from where it was interrupted, to its last.

What is learnt is a `Task`. What every run needs is here: one process to a run directory, resuming, steps that are
counted, recorded and saved when due, evaluation, signals, several ranks.
"""

from __future__ import annotations

import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from milan_pipe import __version__
from milan_pipe.config.training import Parallel, RunSettings
from milan_pipe.errors import DataError, StoppedError, StoreError, resource_hint
from milan_pipe.storage import local_folder
from milan_pipe.storage.local import write_file
from milan_pipe.training.checkpoint import Checkpoint, keep_last, save_checkpoint
from milan_pipe.training.distributed import Ranks, joined
from milan_pipe.training.lock import only_writer
from milan_pipe.training.metrics import cut_metrics
from milan_pipe.training.recorder import Keyed, LossWatch, NotFiniteError, Recorder, TrainProgress
from milan_pipe.training.resume import describe_last_checkpoint, last_checkpoint, require_same_configuration
from milan_pipe.training.saver import SavePolicy, Saver
from milan_pipe.training.sinks import Sink, open_sinks
from milan_pipe.training.step import Stepper, StepReport, StepResult
from milan_pipe.training.stopping import StopRequest, stop_requests
from milan_pipe.weights_file import load_weights

B = TypeVar("B", bound=Keyed)
_REPORT, _BEST = "report.json", "best"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run came to.

    Attributes:
        loss: mean over the last epoch.
        scores: of the last weights on VAL, and `best` those of the best step, by the task's main score; empty for a
            task without evaluation.
        images_per_second, data_wait, seconds: of the process that finished it, evaluation left out; `data_wait` is a
            share of the time.
        bad: images that could not be read.
        resumed_from: step after which that process began.
        steps_now: steps that it did; 0 where the run was finished before.
    """

    steps: int
    loss: float
    images_per_second: float
    data_wait: float
    seconds: float
    checkpoint: str
    resumed_from: int
    steps_now: int
    epochs: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_checkpoint: str = ""
    bad: int = 0


class Task(ABC, Generic[B]):
    """What a run learns, on this rank.

    Attributes:
        name: of the command, kept in checkpoints; None for pretraining.
        section: of its settings.
        settings: where and how the run goes.
        configuration: JSON data, all that the weights depend on.
        record: JSON data that says what the weights are.
        batch_size: over all ranks.
        steps, steps_per_epoch: the last epoch may have fewer.
        main_score: name of the score that the best checkpoint has most of; None: there is no evaluation.
        advice: what to do about a loss that is not finite.

    From `build` on:
        objective: a batch to its scalar loss, called as (part, epoch); holds `model`.
        model: what is trained and evaluated.
        modules: what a checkpoint holds, by the names of its files.
    """

    name: str | None
    section: str
    settings: RunSettings
    configuration: Mapping[str, Any]
    record: Mapping[str, Any]
    batch_size: int
    steps: int
    steps_per_epoch: int
    main_score: str | None = None
    advice: str
    parallel: Parallel = "ddp"

    objective: nn.Module
    model: nn.Module
    modules: Mapping[str, nn.Module]

    def build(self) -> None:
        """Make the model, once it is known that there is something to do."""

    @abstractmethod
    def optimiser(self) -> torch.optim.Optimizer:
        """Over the model, which is sharded by then where it will be."""

    @abstractmethod
    def lr(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[B]:
        """This rank's batches of all steps that are left; closed when the run ends."""

    @abstractmethod
    def parts(self, batch: B) -> Sequence[tuple[B, float]]:
        """A batch on the device, in parts with their shares of it."""

    def units(self) -> Iterable[nn.Module]:
        """Parts of the model that FSDP gathers one at a time."""
        return ()

    def before_step(self, step: int) -> None:
        """Called with the number of steps done, before each one."""

    def after_step(self, report: StepReport) -> Path | None:
        """Called when the weights have changed, on every rank; returns a PNG for the sinks, on the first."""
        del report
        return None

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step; the last one always is."""
        del step
        return False

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """Scores on VAL; every rank calls it, and all get the same. `last` says that training is over."""
        raise NotImplementedError

    def plot(self, run: Path, step: int) -> Path | None:
        """Draw something of the last evaluation, on the first rank; returns the PNG."""
        del run, step
        return None

    def bad(self) -> int:
        """Images that could not be read so far, on this rank."""
        return 0

    def explain(self, error: NotFiniteError, weights: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> str:
        """More about a loss that is not finite; every rank calls it. `weights` gathers those that met it."""
        del error, weights
        return ""


@torch.no_grad()
def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Have running statistics be the mean over ranks, which each has counted on its own images."""
    if ranks.count == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(ranks.all_reduce_mean(buffer).to(buffer.dtype))


def run_steps(
    step_of: Callable[[B, int, float], StepResult],
    batches: Iterator[B],
    *,
    steps: int,
    steps_per_epoch: int,
    lr_of: Callable[[int], float],
    on_step: Callable[[StepReport, B], None],
    first_step: int = 0,
) -> int:
    """The one loop of all training: batches in, losses out, steps counted, time distinguished.

    Args:
        step_of: does one step with a batch, its epoch and a learning rate.
        batches: of all steps that are left; the loop ends with them at the latest.
        lr_of: learning rate of step 0, 1, ...
        on_step: called after each step; may raise to stop.
        first_step: steps that were done before.

    Returns:
        Steps done, those before included.
    """
    began, waited, step = time.monotonic(), 0.0, first_step
    while step < steps:
        asked = time.monotonic()
        batch = next(batches, None)
        waited += time.monotonic() - asked
        if batch is None:
            break
        epoch, lr = step // steps_per_epoch, lr_of(step)
        result = step_of(batch, epoch, lr)
        step += 1
        on_step(
            StepReport(
                step=step,
                epoch=epoch,
                result=result,
                lr=lr,
                seconds=time.monotonic() - began,
                data_wait_seconds=waited,
            ),
            batch,
        )
    return step


class _Run(Generic[B]):
    def __init__(self, run: Path, task: Task[B], ranks: Ranks, previous: Checkpoint | None) -> None:
        self.run, self.task, self.ranks = run, task, ranks
        settings = task.settings
        task.build()
        if previous is not None:
            for name, module in task.modules.items():
                load_weights(module, previous.weights(name), str(previous.path))
        loss_of, exchange = ranks.parallelize(task.objective, task.parallel, task.units(), task.model)
        optimiser = task.optimiser()
        weight = _share(ranks, task.batch_size)
        self.stepper = Stepper[B](
            optimiser,
            loss_of,
            split=lambda batch: [(part, share * weight) for part, share in task.parts(batch)],
            device=ranks.device,
            precision=settings.precision,
            clip_grad=settings.clip_grad,
            exchange=exchange,
        )
        self.record = {
            "package_version": __version__,
            **({} if task.name is None else {"task": task.name}),
            "configuration": task.configuration,
            **task.record,
        }
        self.saver = Saver(
            run,
            task.modules,
            task.model,
            optimiser,
            self.stepper.scaler,
            policy=SavePolicy(
                every=settings.checkpoint_every, minutes=settings.checkpoint_minutes, keep=settings.keep_checkpoints
            ),
            ranks=ranks,
            record=self.record,
            advice=task.advice,
        )
        self.losses = LossWatch(
            ranks.all_reduce_mean, norm_must_be_finite=not self.stepper.scaler.is_enabled(), advice=task.advice
        )
        self.first_step = 0
        self.scores: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.last: TrainProgress | None = None
        if previous is not None:
            self.first_step = self.saver.restore(previous)
            state = previous.record
            self.losses.restore(state["losses"])
            self.scores, self.best = dict(state.get("scores", {})), dict(state.get("best", {}))
            self.best_step = int(state.get("best_step", 0))

    def state(self) -> dict[str, Any]:
        average_buffers(self.task.model, self.ranks)
        evaluated = {"scores": self.scores, "best": self.best, "best_step": self.best_step}
        return {"losses": self.losses.state(), **(evaluated if self.task.main_score is not None else {})}

    def _evaluate(self, step: int, main: str, sinks: Sequence[Sink]) -> None:
        task = self.task
        average_buffers(task.model, self.ranks)
        was_training = task.model.training
        task.model.eval()
        try:
            self.scores = task.evaluate(last=step == task.steps)
        finally:
            task.model.train(was_training)
        if not self.best or self.scores[main] > self.best[main]:
            self.best, self.best_step = self.scores, step
            self._save_best(step)
        if self.ranks.first:
            for sink in sinks:
                sink.point(step, {f"val/{name}": value for name, value in self.scores.items()})
            _show(sinks, step, task.plot(self.run, step))

    def _save_best(self, step: int) -> None:
        parts = self.saver.weights()
        if self.ranks.first:
            folder = self.run / _BEST
            save_checkpoint(folder, step, parts, {**self.record, "finished": True, "scores": self.scores})
            keep_last(folder, 1)
        self.ranks.barrier()

    def go(self, on_progress: Callable[[TrainProgress], None], stop: StopRequest, sinks: Sequence[Sink]) -> None:
        """All steps that are left."""
        task, evaluating = self.task, _Clock()
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
        done = self.first_step

        def step_of(batch: B, epoch: int, lr: float) -> StepResult:
            nonlocal done
            task.before_step(done)
            done += 1
            return self.stepper(batch, epoch, lr)

        def on_step(report: StepReport, batch: B) -> None:
            recorder(replace(report, seconds=max(report.seconds - evaluating.seconds, 1e-9)), batch)
            _show(sinks, report.step, task.after_step(report))
            if task.main_score is not None and (report.step == task.steps or task.due(report.step)):
                self.losses.settle()
                with evaluating:
                    self._evaluate(report.step, task.main_score, sinks)
            if report.step != task.steps:
                self._save_or_stop(report.step, stop)

        task.model.train()
        batches = task.batches(self.first_step)
        with ExitStack() as stack:
            if (close := getattr(batches, "close", None)) is not None:
                stack.callback(close)
            run_steps(
                step_of,
                islice(batches, task.steps - self.first_step),
                steps=task.steps,
                steps_per_epoch=task.steps_per_epoch,
                lr_of=task.lr,
                on_step=on_step,
                first_step=self.first_step,
            )
        if recorder.progress is None:
            raise DataError("no step was taken")
        self.last = recorder.progress

    def _save_or_stop(self, step: int, stop: StopRequest) -> None:
        # The ranks have to agree on it.
        number, due = self.ranks.all_reduce_max([stop.signal or 0, self.ranks.first and self.saver.due(step)])
        if not number and not due:
            return
        path = self.saver.save(step, self.state(), finished=False)
        if number:
            raise StoppedError(
                f"by {signal.Signals(number).name} after step {step} of {self.task.steps}; {path} was written, and the "
                "same command goes on from it",
                number,
            )

    def finish(self) -> RunReport:
        """Write report and last checkpoint."""
        last, task = self.last, self.task
        assert last is not None
        report = RunReport(
            steps=last.step,
            epochs=-(-last.step // task.steps_per_epoch),
            loss=self.losses.epoch_mean(),
            scores=self.scores,
            best=self.best,
            best_step=self.best_step,
            best_checkpoint=str(self.run / _BEST) if task.main_score is not None else "",
            images_per_second=last.images_per_second,
            data_wait=last.data_wait,
            seconds=last.seconds,
            bad=task.bad(),
            checkpoint="",
            resumed_from=self.first_step,
            steps_now=last.step - self.first_step,
        )
        state = self.state()
        if self.ranks.first:
            # The checkpoint goes last: it is what says that the run is finished.
            write_file(self.run / _REPORT, json.dumps(asdict(report), indent=2) + "\n")
        return replace(report, checkpoint=str(self.saver.save(last.step, state, finished=True)))


def _show(sinks: Sequence[Sink], step: int, file: Path | None) -> None:
    for sink in sinks if file is not None else ():
        assert file is not None
        sink.image(step, file)


def _share(ranks: Ranks, batch_size: int) -> float:
    # Gradients and losses are averaged over ranks as if their parts were of one size.
    rank, count = ranks.rank, ranks.count
    return ((rank + 1) * batch_size // count - rank * batch_size // count) * count / batch_size


class _Clock(AbstractContextManager["_Clock"]):
    """Seconds spent inside of it, all together."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> _Clock:
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._began


def _finished(run: Path, checkpoint: Checkpoint) -> RunReport:
    try:
        values = json.loads((run / _REPORT).read_text())
        return RunReport(**{**values, "checkpoint": str(checkpoint.path), "steps_now": 0})
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


def run_task(
    run: str | Path,
    device: str,
    task_of: Callable[[Ranks, Path], Task[Any]],
    on_progress: Callable[[TrainProgress], None],
) -> RunReport:
    """Do a run, or go on with it; under torchrun all ranks call it.

    On a CPU the losses and weights of a run that was interrupted are those of an unbroken one, to the bit. One that is
    finished is not done again.

    Args:
        task_of: makes the task of a rank, for the run's folder.

    Raises:
        MismatchError: RUN holds a run of another configuration.
        SettingError: RUN is a URL.
        DataError: a loss is not finite, or the data cannot be used.
        StoreError: RUN cannot be written, or another process writes it.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C came; a checkpoint was written.
        RankLostError, ReportedElsewhereError: see `milan_pipe.training.distributed`.
    """
    folder = local_folder(run, "checkpoints and metrics")
    with (
        joined(device, lambda: describe_last_checkpoint(folder)) as ranks,
        only_writer(folder, ranks),
        torch.random.fork_rng(devices=[]),
    ):
        previous = last_checkpoint(folder)
        task = task_of(ranks, folder)
        shared = f"the run's folder {folder} must be one that all ranks share"
        ranks.require_same(previous and previous.path.name, "last checkpoints", shared)
        ranks.require_same(task.configuration, "settings or data", "start all of them with the same")
        if previous is not None:
            require_same_configuration(previous, task.configuration, folder)
            if previous.record["finished"]:
                return _finished(folder, previous)
        going = _Run(folder, task, ranks, previous)
        if previous is not None and ranks.first:
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
                more = task.explain(error, going.saver.weights)
                raise DataError(f"{error}. {describe_last_checkpoint(folder)}{more}") from error
            return going.finish()
