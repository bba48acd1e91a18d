"""Batches that other processes make: those of threads, and what happens when a process or the store is broken."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from support import processes
from support.targets import blocks_with_views_of, header, random_blocks, write_blocks
from support.training import StopAtError, same_run, stop_at

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.errors import DataError, MissingError, ProcessLostError
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Batch, Loader
from milan_pipe.loader.workers import WorkerLoader
from milan_pipe.lost_processes import next_answer
from milan_pipe.pretraining.run import pretrain
from milan_pipe.student.masking import noise_for
from milan_pipe.targets.several import SeveralStores, open_several
from milan_pipe.training.metrics import CURVES

HEAD = header(format="zarr", shards=3)
OTHER = header("float16", format="webdataset", shards=3, width=12, model="other", weights_sha256="cd" * 32)
SIZES = (150, 140, 131)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stores")
    first = [random_blocks(HEAD, count, number) for number, count in enumerate(SIZES)]
    write_blocks(root / "a", HEAD, first)
    write_blocks(root / "b", OTHER, [blocks_with_views_of(OTHER, of, SIZES[n], 9 + n) for n, of in enumerate(first)])
    return root / "a", root / "b"


@pytest.fixture(autouse=True)
def _quick_processes() -> Iterator[None]:
    with processes.forked_workers():
        yield


def plan_of(reader: SeveralStores, **change: Any) -> BatchPlan:
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    order = EpochOrder(samples=samples, views=HEAD.views.count, block=128, shuffle_blocks=2, seed=1)
    return BatchPlan(**{"order": order, "batch_size": 35, **change})


def same(left: Batch, right: Batch) -> bool:
    tensors = [
        [*(value for value in vars(batch).values() if isinstance(value, torch.Tensor)), *sum(batch.others, ())]
        for batch in (left, right)
    ]
    equal = (a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    return left.keys == right.keys and all(equal)


@pytest.mark.parametrize(
    ("workers", "change", "with_targets"),
    [
        (1, {}, True),
        (3, {"canonical_streams": 2, "rank": 1, "ranks": 2}, True),
        (2, {"canonical_streams": 4}, False),
    ],
)
def test_batches_are_those_of_threads(
    workers: int, change: dict[str, int], with_targets: bool, stores: tuple[Path, Path]
) -> None:
    reader = open_several(stores[:1])
    plan, noise = plan_of(reader, **change), partial(noise_for, MaskSettings(), grid=HEAD.teacher.grid)
    kept: dict[str, Any] = {"with_targets": with_targets, "draw_noise": noise, "threads": 1}
    with Loader(reader, plan, **kept) as loader:
        expected = list(loader.batches(0, 2, 3))
    with WorkerLoader(reader, plan, workers=workers, **kept) as loader:
        # Those that were handed out must not change when later ones are made.
        found = list(loader.batches(0, 2, 3))
    assert len(found) == 3 * plan.steps - 2
    assert all(same(left, right) for left, right in zip(found, expected, strict=True))
    assert not multiprocessing.active_children()


def params(**recipe: Any) -> Params:
    fixed = {"epochs": 2, "batch_size": 35, "warmup_epochs": 0, "log_every": 1, "device": "cpu", "canonical_streams": 2}
    student = StudentSettings(image_size=HEAD.views.size, patch_size=8, width=16, depth=1, heads=2)
    decoder = DecoderSettings(width=16, depth=1, heads=2)
    views = HEAD.views.settings
    return Params(views=views, student=student, decoder=decoder, pretrain=PretrainSettings(**{**fixed, **recipe}))


def test_a_run_of_two_stores_goes_on_in_other_processes_to_the_bit(stores: tuple[Path, Path], tmp_path: Path) -> None:
    pretrain(stores, tmp_path / "threads", params())
    with pytest.raises(StopAtError):
        pretrain(stores, tmp_path / "run", params(workers=2, checkpoint_every=4), on_progress=stop_at(6))
    assert not multiprocessing.active_children()
    assert pretrain(stores, tmp_path / "run", params(workers=1)).resumed_from == 4
    assert same_run(tmp_path / "threads", tmp_path / "run")


@pytest.mark.parametrize(("error", "lost"), [(EOFError(), True), (EOFError("Caught EOFError in process 0"), False)])
def test_a_pipe_that_ends_is_a_process_that_is_lost(error: EOFError, lost: bool) -> None:
    def answers() -> Iterator[None]:
        yield from ()
        raise error

    with pytest.raises(ProcessLostError if lost else EOFError, match=r"w=2 ended by itself" if lost else "Caught"):
        next_answer(answers(), "w", 2)


def test_a_process_that_is_killed_ends_the_run_in_a_line(stores: tuple[Path, Path], tmp_path: Path) -> None:
    def kill(_: object) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)

    expected = r"^a process of pretrain\.workers=1 ended by itself: DataLoader worker.* The last good checkpoint is "
    with pytest.raises(ProcessLostError, match=expected + str(tmp_path / "run" / "checkpoints" / "step-")):
        pretrain(stores[0], tmp_path / "run", params(workers=1, epochs=50, checkpoint_every=1), on_progress=kill)


@pytest.fixture(scope="module")
def long_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose batches of 100 have more bytes of keys than a pipe holds."""
    store = tmp_path_factory.mktemp("long") / "t"
    head = header(format="zarr", shards=1)
    write_blocks(store, head, [random_blocks(head, 300, 0, [f"{row:03d}{'k' * 4000}" for row in range(300)])])
    return store


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_killed_as_it_answers_ends_the_run(long_keys: Path, tmp_path: Path, number: int) -> None:
    """One of the two is in the middle of an answer that the pipe has no room for, and the other could go on with it."""
    began: list[int] = []

    def kill(_: object) -> None:
        if not began:
            time.sleep(1)
            began.append(sorted(process.pid or 0 for process in multiprocessing.active_children())[number])
            os.kill(began[0], signal.SIGKILL)

    with pytest.raises(ProcessLostError, match=r"^a process of pretrain\.workers=2 ended by itself: DataLoader worker"):
        pretrain(long_keys, tmp_path / "run", params(workers=2, epochs=50, batch_size=100), on_progress=kill)
    assert not multiprocessing.active_children()


