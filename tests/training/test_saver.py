"""When checkpoints are written, which stay, and what a failed write leaves."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tasks import AdamTask

from milan_pipe.errors import DataError, StoreError
from milan_pipe.training import saver as module
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.saver import Saver


def saver_of(run: Path, *, scaler: bool = False, **settings: Any) -> tuple[Saver, AdamTask, torch.amp.GradScaler]:
    task = AdamTask(**settings)
    optimiser = task.optimiser()
    task.weight.w.grad = torch.ones(())
    optimiser.step()
    scale = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=8.0)
    return Saver(run, task, optimiser, scale, Ranks(0, 1, torch.device("cpu"))), task, scale


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints_of(run)]


def test_it_is_due_by_steps_and_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    saver, _, _ = saver_of(tmp_path, checkpoint_every=5, checkpoint_minutes=2)
    assert [step for step in range(1, 12) if saver.due(step)] == [5, 10]
    now = 119.0
    assert not saver.due(1)
    now = 120.0
    assert saver.due(1)
    saver.save(1, {}, finished=False)
    assert not saver.due(2)
    never, _, _ = saver_of(tmp_path, checkpoint_minutes=None)
    now = 1e9
    assert not never.due(5)


def test_the_last_ones_stay_and_the_best_one_beside_them(tmp_path: Path) -> None:
    saver, _, _ = saver_of(tmp_path, keep_checkpoints=2)
    for step in range(1, 6):
        saver.save(step, {}, finished=False)
        if step in (1, 3):
            saver.save_best(step, {"top1": 0.1 * step})
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    assert names(tmp_path / "best") == ["step-00000003"]
    best = open_checkpoint(tmp_path / "best")
    assert best.record["scores"] == {"top1": pytest.approx(0.3)}
    assert best.files is not None
    assert sorted(best.files) == ["model.safetensors"]


def test_the_best_one_that_the_last_checkpoint_names_stays_until_another_names_its_successor(tmp_path: Path) -> None:
    saver, _, _ = saver_of(tmp_path)
    saver.save_best(1, {"top1": 0.1})
    saver.save(2, {"best_step": 1}, finished=False)
    saver.save_best(3, {"top1": 0.2})
    saver.save_best(4, {"top1": 0.3})
    assert names(tmp_path / "best") == ["step-00000001", "step-00000004"]
    # Here it is killed. It goes on from step 2, and comes to other scores.
    again, _, _ = saver_of(tmp_path)
    again.restore(open_checkpoint(tmp_path))
    assert names(tmp_path / "best") == ["step-00000001"]
    again.save_best(3, {"top1": 0.4})
    again.save(5, {"best_step": 3}, finished=False)
    assert names(tmp_path / "best") == ["step-00000003"]


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, task, _ = saver_of(tmp_path, keep_checkpoints=1)
    saver.save(1, {}, finished=False)
    with monkeypatch.context() as patch:
        patch.setattr("milan_pipe.training.checkpoint.write_weights", full_disk)
        with pytest.raises(StoreError, match="No space left"):
            saver.save(2, {}, finished=False)
    assert names(tmp_path) == ["step-00000001"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"]
    with torch.no_grad():
        task.weight.w.fill_(float("nan"))
    with pytest.raises(DataError, match=r"after step 3 .*step-00000001"):
        saver.save(3, {}, finished=False)
    with pytest.raises(DataError, match="not finite"):
        saver.save_best(3, {})
    assert names(tmp_path) == ["step-00000001"]
    assert names(tmp_path / "best") == []


def test_optimiser_and_loss_scale_are_restored(tmp_path: Path) -> None:
    saver, _, scale = saver_of(tmp_path, scaler=True)
    scale.scale(torch.ones(()))
    scale.update(4.0)
    saver.save(7, {"losses": {"epoch": 2}}, finished=False)
    record = open_checkpoint(tmp_path).record
    assert (record["step"], record["task"], record["kind"], record["losses"]) == (7, "numbers", "number", {"epoch": 2})
    fresh, _, fresh_scale = saver_of(tmp_path, scaler=True)
    fresh.restore(open_checkpoint(tmp_path))
    assert fresh_scale.get_scale() == 4.0
    fresh.save(8, {}, finished=False)
    states = [open_checkpoint(path).weights("optimizer") for path in checkpoints_of(tmp_path)]
    assert states[0].keys() == states[1].keys() == {f"w/{key}" for key in ("exp_avg", "exp_avg_sq", "step")}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_finished_run_keeps_no_optimiser(tmp_path: Path) -> None:
    saver, _, _ = saver_of(tmp_path)
    saver.save(3, {}, finished=True)
    opened = open_checkpoint(tmp_path)
    assert opened.files is not None
    assert opened.record["finished"]
    assert sorted(opened.files) == ["model.safetensors"]
