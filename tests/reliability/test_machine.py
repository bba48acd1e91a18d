"""What a machine does to a run: few files, little memory, a store that goes away, clocks, a file server's habits."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from support import processes
from support.counts import Counted
from support.extraction import command, every_file
from support.targets import header, tree, write_store
from support.training import StopAtError, pretrain_command, same_run, small_params, stop_at

from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import Params
from milan_pipe.errors import MilanError
from milan_pipe.images.prepare import prepare
from milan_pipe.pretraining.run import pretrain
from milan_pipe.targets.verify import verify_store
from milan_pipe.training import lock
from milan_pipe.training.recorder import TrainProgress

FORMATS = ["zarr", "webdataset"]


def params_of(store_format: str = "zarr") -> Params:
    recipe = {"epochs": 12, "batch_size": 10, "shuffle_blocks": 1, "checkpoint_every": 3, "log_every": 3}
    return small_params(header(format=store_format), **recipe)


@pytest.mark.slow
def test_sixty_four_open_files_are_enough(tmp_path: Path, counted: Counted) -> None:
    prepare("demo", tmp_path / "images", PrepareSettings(train_scenes=30, test_scenes=0, samples_per_shard=5))
    write_store(tmp_path / "t", header(shards=6), [20] * 6)
    for words in (
        command(tmp_path / "images", tmp_path / "targets"),
        command(tmp_path / "images", tmp_path / "two", "--workers", "2"),
        pretrain_command(tmp_path / "t", header(), tmp_path / "run", 2),
        pretrain_command(tmp_path / "t", header(), tmp_path / "with-workers", 2, "pretrain.workers=2"),
    ):
        done = processes.run(
            ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert every_file(tmp_path / "targets") == every_file(tmp_path / "two")
    assert same_run(tmp_path / "run", tmp_path / "with-workers")
    counted("`ulimit -n 64`: both stages, one process and two", 4, "they end as usual")


WITHOUT_MEMORY = """
import resource, sys, threading
import numpy, torch
from milan_pipe.cli.console import errors_as_one_line

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))
threading.stack_size(2**26)
asked = {
    "numpy": lambda: numpy.ones(2**28),
    "torch": lambda: torch.ones(2**28),
    "thread": lambda: threading.Thread(target=print).start(),
}
with errors_as_one_line():
    asked[sys.argv[1]]()
