"""What the errors of training say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import change_record
from support.messages import Case, require_message
from support.tasks import AdamTask, NumberTask

from milan_pipe.devices import memory_for
from milan_pipe.errors import DataError, DeviceFullError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.training.checkpoint import open_checkpoint, save_checkpoint
from milan_pipe.training.distributed import Ranks, joined
from milan_pipe.training.recorder import Recorder
from milan_pipe.training.runner import run_task
from milan_pipe.training.saver import Saver
from milan_pipe.training.step import StepResult
from milan_pipe.training.task import NotFiniteError

CPU = Ranks(0, 1, torch.device("cpu"))
STEP = "run/checkpoints/step-00000007"


def saved(step: int = 7) -> Path:
    return save_checkpoint(Path("run"), step, {"student": {"w": torch.ones(4)}}, {"x": 0.125})


def read(change: Callable[[Path], object] = lambda _: None, part: str = "student", earlier: int | None = None) -> None:
    """Read a checkpoint whose folder was changed."""
    if earlier:
        saved(earlier)
    change(saved())
    open_checkpoint("run").weights(part)


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def blocked() -> None:
    Path("run").mkdir()
    Path("run/checkpoints").touch()
    saved()


def not_finite_weights() -> None:
    task = AdamTask()
    with torch.no_grad():
        task.weight.w.fill_(float("nan"))
    Saver(Path("run"), task, task.optimiser(), torch.amp.GradScaler("cpu", enabled=False), CPU).save(
        3, {}, finished=False
    )


def not_finite(loss: float, norm: float) -> None:
    recorder = Recorder(NumberTask(), CPU, lambda _: None, first_step=0)
    recorder.add(2, ("a", "z"), StepResult(torch.tensor(loss), torch.tensor(norm)), lr=1.0, seconds=1.0, waited=0.0)
    recorder.settle()


def train(*steps: int) -> None:
    for count in steps:
        run_task(Path("run"), "cpu", lambda *_, count=count: NumberTask(steps=count), lambda _: None)


def full_device() -> None:
    class FullTask(NumberTask):
        def parts(self, batch: object) -> Any:
            del batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run_task(Path("run"), "cpu", lambda *_: FullTask(accumulate=2), lambda _: None)


def full_memory() -> None:
    with memory_for("a model", "try a smaller one"):
        torch.empty(2**60)


def finished_without_report() -> None:
    train(3)
    Path("run/report.json").write_text("{")
    train(3)


def ranks(world: str, rank: str | None = None) -> Callable[[], None]:
    def join() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", world)
            patch.delenv("RANK", raising=False)
            if rank is not None:
                patch.setenv("RANK", rank)
                patch.setenv("LOCAL_RANK", "0")
            with joined("cpu", str):
                pass

    return join


AGAIN = f"there is no earlier checkpoint; copy it again, or remove {STEP} to begin its run again"
CASES: dict[str, Case] = {
    "no run": (
        lambda: open_checkpoint("run"),
        MissingError,
        "run is not there; expected a run folder or a checkpoint folder",
    ),
    "no checkpoint": (
        lambda: (Path("run").mkdir(), open_checkpoint("run")),
        MissingError,
        "run has no checkpoint; expected run/checkpoints/step-NNNNNNNN/checkpoint.json",
    ),
    "lost record": (
        lambda: read(lambda folder: (folder / "checkpoint.json").unlink()),
        DataError,
        f"{STEP}/checkpoint.json is lost; {AGAIN}",
    ),
    "cut record": (
        lambda: read(edit("checkpoint.json", lambda data: data[:9])),
        DataError,
        f"{STEP}/checkpoint.json is damaged (JSONDecodeError); {AGAIN}",
    ),
    "changed record": (
        lambda: read(edit("checkpoint.json", lambda data: data.replace(b"0.125", b"0.625"))),
        DataError,
        f"{STEP}/checkpoint.json is damaged: its values do not fit their digest; {AGAIN}",
    ),
    "other version": (
        lambda: read(lambda folder: change_record(folder, lambda record: record.update(version=99))),
        MismatchError,
        f"{STEP} has checkpoint version 99, this milan-pipe reads 1",
    ),
    "no such part": (lambda: read(part="decoder"), MissingError, f"{STEP} has no decoder.safetensors; ..."),
    "cut part": (
        lambda: read(edit("student.safetensors", lambda data: data[:9])),
        DataError,
        f"{STEP}/student.safetensors is damaged: it has 9 bytes, checkpoint.json says ...; {AGAIN}",
    ),
    "flipped bit": (
        lambda: read(edit("student.safetensors", lambda data: data[:-1] + b"\1"), earlier=5),
        DataError,
        f"{STEP}/student.safetensors is damaged: its SHA-256 is ..., checkpoint.json says ...; use the earlier "
        "checkpoint run/checkpoints/step-00000005; with step-00000007 removed, its run goes on from that one",
    ),
    "blocked": (blocked, StoreError, f"checkpoint {STEP} cannot be written: ..."),
    "weights not finite": (
        not_finite_weights,
        DataError,
        "after step 3 'w' of the model is not finite; take smaller numbers. ...",
    ),
    "loss not finite": (
        lambda: not_finite(float("inf"), 1.0),
        NotFiniteError,
        "the loss is inf at step 2 (batch of 2: a ... z); take smaller numbers",
    ),
    "gradient not finite": (
        lambda: not_finite(1.0, float("nan")),
        NotFiniteError,
        "the norm of the gradient is nan at step 2 (batch of 2: a ... z); take smaller numbers",
    ),
    "other settings": (
        lambda: train(3, 4),
        MismatchError,
        "run holds a run of another configuration (step-00000003): steps: the run has 3, the settings say 4. Use the "
        "same settings and data to go on, or name another folder",
    ),
    "damaged report": (
        finished_without_report,
        DataError,
        "run holds a finished run (run/checkpoints/step-00000003) whose report.json cannot be read "
        "(JSONDecodeError); its checkpoint can be used",
    ),
    "full device": (
        full_device,
        DeviceFullError,
        "the device has too little memory for numbers.batch_size 1 over 1 ranks with numbers.accumulate 2 (CUDA out of "
        "memory. Tried to allocate 2.00 GiB); try numbers.accumulate=4, or a smaller numbers.batch_size",
    ),
    "a full memory": (
        full_memory,
        DeviceFullError,
        "the device has too little memory for a model (...); try a smaller one",
    ),
    "no rank": (
        ranks("2"),
        SettingError,
        "RANK is '', expected a number; start several ranks with torchrun",
    ),
    "a rank of another kind": (
        ranks("2", "first"),
        SettingError,
        "RANK is 'first', expected a number; start several ranks with torchrun",
    ),
    "a rank of too many": (
        ranks("2", "5"),
        SettingError,
        "RANK is 5 and WORLD_SIZE 2, expected less; start several ranks with torchrun",
    ),
    "ranks of another kind": (
        ranks("many", "0"),
        SettingError,
        "WORLD_SIZE is 'many', expected a number; start several ranks with torchrun",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
