"""SIGKILL at any instant, to a run or a worker: the same command ends in the same bytes and leaves nothing behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support import processes
from support.counts import Counted
from support.extraction import command, every_file

from milan_pipe.config.images import PrepareSettings
from milan_pipe.images.prepare import prepare

DEADLINE = 180.0
LONGEST_DELAY = 0.2


@dataclass(frozen=True)
class Job:
    """Images, the settings of this module, and the tree of an unbroken run."""

    images: Path
    whole: dict[str, bytes]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("killed")
    prepare("demo", folder / "images", PrepareSettings(train_scenes=60, test_scenes=0, samples_per_shard=5), workers=1)
    # Without `processes`: what they write is compared with what a process writes that has imported for itself.
    subprocess.run(command(folder / "images", folder / "whole"), check=True, capture_output=True, cwd=folder)
    return Job(folder / "images", every_file(folder / "whole"))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def start(job: Job, targets: Path, scratch: Path, *more: str) -> subprocess.Popen[str]:
    with (scratch.parent / "said").open("w") as said:
        return processes.Popen(
            command(job.images, targets, *more),
            cwd=scratch.parent,
            # torchvision's import makes an empty folder for torch's compiler where temporary files go, if none is named
            env={**os.environ, "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch.parent / "torch")},
            stdout=subprocess.DEVNULL,
            stderr=said,
            text=True,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[str], scratch: Path, *codes: int) -> tuple[int, str]:
    """Exit status, one of those expected, and what the last run that was started said."""
    code, said = process.wait(timeout=DEADLINE), (scratch.parent / "said").read_text()
    assert code in codes, said
    return code, said


def begun(targets: Path) -> set[str]:
    """What a run leaves as it goes: shards in the making, and records."""
    names = {path.name for path in targets.glob(".partial-0*")}
    return names | {path.name for path in targets.glob("manifest/*.json")}


def wait_for(condition: object, process: subprocess.Popen[str]) -> bool:
    """Whether something came to hold while a process ran."""
    assert callable(condition)
    ends = time.monotonic() + DEADLINE
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < ends, "nothing happened"
        time.sleep(0.001)
    return False


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end_of(processes: list[psutil.Process]) -> None:
    """Workers of a run that was killed see that it is gone."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in family(process):
        try:
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def leave_nothing(targets: Path, scratch: Path) -> None:
    assert [path.name for path in targets.rglob(".partial*")] == []
    assert list(scratch.iterdir()) == []


def kills(job: Job, tmp_path: Path, scratch: Path, count: int, more: list[str]) -> Iterator[int]:
    """Kill runs at random instants, and let the same command go on. Yields shards committed at each kill."""
    rng, done = random.Random(count), 0
    targets = tmp_path / "targets"
    while done < count:
        before, records = begun(targets), len(list(targets.glob("manifest/*.json"))) + done % 4

        def far_enough(before: set[str] = before, records: int = records) -> bool:
            return bool(begun(targets) - before) and len(list(targets.glob("manifest/*.json"))) >= records

        process = start(job, targets, scratch, *more)
        running = wait_for(far_enough, process)
        if running:
            time.sleep(rng.uniform(0, LONGEST_DELAY))
        children = family(process)
        process.send_signal(signal.SIGKILL)
        if ended(process, scratch, 0, -signal.SIGKILL)[0]:
            done += 1
            yield len(list(targets.glob("manifest/*.json")))
        end_of(children)
        if (targets / "manifest.json").exists():
            assert every_file(targets) == job.whole
            shutil.rmtree(targets)


def goes_on(job: Job, tmp_path: Path, scratch: Path, count: int, *more: str) -> None:
    committed = list(kills(job, tmp_path, scratch, count, list(more)))
    assert len(committed) == count
    print("shards committed at each kill:", *committed)
    assert len(set(committed)) > 1, "all kills fell on the same shard"
    ends_as_unbroken(job, tmp_path / "targets", scratch, *more)