"""


@pytest.mark.parametrize(("what", "word"), [("numpy", "memory"), ("torch", "memory"), ("thread", "thread")])
def test_what_a_limit_does_not_grant_is_one_line(what: str, word: str) -> None:
    words = [sys.executable, "-c", WITHOUT_MEMORY, what]
    done = processes.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert word in line


WITH_ITS_PEAK = """
import atexit, runpy, sys
atexit.register(lambda: print(open("/proc/self/status").read().split("VmPeak:")[1].split()[0], file=sys.stderr))
runpy.run_module("milan_pipe", run_name="__main__", alter_sys=True)
"""


HOW = {"one line": "with one line", "otherwise": "in words of a library or a signal", "stuck": "stuck in one, killed"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["extract-targets", "pretrain"])
def test_a_limit_of_memory_costs_nothing_that_was_done(tmp_path: Path, stage: str, counted: Counted) -> None:
    """From one that importing torch takes to what the whole run takes, each going on with what the last one left."""
    if stage == "pretrain":
        write_store(tmp_path / "t", header(shards=3), [60] * 3)
    else:
        prepare("demo", tmp_path / "images", PrepareSettings(train_scenes=60, test_scenes=0, samples_per_shard=10))

    def words(where: Path) -> list[str]:
        if stage == "pretrain":
            return pretrain_command(tmp_path / "t", header(), where, 2, "pretrain.checkpoint_every=3")
        return command(tmp_path / "images", where)

    def run(words: list[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=seconds)

    def is_whole(where: Path) -> bool:
        if stage == "pretrain":
            return same_run(where, tmp_path / "whole")
        return every_file(where) == every_file(tmp_path / "whole")

    _, _, _, *arguments = words(tmp_path / "whole")
    peak = int(run([sys.executable, "-c", WITH_ITS_PEAK, *arguments]).stderr.split()[-1])
    ends: Counter[str] = Counter()
    for number in range(12):
        limit = round(peak * (0.78 + 0.02 * number))
        try:
            done = run(["/bin/sh", "-c", f'ulimit -v {limit}; exec "$@"', "sh", *words(tmp_path / "out")], 60)
        # A native library may wait for a thread that it did not get.
        except subprocess.TimeoutExpired:
            ends["stuck"] += 1
            continue
        if done.returncode == 0:
            assert is_whole(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
            continue
        ends["one line" if done.returncode == 2 and done.stderr.startswith("error: ") else "otherwise"] += 1
    done = run(words(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert is_whole(tmp_path / "out")
    assert ends["one line"] >= 3, ends
    said = ", ".join(f"{ends[how]} {words}" for how, words in HOW.items() if ends[how])
    held = f"{said}; with memory, an unbroken run's end"
    counted(f"too little memory (`ulimit -v`) for `{stage}`, 12 limits", ends.total(), held)


@pytest.mark.parametrize(
    ("store_format", "how"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.ci)
            for case in (("zarr", "moved"), ("webdataset", "a shard is removed"))
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("zarr", "removed"), ("zarr", "a shard is removed"), ("webdataset", "removed"))
        ),
    ],
)
def test_a_store_that_goes_away_in_mid_run_is_one_line(tmp_path: Path, store_format: str, how: str) -> None:
    store = tmp_path / "t"
    write_store(store, header(format=store_format, shards=3), [60, 60, 60])
    kept = shutil.copytree(store, tmp_path / "kept")
    pretrain(store, tmp_path / "whole", params_of(store_format))

    def lose(now: TrainProgress) -> None:
        if now.step == 6:
            shutil.move(store, tmp_path / "away")
            if how == "a shard is removed":
                shutil.move(tmp_path / "away", store)
                shutil.rmtree(store / "shards" / "000001")
            elif how == "removed":
                shutil.rmtree(tmp_path / "away")

    with pytest.raises(MilanError, match=f"{store}.*(not there|lost|missing)") as caught:
        pretrain(store, tmp_path / "run", params_of(store_format), on_progress=lose)
    assert "\n" not in str(caught.value)
    with pytest.raises(MilanError):
        pretrain(store, tmp_path / "run", params_of(store_format))
    shutil.rmtree(store, ignore_errors=True)
    kept.rename(store)
    report = pretrain(store, tmp_path / "run", params_of(store_format))
    assert report.resumed_from >= 3
    assert same_run(tmp_path / "run", tmp_path / "whole")


class Jumping(datetime):
    """As often in the past as in the future."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Jumping:
        return super().now(tz) + random.choice((-1, 1)) * timedelta(days=999)


def test_a_clock_that_jumps_and_files_of_the_future_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "t"
    write_store(store, header(), [50])
    pretrain(store, tmp_path / "whole", params_of())
    with pytest.raises(StopAtError):
        pretrain(store, tmp_path / "run", params_of(), on_progress=stop_at(5))
    for path in [*store.rglob("*"), *(tmp_path / "run").rglob("*")]:
        os.utime(path, (4e9, 4e9))
    true_time, rng = time.time, random.Random(0)
    # Libraries ask this one, and the lock of a run the other.
    monkeypatch.setattr(time, "time", lambda: true_time() + rng.uniform(-1e8, 1e8))
    monkeypatch.setattr(lock, "datetime", Jumping)
    pretrain(store, tmp_path / "run", params_of())
    assert same_run(tmp_path / "run", tmp_path / "whole")
    assert verify_store(store).problems == ()


@pytest.mark.parametrize("store_format", FORMATS)
def test_what_a_file_server_keeps_of_open_files_is_no_damage(tmp_path: Path, store_format: str) -> None:
    """NFS renames a file that is removed while it is open to `.nfs` and a number, in its folder."""
    store = tmp_path / "t"
    write_store(store, header(format=store_format), [50])
    before = tree(store)
    for folder in {path.parent for path in store.rglob("*")}:
        (folder / ".nfs000000000123456700000001").write_bytes(b"still open")
    assert verify_store(store).problems == ()
    pretrain(store, tmp_path / "run", params_of(store_format))
    assert tree(store) == before
