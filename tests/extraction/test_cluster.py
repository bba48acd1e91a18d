"""What can go wrong around a Dask cluster: lost clients, schedulers and workers, two runs at once, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest
from distributed.client import FutureCancelledError
from support import processes

from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError
from milan_pipe.extraction.cluster import _outcome
from milan_pipe.extraction.run import ExtractProgress
from milan_pipe.images.prepare import prepare

SETTINGS = ["views.count=2", "views.seed=5", "extract.batch_size=8", "extract.threads=1", "extract.teacher_threads=1"]
DEADLINE = 180.0

Tree = dict[str, bytes]


def command(images: Path, targets: Path, *more: str) -> list[str]:
    words = [part for text in [*SETTINGS, "extract.device=cpu"] for part in ("--set", text)]
    return [sys.executable, "-m", "milan_pipe", "extract-targets", str(images), str(targets), *words, *more]


def files(root: Path) -> Tree:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str]) -> None:
    """Until something holds, while a run goes on."""
    ends = time.monotonic() + DEADLINE
    while not condition():
        assert run.poll() is None, f"the run ended before: {run.communicate()}"
        assert time.monotonic() < ends, "nothing happened"
        time.sleep(0.002)


def started(
    images: Path, targets: Path, *more: str, popen: type[subprocess.Popen[str]] = processes.Popen
) -> subprocess.Popen[str]:
    return popen(
        command(images, targets, *more),
        cwd=targets.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def committed(targets: Path) -> list[str]:
    return sorted(path.stem for path in targets.glob("manifest/0*.json"))


def require_plain(told: str) -> None:
    """No traceback, and none of Dask's own log lines, as `2026-11-24 03:37:04,123 - distributed.nanny - WARNING`."""
    assert "Traceback" not in told, told
    assert not re.search(r" - (distributed|tornado|asyncio)\b", told), told


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """Eight shards of ten scenes, and the files of an unbroken run in one process."""
    return unbroken(tmp_path_factory.mktemp("eight"), 80)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """As `eight`, of other images."""
    return unbroken(tmp_path_factory.mktemp("others"), 40, seed=9)


def unbroken(folder: Path, scenes: int, seed: int = 0) -> tuple[Path, Tree]:
    sizes = PrepareSettings(train_scenes=scenes, test_scenes=0, samples_per_shard=10, seed=seed)
    prepare("demo", folder / "images", sizes, workers=1)
    processes.run(command(folder / "images", folder / "whole"), check=True, capture_output=True, cwd=folder)
    return folder / "images", files(folder / "whole")


