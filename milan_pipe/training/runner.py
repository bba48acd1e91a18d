"""One run of any task, from its first step, or from where it was interrupted, to its last."""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic

import torch
from torch import nn

from milan_pipe.attention import choose_attention
from milan_pipe.devices import memory_for, resolve_precision
from milan_pipe.errors import DataError, ProcessLostError, StoppedError, StoreError, system_reason
from milan_pipe.storage import local_folder
from milan_pipe.storage.local import read_regular, write_file
from milan_pipe.training.checkpoint import (
    Checkpoint,
    checkpoints_of,
    describe_last_checkpoint,
    open_checkpoint,
    require_same_configuration,
)
from milan_pipe.training.distributed import Ranks, joined
from milan_pipe.training.feed import on_device
from milan_pipe.training.lock import only_writer
from milan_pipe.training.metrics import cut_metrics, flush_metrics
from milan_pipe.training.recorder import OnProgress, Recorder
from milan_pipe.training.saver import BEST, Saver
from milan_pipe.training.sinks import open_sinks
from milan_pipe.training.step import Stepper
from milan_pipe.training.stopping import StopRequest, stop_requests
from milan_pipe.training.task import B, NotFiniteError, RunReport, Task
from milan_pipe.weights_file import load_weights

_METRICS = "metrics"
_REPORT = "report.json"