def ends_as_unbroken(job: Job, targets: Path, scratch: Path, *more: str) -> None:
    ended(start(job, targets, scratch, *more), scratch, 0)
    found = every_file(targets)
    assert found.keys() == job.whole.keys()
    assert [path for path in found if found[path] != job.whole[path]] == []
    leave_nothing(targets, scratch)


def test_a_killed_run_goes_on(job: Job, tmp_path: Path, scratch: Path) -> None:
    goes_on(job, tmp_path, scratch, 3)


def test_a_killed_run_of_two_workers_goes_on(job: Job, tmp_path: Path, scratch: Path) -> None:
    goes_on(job, tmp_path, scratch, 2, "--workers", "2")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("more", "how"), [([], "one process"), (["--workers", "2"], "two workers")])
def test_forty_kills(job: Job, tmp_path: Path, scratch: Path, more: list[str], how: str, counted: Counted) -> None:
    goes_on(job, tmp_path, scratch, 40, *more)
    counted(f"SIGKILL of `extract-targets`, {how}", 40, "the store is an unbroken run's, byte for byte")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_array_jobs(job: Job, tmp_path: Path, scratch: Path, counted: Counted) -> None:
    rng, done = random.Random(20), 0
    targets = tmp_path / "targets"
    while done < 20:
        before = begun(targets)
        jobs = [start(job, targets, scratch, "--shards", part) for part in ("0/2", "1/2")]
        victim, other = rng.sample(jobs, 2)

        def far_enough(before: set[str] = before) -> bool:
            return bool(begun(targets) - before)

        if wait_for(far_enough, victim):
            time.sleep(rng.uniform(0, LONGEST_DELAY))
        # The other job goes on, or dies as well.
        for process in (victim, *([other] if rng.random() < 0.7 else [])):
            process.send_signal(signal.SIGKILL)
            done += ended(process, scratch, 0, -signal.SIGKILL)[0] != 0
        ended(other, scratch, 0, -signal.SIGKILL)
        if (targets / "manifest.json").exists():
            assert every_file(targets) == job.whole
            shutil.rmtree(targets)
    ends_as_unbroken(job, targets, scratch)
    counted(
        "SIGKILL of one or both of two array jobs (`--shards`)", done, "the store is an unbroken run's, byte for byte"
    )


def test_a_worker_killed_in_a_shard_costs_nothing(job: Job, tmp_path: Path, scratch: Path) -> None:
    targets = tmp_path / "targets"
    process = start(job, targets, scratch, "--workers", "2")
    assert wait_for(lambda: len(list(targets.glob(".partial-0*"))) == 2, process)
    workers_of(process)[0].kill()
    _, stderr = ended(process, scratch, 0)
    assert every_file(targets) == job.whole
    leave_nothing(targets, scratch)
    assert "Traceback" not in stderr
    assert "distributed" not in stderr
    assert "lost 1 of 2 workers" in stderr


@pytest.mark.parametrize("more", [[], ["--workers", "2"]], ids=["one process", "two workers"])
def test_an_interrupt_is_one_line_and_the_same_command_goes_on(
    job: Job, tmp_path: Path, scratch: Path, more: list[str]
) -> None:
    targets = tmp_path / "targets"
    process = start(job, targets, scratch, *more)
    assert wait_for(lambda: list(targets.glob("manifest/*.json")), process)
    children = family(process)
    # As a terminal does: to all processes of the command.
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = ended(process, scratch, 130)
    assert "Traceback" not in stderr
    assert "distributed" not in stderr
    assert "interrupted" in stderr.lower()
    end_of(children)
    assert not (targets / "manifest.json").exists()
    processes.run(command(job.images, targets, *more), check=True, capture_output=True, cwd=tmp_path)
    assert every_file(targets) == job.whole
    leave_nothing(targets, scratch)
