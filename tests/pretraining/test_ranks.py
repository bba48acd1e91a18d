"""Real ranks under torchrun: the losses of one process, and an end that can be understood when one of them dies."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import processes
from support.images import labelled_shard
from support.targets import blocks_with_views_of, header, random_blocks, write_blocks, write_store
from support.training import small_settings, weights_of

from milan_pipe.api import knn, replay
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.training.checkpoint import checkpoints_of

SAMPLES, BATCH = [130, 60, 21], 17  # of two ranks one has a sample more
HEAD = header(format="zarr", shards=len(SAMPLES))
SETTINGS: dict[str, Any] = {
    **small_settings(HEAD),
    "pretrain.batch_size": BATCH,
    "pretrain.shuffle_blocks": 4,
    "pretrain.canonical_streams": 2,
    "pretrain.epochs": 3,
    "pretrain.log_every": 1,
    "pretrain.device": "cpu",
    "pretrain.precision": "float32",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "targets"
    write_store(root, HEAD, SAMPLES)
    return root


def command(store: Path | list[Path], run: Path, ranks: int, **change: Any) -> list[str]:
    """`change` is of the recipe, or of another section, as `decoder__kind`; `__target` is of none."""
    names = {name: name.replace("__", ".").removeprefix(".") if "__" in name else f"pretrain.{name}" for name in change}
    more = {names[name]: value for name, value in change.items()}
    flags = [word for name, value in {**SETTINGS, **more}.items() for word in ("--set", f"{name}={value}")]
    stores = store if isinstance(store, list) else [store]
    words = ["-m", "milan_pipe", "pretrain", *map(str, stores), str(run), *flags]
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return processes.Popen(
        words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def go(store: Path | list[Path], run: Path, ranks: int, **change: Any) -> str:
    process = start(command(store, run, ranks, **change), run.parent)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stdout + stderr


def curve(run: Path) -> list[float]:
    lines = (run / "metrics" / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    at = lines[0].split("\t").index("loss")
    return [float(line.split("\t")[at]) for line in lines[1:]]


def assert_close(run: Path, whole: Path) -> None:
    assert curve(run) == pytest.approx(curve(whole), rel=2e-5)
    left, right = weights_of(run), weights_of(whole)
    assert left.keys() == right.keys()
    for name, value in left.items():
        # Not biases: that of the keys has no gradient but rounding, which AdamW makes as large as any other.
        if value.ndim > 1:
            assert torch.allclose(value, right[name], rtol=1e-3, atol=2e-4), name


def assert_same(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    left, right = weights_of(run), weights_of(whole)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    go(store, run, 1)
    return run


@pytest.fixture(scope="module")
def pair(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pair") / "run"
    said = go(store, run, 2)
    assert said.count("mean of the last epoch") == 1
    assert "warning" not in said
    return run


def test_two_ranks_have_the_losses_of_one(alone: Path, pair: Path) -> None:
    assert len(curve(alone)) == 3 * (sum(SAMPLES) // BATCH)
    assert len(set(curve(alone))) > 30
    assert_close(pair, alone)


@pytest.mark.ci
def test_a_sharded_student_has_them_too(store: Path, tmp_path: Path) -> None:
    # One epoch: a sharded step takes 0.2 s.
    go(store, tmp_path / "alone", 1, epochs=1)
    go(store, tmp_path / "run", 2, epochs=1, parallel="fsdp", clip_grad=1e9, accumulate=2, checkpoint_every=5)
    assert_close(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae", "maskfeat", "unmasked-teacher", "mr-mae", "maskdistill", "dense"])
def test_two_ranks_have_the_losses_of_one_in_every_objective(store: Path, tmp_path: Path, recipe: str) -> None:
    of = load_params(recipe)
    named = {"__target": of.target, "decoder__kind": of.decoder.kind}
    masks = {"masking__kind": of.masking.kind, "masking__ratio": of.masking.ratio}
    for ranks in (1, 2):
        go(store, tmp_path / str(ranks), ranks, epochs=1, **named, **masks)
    assert_close(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_two_ranks_learn_from_two_stores_as_one(tmp_path: Path, parallel: str) -> None:
    other = header("float16", format="webdataset", shards=len(SAMPLES), width=12, model="other")
    one = header(format="zarr", shards=len(SAMPLES), width=8)  # a width that has a Hadamard matrix
    first = [random_blocks(one, count, number) for number, count in enumerate(SAMPLES)]
    write_blocks(tmp_path / "a", one, first)
    views_of = [blocks_with_views_of(other, of, SAMPLES[n], 9 + n) for n, of in enumerate(first)]
    write_blocks(tmp_path / "b", other, views_of)
    stores = [tmp_path / "a", tmp_path / "b"]
    kept = {"teachers__standardise": "phi-s", "teachers__weights": "balanced", "teachers__importance": "mean"}
    go(stores, tmp_path / "alone", 1, epochs=1, **kept)
    go(stores, tmp_path / "pair", 2, epochs=1, parallel=parallel, canonical_streams=2, workers=1, **kept)
    assert_close(tmp_path / "pair", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_one_of_two_ranks_judges_the_student(store: Path, tmp_path: Path, parallel: str) -> None:
    run, images = tmp_path / "run", str(labelled_shard(tmp_path / "images.tar", range(60)))
    probe = {"probe_every": 1, "probe_train": images, "probe_test": images, "probe_images": 40}
    go(store, run, 2, epochs=2, parallel=parallel, **probe)
    go(store, tmp_path / "without", 2, epochs=2, parallel=parallel)
    assert_same(run, tmp_path / "without")
    labelled_shard(tmp_path / "images.tar", range(40))
    score = knn(run, images, images, Params(pretrain=PretrainSettings(device="cpu"))).best
    assert json.loads((run / "report.json").read_text())["scores"] == {"knn": score}
    probe["probe_test"] = str(tmp_path / "none")
    process = start(command(store, tmp_path / "bad", 2, parallel=parallel, **probe), tmp_path)
    stderr = process.communicate(timeout=120)[1]
    assert len([line for line in stderr.splitlines() if line.startswith("error:")]) == 1, stderr


@pytest.mark.slow
def test_more_ranks_than_lanes_and_cores(store: Path, tmp_path: Path) -> None:
    for ranks in (1, 3):
        go(store, tmp_path / f"of-{ranks}", ranks, batch_size=20, epochs=2, canonical_streams=1, accumulate=ranks)
    assert_close(tmp_path / "of-3", tmp_path / "of-1")


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the ranks, the first one first."""
    found = [child for child in psutil.Process(process.pid).children() if "milan_pipe" in child.cmdline()]
    return sorted(found, key=lambda child: child.create_time())


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path, before: list[Path]) -> None:
    while process.poll() is None and checkpoints_of(run)[-1:] == before:
        time.sleep(0.01)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_dies_ends_the_run_with_one_line_and_another_number_goes_on(
    store: Path, alone: Path, pair: Path, tmp_path: Path, victim: int
) -> None:
    run = tmp_path / "run"
    many = {"epochs": 3, "checkpoint_every": 4}
    process = start(command(store, run, 2, **many), tmp_path)
    wait_for_checkpoint(process, run, [])
    ranks_of(process)[victim].kill()
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, stderr
    assert re.search(r"one of 2 ranks was lost\. The last good checkpoint is .*step-\d{8}; the same", lines[0])
    go(store, run, 1 + victim)
    if victim:
        assert_same(run, pair)
    else:
        assert_close(run, alone)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_a_pair_goes_on_to_the_bit(store: Path, pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(store, run, 2, checkpoint_every=4), tmp_path)
    wait_for_checkpoint(process, run, [])
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=120)[1]
    lines = [line for line in stderr.splitlines() if line.startswith("stopped:")]
    assert len(lines) == 1, stderr
    assert "by SIGTERM after step" in lines[0]
    assert f"{checkpoints_of(run)[-1]} was written" in lines[0]
    go(store, run, 2)
    assert_same(run, pair)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_sharded_run_goes_on_sharded_and_copied(store: Path, alone: Path, tmp_path: Path, parallel: str) -> None:
    run = tmp_path / "run"
    process = start(command(store, run, 2, checkpoint_every=4, parallel="fsdp"), tmp_path)
    wait_for_checkpoint(process, run, [])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert "gone on from step" in go(store, run, 2, parallel=parallel)
    assert_close(run, alone)


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_kept_whole_by_the_first_rank(tmp_path: Path) -> None:
    blocks = [random_blocks(HEAD, count, number) for number, count in enumerate(SAMPLES)]
    scale = blocks[1][0].scale_KNS
    assert scale is not None
    scale[:, 7, 0] = float("nan")
    write_blocks(tmp_path / "targets", HEAD, blocks)
    process = start(command(tmp_path / "targets", tmp_path / "run", 2), tmp_path)
    stderr = process.communicate(timeout=120)[1]
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, stderr
    files = list((tmp_path / "run" / "not-finite").iterdir())
    assert len(files) == 1
    assert f"milan-pipe replay {files[0]}" in lines[0]
    report = replay(files[0])
    assert len(report.loss_by_key) == BATCH
    assert next(iter(report.loss_by_key)).endswith("-1-7")


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cuda:0"},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ({"batch_size": 1}, {"batch_size": 300}, {"accumulate": 9})
        ),
    ],
)
def test_a_mistake_is_reported_once(store: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    process = start(command(store, tmp_path / "run", 2, **change), tmp_path)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert len([line for line in stderr.splitlines() if line.startswith("error:")]) == 1, stderr


@pytest.mark.slow
def test_two_ranks_killed_ten_times(store: Path, tmp_path: Path) -> None:
    run, epochs, draw = tmp_path / "run", 150, random.Random(1)
    words = command(store, run, 2, epochs=epochs, checkpoint_every=11, log_every=10)
    for number in range(10):
        before = checkpoints_of(run)[-1:]
        process = start(words, tmp_path)
        wait_for_checkpoint(process, run, before)
        time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, "the run was finished before it could be killed"
        children = ranks_of(process)
        # One rank, the other, or all of them with torchrun.
        for child in children if number % 3 == 2 else [children[number % 3]]:
            child.kill()
        if number % 3 == 2:
            process.kill()
        process.communicate(timeout=120)
    go(store, run, 2, epochs=epochs, checkpoint_every=11, log_every=10)
    go(store, tmp_path / "whole", 2, epochs=epochs, log_every=10)
    assert_same(run, tmp_path / "whole")


def test_ranks_are_refused_where_another_process_writes(store: Path, tmp_path: Path) -> None:
    from milan_pipe.training.distributed import Ranks
    from milan_pipe.training.lock import only_writer

    with only_writer(tmp_path / "run", Ranks(0, 1, torch.device("cpu"))):
        process = start(command(store, tmp_path / "run", 2), tmp_path)
        stderr = process.communicate(timeout=240)[1]
    assert process.returncode
    assert stderr.count(f"is being written by process {os.getpid()} on") == 1
    assert "milan_pipe.errors" not in stderr