@torch.no_grad()
def _average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Average running statistics over ranks: each counts its own images."""
    if ranks.count > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_((ranks.all_reduce_sum(buffer) / ranks.count).to(buffer.dtype))


def _others(previous: Checkpoint, task: Task[B]) -> str:
    """That a run was judged on other images than it would be now; empty where it was not."""
    judged = previous.record.get("judged_on")
    if not judged or not task.judged_on or judged == task.judged_on:
        return ""
    changed = [name for name, value in task.judged_on.items() if judged.get(name) != value]
    sides = "; ".join(f"{name} was {judged.get(name)!r}, is {task.judged_on[name]!r}" for name in changed)
    return f"the scores of {previous.path} are of other images ({sides})"


class _Run(Generic[B]):
    def __init__(
        self, folder: Path, task: Task[B], ranks: Ranks, previous: Checkpoint | None, on_progress: OnProgress
    ) -> None:
        self.folder, self.task, self.ranks = folder, task, ranks
        task.build()
        precision = resolve_precision(task.settings.precision, ranks.device)
        if previous is not None:
            for name, module in task.modules.items():
                load_weights(module, previous.weights(name), str(previous.path))
        choose_attention(task.objective, ranks.device, getattr(torch, precision))
        loss_of, exchange = ranks.parallelize(task.objective, task.parallel, task.units(), task.model)
        optimiser = task.optimiser()
        size, rank, count = task.batch_size, ranks.rank, ranks.count
        # Gradients and losses are averaged over ranks as if all had parts of one size.
        weight = ((rank + 1) * size // count - rank * size // count) * count / size
        self.stepper = Stepper[B](
            optimiser,
            loss_of,
            split=lambda batch: [(part, share * weight) for part, share in task.parts(batch)],
            device=ranks.device,
            precision=precision,
            clip_grad=task.settings.clip_grad,
            exchange=exchange,
        )
        section, parts = task.section, task.settings.accumulate
        self._memory = (
            f"{section}.batch_size {size} over {count} ranks with {section}.accumulate {parts}",
            f"try {section}.accumulate={2 * parts}, or a smaller {section}.batch_size",
        )
        self.first_step = 0 if previous is None else int(previous.record["step"])
        self.saver = Saver(folder, task, optimiser, self.stepper.scaler, ranks)
        self.recorder = Recorder(task, ranks, on_progress, first_step=self.first_step)
        state: Mapping[str, Any] = {} if previous is None else previous.record
        self.judged_on = task.judged_on or state.get("judged_on", {})
        scored: Mapping[str, Any] = state
        if previous is not None and (others := _others(previous, task)):
            if ranks.first:
                warnings.warn(f"{others}; the best score is found anew", RuntimeWarning, stacklevel=1)
            scored = {}
        self.scores: dict[str, float] = {} if task.main_score is None else dict(scored.get("scores", {}))
        self.best: dict[str, float] = dict(scored.get("best", {}))
        self.best_step = int(scored.get("best_step", 0))
        if previous is not None:
            self.saver.restore(previous)
            self.recorder.restore(state["losses"])
            self.recorder.score = self.scores.get(task.main_score or "")
            if ranks.first:
                cut_metrics(folder / _METRICS, self.first_step)

    def go(self) -> RunReport:
        task = self.task
        with stop_requests() as stop, ExitStack() as stack:
            if self.ranks.first:
                sinks = open_sinks(self.folder / _METRICS, task.settings.sinks, self.first_step, task.configuration)
                self.recorder.sinks = stack.enter_context(sinks)
            try:
                self._train(stop)
            except NotFiniteError as error:
                more = task.explain(error, self.saver.weights)
                raise DataError(f"{error}. {describe_last_checkpoint(self.folder)}{more}") from error
            except ProcessLostError as error:
                raise ProcessLostError(f"{error}. {describe_last_checkpoint(self.folder)}") from error
            return self._finish()

    def _train(self, stop: StopRequest) -> None:
        task, recorder = self.task, self.recorder
        task.model.train()
        began, waited, evaluating = time.monotonic(), 0.0, 0.0
        with closing(task.batches(self.first_step)) as read:
            batches = on_device(read, self.ranks.device)
            for number in range(self.first_step, task.steps):
                wait_began = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - wait_began
                task.before_step(number)
                lr = task.lr(number)
                with memory_for(*self._memory):
                    result = self.stepper(batch, number // task.steps_per_epoch, lr)
                seconds = max(time.monotonic() - began - evaluating, 1e-9)
                step = number + 1
                recorder.add(step, batch.keys, result, lr=lr, seconds=seconds, waited=waited)
                recorder.image(step, task.after_step(step))
                if task.main_score is not None and (step == task.steps or task.due(step)):
                    recorder.settle()
                    evaluation_began = time.monotonic()
                    with memory_for(*self._memory):
                        self._evaluate(step, task.main_score)
                    evaluating += time.monotonic() - evaluation_began
                if step != task.steps:
                    self._save_or_stop(step, stop)

    def _evaluate(self, step: int, main: str) -> None:
        task = self.task
        _average_buffers(task.model, self.ranks)
        was_training = task.model.training
        task.model.eval()
        began = time.monotonic()
        try:
            self.scores = task.evaluate(last=step == task.steps)
        finally:
            task.model.train(was_training)
        seconds, self.recorder.score = time.monotonic() - began, self.scores[main]
        if not self.best or self.scores[main] > self.best[main]:
            self.best, self.best_step = self.scores, step
            self.saver.save_best(step, self.scores)
        values = {**self.scores, "seconds": seconds}
        self.recorder.point(step, {f"{task.scores_in}/{name}": value for name, value in values.items()})
        if self.ranks.first:
            self.recorder.image(step, task.plot(self.folder, step))

    def _save_or_stop(self, step: int, stop: StopRequest) -> None:
        # All ranks must decide the same.
        number, due = self.ranks.all_reduce_max([stop.signal or 0, self.ranks.first and self.saver.due(step)])
        if not number and not due:
            return
        path = self._save(step, finished=False)
        if number:
            done = f"by {signal.Signals(number).name} after step {step} of {self.task.steps}"
            raise StoppedError(f"{done}; {path} was written, and the same command goes on from it", number)

    def _save(self, step: int, *, finished: bool) -> Path:
        state = self._state()
        if self.ranks.first:
            flush_metrics(self.folder / _METRICS)
        return self.saver.save(step, state, finished=finished)

    def _state(self) -> dict[str, Any]:
        _average_buffers(self.task.model, self.ranks)
        evaluated = {"scores": self.scores, "best": self.best, "best_step": self.best_step}
        if self.judged_on:
            evaluated["judged_on"] = self.judged_on
        # What was best stays, also where a run goes on without evaluation.
        return {"losses": self.recorder.state(), **(evaluated if self.best else {})}

    def _finish(self) -> RunReport:
        last, task = self.recorder.progress, self.task
        assert last is not None
        report = RunReport(
            steps=last.step,
            epochs=-(-last.step // task.steps_per_epoch),
            loss=self.recorder.epoch_mean(),
            scores=self.scores,
            best=self.best,
            best_step=self.best_step,
            best_checkpoint=str(self.folder / BEST) if self.best else "",
            images_per_second=last.images_per_second,
            data_wait=last.data_wait,
            seconds=last.seconds,
            bad=task.bad(),
            checkpoint="",
            resumed_from=self.first_step,
            steps_now=last.step - self.first_step,
        )
        if self.ranks.first:
            # The checkpoint goes last: it marks the run as finished.
            write_file(self.folder / _REPORT, json.dumps(asdict(report), indent=2) + "\n")
        return replace(report, checkpoint=str(self._save(last.step, finished=True)))


def _finished(run: Path, checkpoint: Checkpoint) -> RunReport:
    try:
        values = json.loads(read_regular(run / _REPORT))
        return RunReport(**{**values, "checkpoint": str(checkpoint.path), "steps_now": 0})
    except OSError as error:
        found = f"{run / _REPORT} cannot be read: {system_reason(error)}"
        raise StoreError(f"{found}; {checkpoint.path} is that of the finished run") from error
    except (ValueError, TypeError, RecursionError) as error:
        found = f"{run} holds a finished run ({checkpoint.path}) whose {_REPORT} cannot be read"
        raise DataError(f"{found} ({type(error).__name__}); its checkpoint can be used") from error


def run_task(
    run: str | Path, device: str, task_of: Callable[[Ranks, Path], Task[Any]], on_progress: OnProgress
) -> RunReport:
    """Do a run, or go on with it; under torchrun all ranks call it, and `task_of` for a rank and the run's folder.

    On a CPU the losses and weights of an interrupted run are those of an unbroken one, to the bit. A finished run is
    not done again.

    Raises:
        MismatchError: RUN holds a run of another configuration.
        SettingError: RUN is a URL.
        DataError: a loss is not finite, or the data cannot be used.
        StoreError: RUN cannot be written, or another process writes it.
        DeviceFullError: the device has too little memory for the batch.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C came; a checkpoint was written.
        RankLostError, ReportedElsewhereError: see `milan_pipe.training.distributed`.
    """
    folder = local_folder(run, "checkpoints and metrics")
    with (
        joined(device, lambda: describe_last_checkpoint(folder)) as ranks,
        only_writer(folder, ranks),
        torch.random.fork_rng(devices=[]),
    ):
        found = checkpoints_of(folder)
        previous = open_checkpoint(found[-1]) if found else None
        task = task_of(ranks, folder)
        shared = f"the run's folder {folder} must be one that all ranks share"
        ranks.require_same(previous and previous.path.name, "last checkpoints", shared)
        ranks.require_same(task.configuration, "settings or data", "start all of them with the same")
        if previous is not None:
            require_same_configuration(previous, task.configuration, folder)
            if previous.record.get("finished"):
                if ranks.first and (others := _others(previous, task)):
                    warnings.warn(f"{others}; it is finished, and stays as it is", RuntimeWarning, stacklevel=1)
                return _finished(folder, previous)
        return _Run(folder, task, ranks, previous, on_progress).go()