@contextlib.contextmanager
def dask_process(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = processes.Popen(
        [sys.executable, "-m", "dask", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address of a scheduler with two workers, and its process."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    worker = ("worker", address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60")
    with (
        dask_process(folder, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard") as scheduler,
        dask_process(folder, *worker),
        dask_process(folder, *worker),
    ):
        yield address, scheduler


def test_two_runs_on_one_scheduler_and_one_of_them_killed(
    eight: tuple[Path, Tree], others: tuple[Path, Tree], tmp_path: Path
) -> None:
    """Shards of both have the same names; neither takes the other's for its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    with cluster(tmp_path / "dask") as (address, _):
        killed = started(eight[0], first, "--scheduler", address)
        wait_for(lambda: committed(first), killed)
        killed.kill()
        killed.wait()
        assert 0 < len(committed(first)) < 8
        runs = [
            started(eight[0], first, "--scheduler", address),
            started(others[0], second, "--scheduler", address),
        ]
        for run in runs:
            told = run.communicate(timeout=DEADLINE)[1]
            assert run.returncode == 0, told
            require_plain(told)
    assert files(first) == eight[1]
    assert files(second) == others[1]


def test_a_lost_scheduler_is_one_line_and_the_same_command_goes_on(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    targets = tmp_path / "t"
    with cluster(tmp_path / "dask") as (address, scheduler):
        run = started(eight[0], targets, "--scheduler", address)
        wait_for(lambda: len(committed(targets)) > 1, run)
        scheduler.kill()
        told = run.communicate(timeout=DEADLINE)[1]
    assert run.returncode == 2, told
    require_plain(told)
    errors = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, told
    assert f"the scheduler {address} was lost" in errors[0]
    assert "the same command goes on" in errors[0]
    processes.run(command(eight[0], targets), check=True, capture_output=True, cwd=tmp_path)
    assert files(targets) == eight[1]


@pytest.mark.parametrize("question", ["exception", "result"])
def test_a_scheduler_that_goes_between_two_questions_is_lost_all_the_same(question: str) -> None:
    """A killed scheduler meets this moment by chance alone, so that here the future says what it says then."""

    class Gone:
        status = "finished"

        def exception(self) -> BaseException | None:
            if question == "exception":
                return FutureCancelledError("key", "scheduler-connection-lost")
            return None

        def result(self) -> None:
            raise FutureCancelledError("key", "scheduler-connection-lost")

    with pytest.raises(CancelledError):
        _outcome(Gone(), "000000")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_script_needs_no_guard(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    """Workers are spawned, and would run the script again that began them."""
    code = (
        "import milan_pipe\n"
        f"params = milan_pipe.load_params(overrides={[*SETTINGS, 'extract.device=cpu', 'extract.workers=2']!r})\n"
        f"print(milan_pipe.extract_targets({str(eight[0])!r}, 'targets', params).shards)\n"
    )
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n"
    assert files(tmp_path / "targets") == eight[1]


@pytest.mark.slow
def test_a_scheduler_without_workers_is_told(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    targets, folder = tmp_path / "t", tmp_path / "dask"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    with dask_process(folder, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"):
        run = started(eight[0], targets, "--scheduler", address)
        assert run.stderr is not None
        line = next(line for line in run.stderr if line.startswith("warning:"))
        assert f"no worker has joined {address}" in line
        with dask_process(folder, "worker", address, "--nthreads", "2", "--no-dashboard"):
            told = run.communicate(timeout=DEADLINE)[1]
    assert run.returncode == 0, told
    assert files(targets) == eight[1]


def children(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
    return found


def test_a_shard_that_is_done_again_counts_once(images: Path, extract, tmp_path: Path) -> None:
    told: list[ExtractProgress] = []
    killed: list[int] = []

    def kill_one(now: ExtractProgress) -> None:
        told.append(now)
        if now.views and not killed:
            for worker in children(psutil.Process())[:1]:
                killed.append(worker.pid)
                worker.kill()

    with pytest.warns(RuntimeWarning, match=r"lost 1 of 2 workers; what they had is done again"):
        extract(images, tmp_path / "t", workers=2, teacher_threads=1, on_progress=kill_one)
    assert len(killed) == 1
    assert (told[-1].shards_done, told[-1].views) == (3, 120)
    assert max(now.views for now in told) == 120
    counts = [now.views for now in told]
    assert counts == sorted(counts)


def test_a_shard_that_fails_three_times_counts_no_view_twice(images: Path, extract, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    bad = sorted((tmp_path / "images").glob("*.tar"))[1]
    bad.write_bytes(bad.read_bytes()[:-20_000])
    told: list[ExtractProgress] = []
    with pytest.raises(DataError, match=r"1 of 3 shards failed: 000001: .*train-000001.tar"):
        extract(tmp_path / "images", tmp_path / "t", workers=2, teacher_threads=1, on_progress=told.append)
    assert told[-1].shards_done == 2
    assert 70 <= max(now.views for now in told) <= 120


@pytest.mark.parametrize("spawned", [1, 2])
def test_an_interrupt_while_workers_start(eight: tuple[Path, Tree], tmp_path: Path, spawned: int) -> None:
    targets = tmp_path / "t"
    run = started(eight[0], targets, "--workers", "2")
    process = psutil.Process(run.pid)
    wait_for(lambda: len(children(process)) >= spawned, run)
    family = process.children(recursive=True)
    os.killpg(run.pid, signal.SIGINT)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 130, told
    require_plain(told)
    assert told.strip().splitlines()[-1].startswith("interrupted"), told
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert committed(targets) == []


def test_an_interrupt_while_the_program_loads(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    run = started(eight[0], tmp_path / "t", popen=subprocess.Popen)
    process = psutil.Process(run.pid)
    wait_for(lambda: any("torch" in entry.path for entry in process.memory_maps()), run)
    os.killpg(run.pid, signal.SIGINT)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 130, told
    require_plain(told)
    assert told.strip().splitlines()[-1].startswith("interrupted"), told
