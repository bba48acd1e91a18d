"""What can go wrong around a Dask cluster: lost clients, schedulers and workers, two runs at once, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from distributed import Client, Future, LocalCluster
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from support import processes
from support.extraction import SETTINGS, command, every_file
from support.s3 import free_port

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings, PrepareSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.devices import cards
from milan_pipe.errors import (
    DataError,
    DeviceFullError,
    MilanError,
    MismatchError,
    MissingError,
    SettingError,
    StoreError,
)
from milan_pipe.extraction import cluster, worker
from milan_pipe.extraction.cluster import _client, _local_cluster, _outcome
from milan_pipe.extraction.run import ExtractProgress
from milan_pipe.extraction.shard import ShardResult
from milan_pipe.extraction.worker import Assignment, process_count
from milan_pipe.images.prepare import prepare
from milan_pipe.targets.store import open_targets

DEADLINE = 180.0

Tree = dict[str, bytes]


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


def require_plain(stderr: str) -> None:
    """No traceback, and none of Dask's own log lines, as `2026-11-24 03:37:04,123 - distributed.nanny - WARNING`."""
    assert "Traceback" not in stderr, stderr
    assert not re.search(r" - (distributed|tornado|asyncio)\b", stderr), stderr


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """Eight shards of six scenes, and the files of an unbroken run in one process."""
    return unbroken(tmp_path_factory.mktemp("eight"), 48)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """As `eight`, of other images."""
    return unbroken(tmp_path_factory.mktemp("others"), 24, seed=9)


def unbroken(folder: Path, scenes: int, seed: int = 0) -> tuple[Path, Tree]:
    sizes = PrepareSettings(train_scenes=scenes, test_scenes=0, samples_per_shard=6, seed=seed)
    prepare("demo", folder / "images", sizes, workers=1)
    processes.run(command(folder / "images", folder / "whole"), check=True, capture_output=True, cwd=folder)
    return folder / "images", every_file(folder / "whole")


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


