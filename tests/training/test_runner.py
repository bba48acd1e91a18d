"""The one runner, with a task of one number: steps, epochs, rates, evaluation, the way on after an interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tasks import AdamTask, Number, NumberTask
from support.training import StopAtError, stop_at

from milan_pipe.errors import DataError, MismatchError, StoppedError, StoreError
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import run_task
from milan_pipe.training.task import NotFiniteError, RunReport


def go(run: Path, task: NumberTask, on_progress: object = None) -> RunReport:
    return run_task(run, "cpu", lambda *_: task, on_progress or (lambda _: None))  # type: ignore[arg-type]


def test_steps_are_counted_and_each_has_its_epoch_and_rate(tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    task = NumberTask()
    report = go(tmp_path, task, seen.append)
    assert (report.steps, report.epochs, report.steps_now, report.resumed_from) == (3, 2, 3, 0)
    assert [(p.step, p.steps, p.epoch, p.lr) for p in seen] == [(1, 3, 0, 1.0), (2, 3, 0, 10.0), (3, 3, 1, 100.0)]
    # Gradients do not pile up: -1, then -1 - 10 x 2, then -21 - 100 x (3 + 1).
    assert task.calls == [
        *[("before", 0), ("after", 1, -1.0)],
        *[("before", 1), ("after", 2, -21.0)],
        *[("before", 2), ("after", 3, -421.0)],
        ("closed",),
    ]
    assert [p.loss for p in seen] == [0.0, -2.0, -84.0]
    assert [p.grad_norm for p in seen] == [1.0, 2.0, 4.0]
    assert report.loss == -84.0
    assert json.loads((tmp_path / "report.json").read_text())["loss"] == -84.0


def test_waiting_for_data_differs_from_work(tmp_path: Path) -> None:
    class Slow(NumberTask):
        def batches(self, first_step: int) -> Generator[Number]:
            for batch in super().batches(first_step):
                time.sleep(0.05)
                yield batch

        def before_step(self, step: int) -> None:
            del step
            time.sleep(0.1)

    report = go(tmp_path, Slow(steps=2))
    assert report.seconds >= 0.3
    assert report.seconds * report.data_wait >= 0.1
    assert report.seconds * (1 - report.data_wait) >= 0.2


def test_evaluation_is_not_counted_and_the_best_step_is_kept(tmp_path: Path) -> None:
    class Judged(NumberTask):
        def evaluate(self, *, last: bool) -> dict[str, float]:
            time.sleep(0.2)
            return super().evaluate(last=last)

    task = Judged(scores=[0.1, 0.7, 0.5])
    report = go(tmp_path, task)
    assert [call for call in task.calls if call[0] == "evaluate"] == [
        ("evaluate", last, False) for last in (False, False, True)
    ]
    assert task.model.training
    assert report.seconds < 0.4
    assert (report.scores, report.best, report.best_step) == ({"top1": 0.5}, {"top1": 0.7}, 2)
    best = open_checkpoint(report.best_checkpoint)
    assert (best.record["step"], best.record["scores"], best.record["task"]) == (2, {"top1": 0.7}, "numbers")
    assert best.weights("model")["w"] == -21.0


def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def task() -> AdamTask:
        return AdamTask(steps=9, steps_per_epoch=4, checkpoint_every=2, scores=[0.1, 0.9, *[0.2] * 7])

    whole = go(tmp_path / "whole", task())
    with pytest.raises(StopAtError):
        go(tmp_path / "broken", task(), stop_at(7))
    second = task()
    report = go(tmp_path / "broken", second)
    assert (report.resumed_from, report.steps_now) == (6, 3)
    assert second.calls[0] == ("before", 6)
    assert (report.loss, report.best, report.best_step) == (whole.loss, whole.best, 2)
    files = [open_checkpoint(tmp_path / name).path / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tables = [tmp_path / name / "metrics" / "plots" / "metrics" / "train" / "loss.tsv" for name in ("whole", "broken")]
    losses = [[line.split("\t")[-2:] for line in table.read_text().splitlines()] for table in tables]
    assert losses[0] == losses[1]


def test_the_callers_random_numbers_go_on(tmp_path: Path) -> None:
    class Seeded(NumberTask):
        def before_step(self, step: int) -> None:
            torch.manual_seed(step)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    go(tmp_path, Seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_run_is_not_done_again_and_another_one_is_refused(tmp_path: Path) -> None:
    first = go(tmp_path, NumberTask())
    again = NumberTask()
    report = go(tmp_path, again)
    assert again.calls == []
    assert (report.loss, report.steps_now, report.checkpoint) == (first.loss, 0, first.checkpoint)
    with pytest.raises(MismatchError, match="steps: the run has 3"):
        go(tmp_path, NumberTask(steps=4))
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report\.json"):
        go(tmp_path, NumberTask())
    (tmp_path / "report.json").unlink()
    with pytest.raises(StoreError, match=r"report\.json"):
        go(tmp_path, NumberTask())


def test_a_signal_saves_and_stops_between_two_steps(tmp_path: Path) -> None:
    class Interrupted(AdamTask):
        def before_step(self, step: int) -> None:
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    task = Interrupted()
    with pytest.raises(StoppedError, match="SIGTERM after step 2 of 3") as caught:
        go(tmp_path, task)
    assert caught.value.signal == signal.SIGTERM
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000002"]
    assert task.calls[-1] == ("closed",)
    assert go(tmp_path, AdamTask()).steps_now == 1


def test_a_loss_that_is_not_finite_is_explained_by_the_task(tmp_path: Path) -> None:
    class Broken(AdamTask):
        def batches(self, first_step: int) -> Generator[Number]:
            for batch in super().batches(first_step):
                yield replace(batch, value=math.inf) if batch.value == 3 else batch

        def explain(self, error: NotFiniteError, weights: Callable[[], object]) -> str:
            return f". The task saw {error.step} {weights()}"

    with pytest.raises(DataError, match=r"key-3.*step-00000002.* saw 3 \{'model"):
        go(tmp_path, Broken(checkpoint_every=1))
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000001", "step-00000002"]
