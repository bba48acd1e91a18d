"""Runs that are interrupted go on as if nothing had happened: the same losses and the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import processes
from support.checkpoints import change_record
from support.counts import Counted
from support.targets import header, random_blocks, write_blocks, write_store
from support.training import BATCH, StopAtError, pretrain_command, stop_at, student_of, weights_of

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, MaskSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, StoppedError
from milan_pipe.pretraining.run import configuration_of, pretrain
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.task import RunReport

SAMPLES = [150, 90]
STEPS_AN_EPOCH = 240 // BATCH


@pytest.fixture(scope="module")
def head() -> StoreHeader:
    return header(format="zarr", shards=len(SAMPLES))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, head: StoreHeader) -> Path:
    root = tmp_path_factory.mktemp("store") / "targets"
    write_store(root, head, SAMPLES)
    return root


def go(store: Path, head: StoreHeader, run: Path, **change: Any) -> RunReport:
    recipe: dict[str, Any] = {
        "epochs": 3,
        "batch_size": BATCH,
        "warmup_epochs": 0.5,
        "log_every": 4,
        "shuffle_blocks": 1,
        "device": "cpu",
        "checkpoint_minutes": None,
    }
    on_progress = change.pop("on_progress", lambda _: None)
    decoder = change.pop("decoder", DecoderSettings(width=16, depth=1, heads=2))
    masking = change.pop("masking", MaskSettings())
    return pretrain(
        store,
        run,
        Params(
            student=student_of(head),
            decoder=decoder,
            masking=masking,
            pretrain=PretrainSettings(**{**recipe, **change}),
        ),
        on_progress=on_progress,
    )


def curve(run: Path) -> list[str]:
    lines = (run / "metrics" / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    at = [lines[0].split("\t").index(name) for name in ("step", "loss")]
    return [" ".join(line.split("\t")[column] for column in at) for line in lines[1:]]


def assert_same(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    left, right = weights_of(run), weights_of(whole)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(store: Path, head: StoreHeader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    go(store, head, run)
    return run


# Steps of an epoch: 15. On and off a point of the metrics (4), in the first and in later epochs, at their borders.
@pytest.mark.parametrize("every", [1, 7, 15, 16])
def test_a_broken_run_goes_on_to_the_same_end(
    store: Path, head: StoreHeader, whole: Path, tmp_path: Path, every: int
) -> None:
    run = tmp_path / "run"
    for step in (20, 36):
        with pytest.raises(StopAtError):
            go(store, head, run, checkpoint_every=every, on_progress=stop_at(step))
    report = go(store, head, run, checkpoint_every=every)
    assert report.resumed_from == (35 if every == 1 else 36 // every * every if 36 % every else 36 - every)
    assert report.steps_now == 45 - report.resumed_from
    assert_same(run, whole)
    assert report.loss == json.loads((whole / "report.json").read_text())["loss"]


def test_the_loss_scale_of_half_precision_goes_on(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    go(store, head, tmp_path / "whole", precision="float16", lr=0.05)
    with pytest.raises(StopAtError):
        go(store, head, tmp_path / "run", precision="float16", lr=0.05, checkpoint_every=7, on_progress=stop_at(36))
    scaler = open_checkpoint(tmp_path / "run").record["scaler"]
    assert scaler["_growth_tracker"] > 0 or scaler["scale"] != 65536
    go(store, head, tmp_path / "run", precision="float16", lr=0.05)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_without_a_checkpoint_begins_again(store: Path, head: StoreHeader, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StopAtError):
        go(store, head, tmp_path / "run", on_progress=stop_at(20))
    assert go(store, head, tmp_path / "run").resumed_from == 0
    assert_same(tmp_path / "run", whole)


def test_speed_and_bookkeeping_may_change_on_the_way(
    store: Path, head: StoreHeader, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(StopAtError):
        go(store, head, tmp_path / "run", checkpoint_every=5, on_progress=stop_at(20))
    go(store, head, tmp_path / "run", threads=3, keep_checkpoints=1, checkpoint_minutes=60)
    assert_same(tmp_path / "run", whole)
    assert len(checkpoints_of(tmp_path / "run")) == 1


def test_a_finished_run_is_reported_and_not_touched(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    first = go(store, head, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = go(store, head, tmp_path / "run")
    assert (again.steps_now, again.loss, again.checkpoint) == (0, first.loss, first.checkpoint)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "run" / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        go(store, head, tmp_path / "run")


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_and_says_what_differs(
    store: Path, head: StoreHeader, tmp_path: Path, finished: bool
) -> None:
    if finished:
        go(store, head, tmp_path / "run")
    else:
        with pytest.raises(StopAtError):
            go(store, head, tmp_path / "run", checkpoint_every=5, on_progress=stop_at(20))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(MismatchError) as caught:
        go(store, head, tmp_path / "run", lr=0.25, masking=MaskSettings(kind="random"), epochs=4)
    for words in (
        "masking.kind: the run has 'semantic', the settings say 'random'",
        "pretrain.epochs: the run has 3, the settings say 4",
        f"pretrain.lr: the run has {PretrainSettings().lr}, the settings say 0.25",
    ):
        assert words in str(caught.value)
    assert "batch_size" not in str(caught.value)
    other = tmp_path / "other"
    write_store(other, head, [150, 91])
    with pytest.raises(MismatchError, match=r"targets\.samples"):
        go(other, head, tmp_path / "run")
    # As many images, and others.
    write_blocks(tmp_path / "replaced", head, [random_blocks(head, size, 9 + size) for size in SAMPLES])
    with pytest.raises(MismatchError, match=r"configuration \(step-\d+\): targets\.views_sha256: [^;]+$"):
        go(tmp_path / "replaced", head, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_of_another_order_of_samples_ends_as_it_is_and_does_not_go_on(
    store: Path, head: StoreHeader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_order(*args: Any) -> dict[str, Any]:
        found = {name: value for name, value in configuration_of(*args).items() if name != "order"}
        former = {new: old for old, new in PretrainSettings.renamed.items()}
        return {**found, "pretrain": {former.get(name, name): value for name, value in found["pretrain"].items()}}

    monkeypatch.setattr("milan_pipe.pretraining.run.configuration_of", without_order)
    with pytest.raises(StopAtError):
        go(store, head, tmp_path / "run", checkpoint_every=5, on_progress=stop_at(20))
    finished = go(store, head, tmp_path / "finished")
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="another order"):
        go(store, head, tmp_path / "run")
    assert go(store, head, tmp_path / "finished").loss == finished.loss


def test_a_converted_store_may_take_over(store: Path, head: StoreHeader, whole: Path, tmp_path: Path) -> None:
    from milan_pipe.targets.convert import convert_targets

    convert_targets(store, tmp_path / "tars", format="webdataset")
    with pytest.raises(StopAtError):
        go(store, head, tmp_path / "run", checkpoint_every=5, on_progress=stop_at(20))
    assert go(tmp_path / "tars", head, tmp_path / "run").resumed_from == 15
    assert_same(tmp_path / "run", whole)


def test_the_last_ones_are_kept_and_what_was_half_written_goes(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half = run / "checkpoints" / f".partial-step-00000004-{0:032x}"
    half.mkdir(parents=True)
    (half / "student.safetensors").write_text("half")
    with pytest.raises(StopAtError):
        go(store, head, run, checkpoint_every=2, keep_checkpoints=3, on_progress=stop_at(20))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000014", "step-00000016", "step-00000018"]
    go(store, head, run, keep_checkpoints=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000045"]
    assert not (run / "checkpoints" / "step-00000045" / "optimizer.safetensors").exists()


def test_a_checkpoint_that_is_damaged_is_one_error(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StopAtError):
        go(store, head, run, checkpoint_every=5, on_progress=stop_at(20))
    file = checkpoints_of(run)[-1] / "optimizer.safetensors"
    state = load_file(file)
    name = "encoder.norm.weight/exp_avg"
    save_file({key: value for key, value in state.items() if not key.startswith("encoder.norm.weight/")}, file)
    assert name in state
    change_record(file.parent, lambda _: None)
    with pytest.raises(MismatchError, match=r"lacks encoder\.norm\.weight"):
        go(store, head, run)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"optimizer.* is damaged"):
        go(store, head, run)
    file.unlink()
    with pytest.raises(MissingError, match=r"has no optimizer\.safetensors"):
        go(store, head, run)


def test_weights_that_are_not_finite_are_not_saved(
    store: Path, head: StoreHeader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_step = torch.optim.AdamW.step
    calls = 0

    def poisoned(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        result = true_step(self, *given)
        if calls == 7:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(DataError, match=r"step 7 'patch_embed\.proj"):
        go(store, head, tmp_path / "run", checkpoint_every=1)
    assert checkpoints_of(tmp_path / "run")[-1].name == "step-00000006"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_obeyed_after_the_step(
    store: Path, head: StoreHeader, whole: Path, tmp_path: Path, name: str
) -> None:
    number = signal.Signals[name]
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def stop_at_20(now: TrainProgress) -> None:
        if now.step == 20:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    with pytest.raises(StoppedError, match=f"{name} after step 20 ") as caught:
        go(store, head, tmp_path / "run", on_progress=stop_at_20)
    assert caught.value.signal == number
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert go(store, head, tmp_path / "run").resumed_from == 20
    assert_same(tmp_path / "run", whole)


def killed_again_and_again(store: Path, head: StoreHeader, folder: Path, kills: int, seed: int = 0) -> None:
    epochs = 5 * kills
    draw = random.Random(f"{kills} {seed}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = pretrain_command(store, head, folder / "run", epochs)
    done = 0
    for _ in range(kills):
        before = checkpoints_of(folder / "run")[-1:]
        with processes.Popen(words, cwd=folder, env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and checkpoints_of(folder / "run")[-1:] == before:
                time.sleep(0.01)
            # Shorter than what is left of the run on the fastest of machines.
            time.sleep(draw.uniform(0, 0.03))
            done += process.poll() is None
            process.kill()
    assert done == kills, "a run was finished before it could be killed"
    finished = processes.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "gone on from step" in finished.stdout
    assert finished.stderr.count("is taken over") == 1
    assert not (folder / "run" / ".lock").exists()
    processes.run(
        pretrain_command(store, head, folder / "whole", epochs),
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert_same(folder / "run", folder / "whole")
    assert not list((folder / "run" / "checkpoints").glob(".*"))


def test_killed_twice(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    killed_again_and_again(store, head, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_fifty_times(store: Path, head: StoreHeader, tmp_path: Path, counted: Counted) -> None:
    for part in range(5):
        (tmp_path / str(part)).mkdir()
        killed_again_and_again(store, head, tmp_path / str(part), 10, seed=part)
    counted("SIGKILL of `pretrain`", 50, "losses and weights are an unbroken run's, to the bit")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_while_a_checkpoint_is_written(
    store: Path, head: StoreHeader, tmp_path: Path, counted: Counted
) -> None:
    run, draw, done, tries = tmp_path / "run", random.Random(30), 0, 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    every = "pretrain.checkpoint_every=1"
    folder = run / "checkpoints"

    def in_the_making() -> bool:
        return any(folder.glob(".partial-step-*"))

    while done < 30:
        tries += 1
        assert tries < 300
        before = checkpoints_of(run)
        # A step and a half for each try: no run ends before it is killed.
        words = pretrain_command(store, head, run, 30, every)
        with processes.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and checkpoints_of(run) == before:
                time.sleep(0.001)
            while process.poll() is None and not in_the_making():
                pass
            time.sleep(draw.uniform(0, 0.004))
            assert process.poll() is None, "the run was finished before it could be killed"
            process.kill()
        done += in_the_making()
        assert all(open_checkpoint(checkpoints_of(run)[-1]).weights(name) for name in ("student", "optimizer"))
    finished = processes.run(pretrain_command(store, head, run, 30, every), cwd=tmp_path, env=environment, check=False)
    assert finished.returncode == 0
    unbroken = pretrain_command(store, head, tmp_path / "whole", 30, every)
    processes.run(unbroken, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert_same(run, tmp_path / "whole")
    assert not list(folder.glob(".*"))
    counted("SIGKILL while a checkpoint is written", done, "the one before is whole; the end is an unbroken run's")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_the_command_with_one_line(
    store: Path, head: StoreHeader, tmp_path: Path, name: str, code: int
) -> None:
    words = pretrain_command(store, head, tmp_path / "run", 2000)
    with processes.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not checkpoints_of(tmp_path / "run"):
            time.sleep(0.01)
        process.send_signal(signal.Signals[name])
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert f"stopped: by {name} after step" in stderr
    assert "Traceback" not in stderr
    step = open_checkpoint(tmp_path / "run").record["step"]
    assert f"after step {step} of" in stderr


def test_a_second_process_is_refused_with_one_line(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = pretrain_command(store, head, run, 2000)
    with processes.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        try:
            while first.poll() is None and not checkpoints_of(run):
                time.sleep(0.01)
            second = processes.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert second.returncode == 2, second.stderr
            lines = second.stderr.strip().splitlines()
            assert len(lines) == 1
            assert lines[0].startswith(f"error: {run} is being written by process {first.pid} on ")
            assert first.poll() is None
        finally:
            first.kill()
    steps = [line.split()[0] for line in curve(run)]
    assert len(steps) == len(set(steps))


IN_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("milan_pipe", run_name="__main__", alter_sys=True)
"""


def test_a_closed_terminal_leaves_a_checkpoint(store: Path, head: StoreHeader, tmp_path: Path) -> None:
    given = pretrain_command(store, head, tmp_path / "run", 2000)[3:]
    words = [sys.executable, "-c", IN_TERMINAL, *given]
    words += ["--set", "pretrain.checkpoint_every=100000", "--set", "pretrain.log_every=1"]
    window, terminal = os.openpty()
    with processes.Popen(
        words, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        curve_file = tmp_path / "run" / "metrics" / "plots" / "metrics" / "train" / "loss.tsv"
        shown = b""
        while process.poll() is None and not curve_file.exists():
            if select.select([window], [], [], 0.05)[0]:
                with suppress(OSError):  # the process has ended, and its end of the terminal with it
                    shown += os.read(window, 65536)
        os.close(window)
        process.wait(timeout=60)
    assert process.returncode == 129, shown.decode()
    opened = open_checkpoint(tmp_path / "run")
    assert not opened.record["finished"]
    assert opened.weights("optimizer")