@dataclass
class Cluster:
    """A scheduler and its workers, as processes; they end with `stack`."""

    folder: Path
    stack: contextlib.ExitStack
    address: str = ""
    scheduler: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        port = str(free_port())
        self.address = f"tcp://127.0.0.1:{port}"
        words = ("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
        self.scheduler = self.stack.enter_context(dask_process(self.folder, *words))
        self.workers = []

    def add_worker(self) -> None:
        words = ("worker", self.address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60")
        self.workers.append(self.stack.enter_context(dask_process(self.folder, *words)))


@pytest.fixture(scope="module")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("dask"), stack)


@pytest.fixture
def running(started_cluster: Cluster) -> Cluster:
    """A scheduler with two workers: that of the test before, where it is alive."""
    if started_cluster.scheduler is None or started_cluster.scheduler.poll() is not None:
        started_cluster.start()
    while len(started_cluster.workers) < 2:
        started_cluster.add_worker()
    return started_cluster


def test_two_runs_on_one_scheduler_and_one_of_them_killed(
    eight: tuple[Path, Tree], others: tuple[Path, Tree], running: Cluster, tmp_path: Path
) -> None:
    """Shards of both have the same names; neither takes the other's for its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    killed = started(eight[0], first, "--scheduler", running.address)
    wait_for(lambda: committed(first), killed)
    killed.kill()
    killed.wait()
    assert 0 < len(committed(first)) < 8
    runs = [
        started(eight[0], first, "--scheduler", running.address),
        started(others[0], second, "--scheduler", running.address),
    ]
    for run in runs:
        stderr = run.communicate(timeout=DEADLINE)[1]
        assert run.returncode == 0, stderr
        require_plain(stderr)
    assert every_file(first) == eight[1]
    assert every_file(second) == others[1]


def test_workers_join_and_leave(eight: tuple[Path, Tree], running: Cluster, tmp_path: Path) -> None:
    targets = tmp_path / "t"
    run = started(eight[0], targets, "--scheduler", running.address)
    wait_for(lambda: committed(targets), run)
    # They stand still until the new one holds a shard, so that the run cannot end before.
    present = [process for worker in running.workers for process in children(psutil.Process(worker.pid))]
    for process in present:
        process.suspend()
    held = set(targets.glob(".partial-0*"))
    running.add_worker()
    wait_for(lambda: set(targets.glob(".partial-0*")) - held, run)
    for process in present:
        process.resume()
    running.workers.pop(0).terminate()
    stderr = run.communicate(timeout=DEADLINE)[1]
    assert run.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert every_file(targets) == eight[1]


def test_a_lost_scheduler_is_one_line_and_the_same_command_goes_on(
    eight: tuple[Path, Tree], running: Cluster, tmp_path: Path
) -> None:
    targets = tmp_path / "t"
    run = started(eight[0], targets, "--scheduler", running.address)
    wait_for(lambda: len(committed(targets)) > 1, run)
    assert running.scheduler is not None
    running.scheduler.kill()
    stderr = run.communicate(timeout=DEADLINE)[1]
    running.scheduler.wait()
    assert run.returncode == 2, stderr
    require_plain(stderr)
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert f"the scheduler {running.address} was lost" in errors[0]
    assert "the same command goes on" in errors[0]
    processes.run(command(eight[0], targets), check=True, capture_output=True, cwd=tmp_path)
    assert every_file(targets) == eight[1]


def test_a_worker_writes_to_the_store_that_is_meant(eight: tuple[Path, Tree], running: Cluster, tmp_path: Path) -> None:
    """Not to one that was there before, nor to one of the same name in the worker's own folder."""
    own = running.folder / "own"
    stderr = started(eight[0], own, "--scheduler", running.address).communicate(timeout=DEADLINE)[1]
    assert every_file(own) == eight[1], stderr
    other = ["--set", "views.seed=6"]
    processes.run(command(eight[0], tmp_path / "other", *other), check=True, capture_output=True)
    kept = own.rename(running.folder / "kept")
    processes.run(command(eight[0], own, "--scheduler", running.address, *other), check=True, capture_output=True)
    assert every_file(own) == every_file(tmp_path / "other")
    (tmp_path / "client").mkdir()
    given = command(eight[0], "kept", "--scheduler", running.address)
    processes.run(given, check=True, capture_output=True, cwd=tmp_path / "client")
    assert every_file(tmp_path / "client" / "kept") == eight[1] == every_file(kept)


@pytest.mark.ci
def test_a_worker_that_cannot_leaves_its_shards_to_others(
    eight: tuple[Path, Tree], running: Cluster, tmp_path: Path
) -> None:
    """It has another version of the package, and fails at once each time."""
    preload = tmp_path / "old.py"
    preload.write_text("import milan_pipe\nmilan_pipe.__version__ = '0.0.1'\n")
    words = ("worker", running.address, "--nthreads", "1", "--no-dashboard", "--preload", str(preload))
    with dask_process(running.folder, *words), Client(running.address) as client:
        client.wait_for_workers(3, timeout=DEADLINE)
        stderr = started(eight[0], tmp_path / "t", "--scheduler", running.address).communicate(timeout=DEADLINE)[1]
    assert every_file(tmp_path / "t") == eight[1], stderr


@pytest.mark.ci
def test_without_a_worker_it_says_that_it_waits(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        cluster.start()
        cluster.add_worker()
        with Client(cluster.address, timeout=DEADLINE) as client:
            client.wait_for_workers(1, timeout=DEADLINE)
        run = started(eight[0], tmp_path / "t", "--scheduler", cluster.address)
        wait_for(lambda: committed(tmp_path / "t"), run)
        for process in (psutil.Process(cluster.workers[0].pid), *children(psutil.Process(cluster.workers[0].pid))):
            process.kill()
        assert run.stderr is not None
        line = next(line for line in run.stderr if "lost" in line)
        assert f"lost 1 of 1 workers; none is left, waiting for `dask worker {cluster.address}`" in line
        cluster.add_worker()
        assert run.wait(DEADLINE) == 0
    assert every_file(tmp_path / "t") == eight[1]


def with_preload(script: str, images: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of this machine, each of which runs a script before anything else."""
    (folder / "preload.py").write_text(script)
    environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__PRELOAD": str(folder / "preload.py")}
    given = command(images, folder / "t", "--workers", "2")
    return subprocess.run(
        given, env=environment, capture_output=True, text=True, cwd=folder, timeout=DEADLINE, check=False
    )


@pytest.mark.ci
def test_a_shard_that_kills_its_workers_is_reported_and_the_others_are_done(
    eight: tuple[Path, Tree], tmp_path: Path
) -> None:
    # Dask runs it in a nanny and in its worker, and twice in one that is started again.
    script = """
import os, signal, time
from milan_pipe.extraction import cluster, worker
def too_deep(depth):
    return too_deep(depth + 1)
def kill(assignment, job, report):
    if job.name == "000002":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return too_deep(0) if job.name == "000005" else worker.do_shard(assignment, job, report)
cluster.do_shard = kill
"""
    run = with_preload(script, eight[0], tmp_path)
    assert run.returncode == 2, run.stderr
    error = next(line for line in run.stderr.splitlines() if line.startswith("error:"))
    assert "2 of 8 shards failed: " in error
    assert "000002: the worker died 4 times over shard 000002" in error
    assert "000005: RecursionError: maximum recursion depth exceeded" in error
    assert committed(tmp_path / "t") == [f"{number:06d}" for number in range(8) if number not in (2, 5)]


@pytest.mark.ci
@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_ends_as_it_starts_is_told(eight: tuple[Path, Tree], tmp_path: Path, count: int) -> None:
    script = f"""
import os, signal
for number in range({count}):
    try:
        os.close(os.open({str(tmp_path / "ended")!r} + str(number), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        continue
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = with_preload(script, eight[0], tmp_path)
    if count == 1:
        assert run.returncode == 0, run.stderr
        assert "1 of the 2 processes of extract.workers=2 did not start" in run.stderr
        assert every_file(tmp_path / "t") == eight[1]
    else:
        assert run.returncode == 2, run.stderr
        assert "error: none of the 2 processes of extract.workers=2 started" in run.stderr


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


def test_what_is_done_again_as_its_result_is_fetched_may_fail_and_the_scheduler_is_not_lost() -> None:
    class DoneAgain:
        status = "finished"

        def exception(self) -> BaseException | None:
            return None

        def result(self) -> None:
            self.status = "error"
            raise StoreError("000000 cannot be written: File exists")

    result = _outcome(DoneAgain(), "000000")  # type: ignore[arg-type]
    assert (result.source, str(result.error)) == (None, "000000 cannot be written: File exists")


def test_a_worker_that_goes_as_it_is_asked_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"a": CommClosedError("gone")}, {"a": CommClosedError("gone"), "b": "bfloat16"}])
    client = SimpleNamespace(wait_for_workers=lambda _: None, run=lambda *_, **__: next(answers))
    monkeypatch.setattr(cluster, "_connected", lambda _: contextlib.nullcontext(client))
    assert cluster.precision_of_workers("tcp://host:1", TeacherSettings(), ExtractSettings()) == "bfloat16"


@pytest.mark.slow
def test_a_script_needs_no_guard(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    """Workers are spawned, and would run the script again that began them."""
    code = (
        "import milan_pipe\n"
        f"params = milan_pipe.load_params(overrides={[*SETTINGS, 'extract.workers=2']!r})\n"
        f"print(milan_pipe.extract_targets({str(eight[0])!r}, 'targets', params).shards)\n"
    )
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n"
    assert every_file(tmp_path / "targets") == eight[1]


@pytest.mark.slow
def test_a_scheduler_without_workers_is_reported(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    targets, folder = tmp_path / "t", tmp_path / "dask"
    folder.mkdir()
    port = str(free_port())
    address = f"tcp://127.0.0.1:{port}"
    with dask_process(folder, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"):
        run = started(eight[0], targets, "--scheduler", address)
        assert run.stderr is not None
        line = next(line for line in run.stderr if line.startswith("warning:"))
        assert f"no worker has joined {address}" in line
        with dask_process(folder, "worker", address, "--nthreads", "2", "--no-dashboard"):
            stderr = run.communicate(timeout=DEADLINE)[1]
    assert run.returncode == 0, stderr
    assert every_file(targets) == eight[1]


def children(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("spawn_main" in word for word in child.cmdline()):
                found.append(child)
    return found


def test_a_shard_that_is_done_again_counts_once(images: Path, extract, tmp_path: Path) -> None:
    reported: list[ExtractProgress] = []
    killed: list[int] = []

    def kill_one(now: ExtractProgress) -> None:
        reported.append(now)
        if now.views and not killed:
            for worker in children(psutil.Process())[:1]:
                killed.append(worker.pid)
                worker.kill()

    with pytest.warns(RuntimeWarning, match="lost 1 of 2 workers"):
        extract(images, tmp_path / "t", workers=2, teacher_threads=1, on_progress=kill_one)
    assert len(killed) == 1
    assert (reported[-1].shards_done, reported[-1].views) == (3, 48)
    assert max(now.views for now in reported) == 48
    counts = [now.views for now in reported]
    assert counts == sorted(counts)


def test_a_worker_that_goes_before_its_result_is_fetched_takes_nothing_with_it(
    images: Path, whole, extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler says then that the result is lost, and does the shard again; it is not lost itself."""
    killed: list[int] = []

    def kill_before(future: Future, shard: str) -> ShardResult:  # type: ignore[type-arg]
        if not killed:
            killed.extend(future.client.run(os.getpid).values())
            os.kill(killed[0], signal.SIGKILL)
            ends = time.monotonic() + DEADLINE
            while future.status != "lost":
                assert time.monotonic() < ends, future.status
                time.sleep(0.001)
        return _outcome(future, shard)

    monkeypatch.setattr(cluster, "_outcome", kill_before)
    with pytest.warns(RuntimeWarning, match="lost 1 of 1 workers"):
        done = extract(images, tmp_path / "t", shards="1/3", workers=2)
    assert len(killed) == 1
    assert (done.shards, committed(tmp_path / "t")) == (1, ["000001"])
    shard = {name: data for name, data in every_file(whole[0]).items() if "000001" in name}
    assert {name: data for name, data in every_file(tmp_path / "t").items() if "000001" in name} == shard


def test_a_shard_that_fails_three_times_counts_no_view_twice(images: Path, whole, extract, tmp_path: Path) -> None:
    """The others are committed, and the same command goes on once it is repaired."""
    shutil.copytree(images, tmp_path / "images")
    bad = sorted((tmp_path / "images").glob("*.tar"))[1]
    data = bad.read_bytes()
    bad.write_bytes(data[:-20_000])
    reported: list[ExtractProgress] = []
    with pytest.raises(DataError, match=r"000001: .*train-000001\.tar"):
        extract(tmp_path / "images", tmp_path / "t", workers=2, teacher_threads=1, on_progress=reported.append)
    assert reported[-1].shards_done == 2
    assert 28 <= max(now.views for now in reported) <= 48
    assert committed(tmp_path / "t") == ["000000", "000002"]
    bad.write_bytes(data)
    assert extract(tmp_path / "images", tmp_path / "t").skipped == 2
    assert every_file(tmp_path / "t") == every_file(whole[0])


def test_each_worker_has_a_card_of_its_own_in_turn(tmp_path: Path) -> None:
    """Two cards and three workers, as the processes see them; the cards themselves cannot exist here."""
    with processes.forked_workers(), _local_cluster(str(tmp_path), ["3", "5"]) as cluster, Client(cluster) as client:
        cluster.scale(3)
        client.wait_for_workers(3, timeout=60)
        seen = client.run(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
        assert sorted(seen.values()) == ["3", "3", "5"]


def test_a_cluster_of_this_machine_is_reached_from_it_alone_and_has_no_dashboard() -> None:
    extract = ExtractSettings(device="cpu", workers=1)
    assignment = Assignment(
        targets="t", header_sha256="", teacher=TeacherSettings(), extract=extract, limits=ImageSettings()
    )
    answers = []

    def listening() -> set[tuple[str, int]]:
        own, found = psutil.Process(), []
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.net_connections("inet")
        return {tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN}

    # Servers of other tests may live as long as the session.
    others = listening()
    with processes.forked_workers(), _client(assignment, 1):
        ports = listening() - others
        # Of the scheduler, a nanny and a worker; and a web server of all but the nanny.
        assert len(ports) == 5
        assert {host for host, _ in ports} <= {"127.0.0.1", "::1"}
        for host, port in ports:
            for page in ("status", "health", "metrics", "info/main/workers.html"):
                with contextlib.suppress(ConnectionError), socket.create_connection((host, port), timeout=60) as asked:
                    asked.sendall(f"GET /{page} HTTP/1.0\r\n\r\n".encode())
                    answers.append(asked.recv(12))
    assert [answer for answer in answers if answer.startswith(b"HTTP/")] == [b"HTTP/1.1 404"] * 8


def test_cards_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cards() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-8a")
    assert cards() == ["6", "GPU-8a"]
    for processors, expected in ((1, 2), (16, 8), (96, 16)):
        monkeypatch.setattr("milan_pipe.extraction.worker.thread_count", lambda _, found=processors: found)
        assert process_count(ExtractSettings(workers="auto")) == expected
    assert process_count(ExtractSettings(workers="auto", device="cpu")) == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert process_count(ExtractSettings(workers="auto")) == 1
    assert process_count(ExtractSettings(workers=3)) == 3


@pytest.mark.parametrize("kind", [MissingError, StoreError, DataError, MismatchError, DeviceFullError])
def test_errors_of_workers_arrive(kind: type[MilanError]) -> None:
    """As `distributed`, which is imported here, has them pickled."""
    error = kind("what is wrong")
    error.add_note("where")
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.__notes__) == (kind, "what is wrong", ["where"])


def test_workers_say_what_precision_they_compute_in(images: Path, extract, tree, tmp_path: Path) -> None:
    """A client whose own device would choose otherwise; a store that it begins has the workers' precision."""

    def bfloat16(precision: str, _: object) -> str:
        return "bfloat16" if precision == "auto" else precision

    with (
        processes.forked_workers(),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("milan_pipe.teacher.clip.resolve_teacher_precision", bfloat16)
        address = cluster.scheduler_address
        extract(images, tmp_path / "t", scheduler=address)
        extract(None, tmp_path / "seen", views_from=tmp_path / "t", scheduler=address)
        assert tree(tmp_path / "seen") == tree(tmp_path / "t")
        assert open_targets(tmp_path / "t").header.teacher.precision == "float32"
        one = next(iter(client.scheduler_info()["workers"]))
        client.run(lambda: setattr(worker, "resolve_teacher_precision", bfloat16), workers=[one])
        with pytest.raises(SettingError, match=f"means different things on the workers of {address}"):
            extract(images, tmp_path / "other", scheduler=address)


@pytest.mark.parametrize("spawned", [1, 2])
def test_an_interrupt_while_workers_start(eight: tuple[Path, Tree], tmp_path: Path, spawned: int) -> None:
    targets = tmp_path / "t"
    run = started(eight[0], targets, "--workers", "2")
    process = psutil.Process(run.pid)
    wait_for(lambda: len(children(process)) >= spawned, run)
    family = process.children(recursive=True)
    os.killpg(run.pid, signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 130, stderr
    require_plain(stderr)
    assert stderr.strip().splitlines()[-1].startswith("interrupted"), stderr
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert committed(targets) == []


def test_an_interrupt_while_the_program_loads(eight: tuple[Path, Tree], tmp_path: Path) -> None:
    run = started(eight[0], tmp_path / "t", popen=subprocess.Popen)
    process = psutil.Process(run.pid)
    wait_for(lambda: any("torch" in entry.path for entry in process.memory_maps()), run)
    os.killpg(run.pid, signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 130, stderr
    require_plain(stderr)
    assert stderr.strip().splitlines()[-1].startswith("interrupted"), stderr