@pytest.mark.ci
@pytest.mark.timeout(120)
def test_processes_end_with_a_run_that_is_killed(long_keys: Path, tmp_path: Path) -> None:
    settings = params(workers=2, epochs=500, batch_size=100).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    run = subprocess.Popen(
        [sys.executable, "-m", "milan_pipe", "pretrain", str(long_keys), "run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    curve = tmp_path / "run" / "metrics" / CURVES / "train" / "loss.tsv"
    while not curve.exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children()
    assert len(workers) >= 2
    run.kill()
    run.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_damage_is_told_as_by_threads(stores: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stores[0], tmp_path / "damaged")
    for file in (tmp_path / "damaged").rglob("attention/c/*/*/*"):
        file.write_bytes(file.read_bytes()[:-4])
    errors = []
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            pretrain(tmp_path / "damaged", tmp_path / f"run-{workers}", params(workers=workers))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_store_that_is_gone_is_told_by_the_process_that_misses_it(stores: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stores[0], tmp_path / "moved")
    reader = open_several([tmp_path / "moved"])
    with WorkerLoader(reader, plan_of(reader), workers=1, threads=1, with_targets=True) as loader:
        shutil.rmtree(tmp_path / "moved")
        with pytest.raises(MissingError, match="moved"):
            next(loader.batches(0))


@pytest.mark.slow
def test_a_signal_to_all_processes_stops_the_run_with_a_checkpoint(stores: tuple[Path, Path], tmp_path: Path) -> None:
    """As a batch queue sends it."""
    file, run = tmp_path / "params.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(params(workers=2, epochs=3000).model_dump(mode="json")))
    words = [sys.executable, "-m", "milan_pipe", "pretrain", str(stores[0]), str(run), "--params", str(file)]
    process = processes.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while process.poll() is None and not list(run.glob("metrics/**/*.tsv")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "stopped: by SIGTERM after step" in told
    assert list(run.glob("checkpoints/step-*"))
