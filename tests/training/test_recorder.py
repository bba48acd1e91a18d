"""Sums of losses do not depend on when they are read, and go on where a checkpoint left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tasks import NumberTask

from milan_pipe.training.distributed import Ranks
from milan_pipe.training.recorder import Recorder, TrainProgress
from milan_pipe.training.step import StepResult
from milan_pipe.training.task import NotFiniteError

LOSSES = [0.1 * 3**step for step in range(10)]  # sums of these depend on their order
CPU = Ranks(0, 1, torch.device("cpu"))


class ListSink:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, Path]] = []

    def point(self, step: int, values: Any) -> None:
        self.points.append((step, dict(values)))

    def image(self, step: int, file: Path) -> None:
        self.images.append((step, file))


def recorder(log_every: int, seen: list[TrainProgress], *, first_step: int = 0, precision: str = "float32") -> Recorder:
    task = NumberTask(steps=10, steps_per_epoch=4, log_every=log_every, precision=precision)
    return Recorder(task, CPU, seen.append, first_step=first_step)


def add(to: Recorder, step: int, loss: float, norm: float = 1.0) -> None:
    result = StepResult(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
    to.add(step, (f"a{step}", f"z{step}"), result, lr=0.5, seconds=2.0 * step, waited=0.5 * step)


@pytest.mark.parametrize("log_every", [1, 3, 4, 1000])
@pytest.mark.parametrize("settle_at", [(), (2, 5), range(1, 11)])
def test_sums_do_not_depend_on_when_they_are_read(log_every: int, settle_at: tuple[int, ...]) -> None:
    seen: list[TrainProgress] = []
    found = recorder(log_every, seen)
    for step, loss in enumerate(LOSSES, 1):
        add(found, step, loss)
        if step in settle_at:
            found.settle()
    assert found.epoch_mean() == (LOSSES[8] + LOSSES[9]) / 2
    steps = [step for step in range(1, 11) if step % log_every == 0 or step == 10]
    assert [p.step for p in seen] == steps
    for first, last, progress in zip([0, *steps], steps, seen, strict=False):
        assert progress.loss == sum(LOSSES[first:last]) / (last - first)
        assert progress.epoch == (last - 1) // 4


def test_a_state_goes_through_json_and_on_to_the_bit() -> None:
    whole_seen: list[TrainProgress] = []
    second_seen: list[TrainProgress] = []
    whole, first = recorder(4, whole_seen), recorder(4, [])
    for step, loss in enumerate(LOSSES, 1):
        add(whole, step, loss)
        if step <= 6:
            add(first, step, loss)
    second = recorder(4, second_seen, first_step=6)
    second.restore(json.loads(json.dumps(first.state())))
    for step in range(7, 11):
        add(second, step, LOSSES[step - 1])
    assert [p.loss for p in second_seen] == [p.loss for p in whole_seen[1:]]
    assert second.epoch_mean() == whole.epoch_mean()
    # Two of the eight steps are this process's.
    assert [p.images_per_second for p in second_seen] == [2 / 16, 4 / 20]


def test_the_first_value_that_is_not_finite_is_named_however_late_it_is_read() -> None:
    found = recorder(1000, [])
    for step, loss in enumerate([1.0, float("inf"), float("nan")], 1):
        add(found, step, loss)
    with pytest.raises(NotFiniteError, match=r"inf at step 2 .*a2") as caught:
        found.settle()
    assert caught.value.step == 2


def test_a_loss_scale_allows_gradients_that_are_not_finite() -> None:
    strict, scaled = recorder(1000, []), recorder(1000, [], precision="float16")
    for found in (strict, scaled):
        add(found, 1, 1.0, norm=float("inf"))
    scaled.settle()
    with pytest.raises(NotFiniteError, match="norm of the gradient"):
        strict.settle()


def test_every_sink_gets_points_and_images(tmp_path: Path) -> None:
    found = recorder(2, [])
    found.sinks = sinks = [ListSink(), ListSink()]
    add(found, 1, 1.0)
    add(found, 2, 3.0)
    found.image(2, None)
    found.image(2, tmp_path / "x.png")
    for sink in sinks:
        (step, values), *more = sink.points
        assert not more
        assert (step, values["train/loss"], values["train/lr"], values["train/data_wait"]) == (2, 2.0, 0.5, 0.25)
        assert sink.images == [(2, tmp_path / "x.png")]
