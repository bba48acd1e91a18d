"""Many shards on a Dask cluster: a shard is a task, and what a lost worker had is done again by another."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import psutil

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, MilanError, SettingError, StoreError, one_line
from milan_pipe.extraction.render import ShardJob
from milan_pipe.extraction.shard import ShardResult
from milan_pipe.extraction.worker import Assignment, cards_of, do_shard, process_count, teacher_precision
from milan_pipe.extras import needs
from milan_pipe.images.ahead import thread_count
from milan_pipe.spawning import script_unseen, without_signals

with needs("cluster", "a Dask cluster (--workers, --scheduler)"):
    from distributed import Client, Future, KilledWorker, LocalCluster, Status, as_completed, get_worker
    from distributed.comm.core import CommClosedError

_ATTEMPTS = 3
_CONNECT_SECONDS = 30
_START_SECONDS = 300
_FRAMES = 20
_LOOK_SECONDS = 0.02
_ASKED_FOR = 4
# How often a worker reports to the scheduler and the client counts workers. The scheduler keeps what it is sent, and
# answers with all workers: neither must grow with batches and shards.
_REPORT_SECONDS = 1.0
# Machines may share their temporary folder, and know nothing of each other's processes.
_FOLDER_PREFIX = f"milan-pipe-dask-{platform.node()}-"
# Dask's processes always have a web server; on a cluster of this machine it has no page for others on it to read.
_NO_PAGES: dict[str, list[str]] = {f"distributed.{kind}.http.routes": [] for kind in ("scheduler", "worker")}


def _report_timer() -> Callable[[], bool]:
    """A function that is true when the next report is due: at once, then every `_REPORT_SECONDS` at most."""
    due_at = 0.0

    def due() -> bool:
        nonlocal due_at
        if (now := time.monotonic()) < due_at:
            return False
        due_at = now + _REPORT_SECONDS
        return True

    return due


def _task(assignment: Assignment, sharing: int, job: ShardJob, topic: str) -> ShardResult:
    worker, due = get_worker(), _report_timer()
    worker.log_event(f"{topic}-begun", (job.name, worker.address))
    done_views = done_bad = 0

    def report(views: int, bad: int) -> None:
        nonlocal done_views, done_bad
        done_views += views
        done_bad += bad
        if due():  # what the last second did is reported by the shard's end
            worker.log_event(topic, (job.name, done_views, done_bad))

    # Shared out here, as the processors are this machine's.
    try:
        result = do_shard(assignment.with_share(sharing), job, report)
        if result.error is not None:
            raise result.error
    except Exception as error:
        # Dask sends the frames with it, and the client never hears of an error whose frames it cannot read.
        if not isinstance(error, MilanError):
            error.add_note(traceback.format_exc(limit=-_FRAMES))
        raise error.with_traceback(None) from None
    return result


def _counter(on_progress: Callable[[int, int], None]) -> Callable[[str, int, int], None]:
    """Takes what an attempt at a shard has done so far; the one that came farthest counts, so that none counts twice.

    Reports may come late, even after the shard's end, and from another thread.
    """
    lock = threading.Lock()
    most: dict[str, tuple[int, int]] = {}

    def count(shard: str, views: int, bad: int) -> None:
        with lock:
            then = most.get(shard, (0, 0))
            most[shard] = now = (max(views, then[0]), max(bad, then[1]))
            if now != then:
                on_progress(now[0] - then[0], now[1] - then[1])

    return count


def precision_of_workers(scheduler: str, teacher: TeacherSettings, extract: ExtractSettings) -> str:
    """What precision `auto` means on the workers of a cluster, which may have other devices than this machine.

    Raises:
        StoreError: no scheduler answers.
        SettingError: it means different things on them.
    """
    _silence_dask()
    with _connected(scheduler) as client:
        found: dict[str, Any] = {}
        # Workers may go as they are asked.
        while not found:
            client.wait_for_workers(1)
            told = client.run(teacher_precision, teacher, extract, on_error="return")
            found = {worker: said for worker, said in told.items() if not isinstance(said, CommClosedError)}
    for error in (said for said in found.values() if isinstance(said, Exception)):
        if isinstance(error, OSError | ImportError) and not isinstance(error, MilanError):
            raise StoreError(
                f"a worker of {scheduler} did not say what it computes in ({one_line(error)}); see its own log, or set "
                "teacher.precision"
            ) from error
        raise error
    if len(set(found.values())) > 1:
        told = "; ".join(f"{worker}: {precision}" for worker, precision in sorted(found.items())[:4])
        raise SettingError(
            f"teacher.precision 'auto' means different things on the workers of {scheduler} ({told}); set it to "
            "float32 or bfloat16"
        )
    return str(next(iter(found.values())))


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS)
    # Dask raises some of them for protocols that are not set up, or for what another server answers.
    except (OSError, ValueError, TypeError, ImportError, MemoryError) as error:
        raise StoreError(
            f"no Dask scheduler answers at {scheduler} ({one_line(error)}); start one with "
            "`dask scheduler` and name the address that it prints"
        ) from error
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            _warn(f"no worker has joined {scheduler}; waiting for `dask worker {scheduler}`")
        yield client


@contextmanager
def _client(assignment: Assignment, jobs: int) -> Iterator[tuple[Client, int]]:
    """A client for some jobs, and how many workers share a machine."""
    extract = assignment.extract
    if extract.scheduler is not None:
        with _connected(extract.scheduler) as client:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            if any(worker["nthreads"] > 1 for worker in workers):
                _warn(
                    "a worker does one shard at a time and holds as many as it has threads, so that others may wait; "
                    "start each as `dask worker --nthreads 1`"
                )
            yield client, max(Counter(worker["host"] for worker in workers).values(), default=1)
        return
    workers = min(process_count(extract), jobs)
    share = str(max(1, thread_count(0) // workers))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), share)
    environment["DASK_LOGGING__DISTRIBUTED"] = "critical"
    with (
        script_unseen(),
        own_folder() as folder,
        dask.config.set(
            {
                "distributed.nanny.pre-spawn-environ": environment,
                "temporary-directory": folder,
                # Else a worker has a second shard, which counts as suspicious where the first one kills it.
                "distributed.scheduler.worker-saturation": 1.0,
                # Else a process that is being started again when this has passed is given up, and no other begun.
                "distributed.deploy.lost-worker-timeout": "1 day",
                **_NO_PAGES,
            }
        ),
        _local_cluster(folder, cards_of(extract)) as cluster,
        Client(cluster) as client,
    ):
        cluster.scale(workers)
        _wait_for_processes(cluster, client, workers)
        yield client, workers


def _wait_for_processes(cluster: LocalCluster, client: Client, wanted: int) -> None:
    ends = time.monotonic() + _START_SECONDS
    while (found := len(client.scheduler_info(n_workers=-1)["workers"])) < wanted:
        if found + _given_up(cluster) >= wanted or time.monotonic() > ends:
            break
        time.sleep(_LOOK_SECONDS)
    if not found:
        raise StoreError(f"none of the {wanted} processes of extract.workers={wanted} started; use fewer")
    if found < wanted:
        _warn(f"{wanted - found} of the {wanted} processes of extract.workers={wanted} did not start")


def remove_left_folders() -> None:
    """Remove the temporary folders of this machine's processes that were killed."""
    for path in Path(tempfile.gettempdir()).iterdir():
        process = path.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        if path.name.startswith(_FOLDER_PREFIX) and process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def own_folder() -> Iterator[str]:
    """A temporary folder named by this process, removed at the end."""
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield folder


class _Cluster(LocalCluster):
    """A cluster of this machine whose workers see one of its cards each, in turn."""

    cards: Sequence[str] = ()

    def new_worker_spec(self) -> dict[Any, dict[str, Any]]:
        """Called by Dask for each worker that it adds."""
        ((name, spec),) = super().new_worker_spec().items()  # type: ignore[no-untyped-call]
        if self.cards:
            card = self.cards[len(self.worker_spec) % len(self.cards)]
            spec = {**spec, "options": {**spec["options"], "env": {"CUDA_VISIBLE_DEVICES": card}}}
        return {name: spec}


def _local_cluster(folder: str, cards: Sequence[str] = ()) -> LocalCluster:
    """A cluster without workers yet."""
    # The thread that starts workers takes its signal mask from here, and they take theirs from it.
    with without_signals(signal.SIGINT):
        cluster = _Cluster(  # type: ignore[no-untyped-call]
            n_workers=0,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            host="127.0.0.1",
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            local_directory=folder,
        )
    cluster.cards = cards
    return cluster


def _silence_dask() -> None:
    # Dask logs each worker that comes, goes or hangs at length; what matters is reported here, in a line. Some of its
    # loggers have levels and handlers of their own. A client that leaves before its tasks is logged as critical.
    libraries = ("distributed", "tornado", "asyncio")
    for name in (*libraries, *logging.root.manager.loggerDict):
        if name.partition(".")[0] in libraries:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _given_up(cluster: LocalCluster) -> int:
    """How many processes of this cluster are not started again."""
    return sum(nanny.status in (Status.failed, Status.closed) for nanny in cluster.workers.values())


def _outcome(future: Future, shard: str) -> ShardResult:  # type: ignore[type-arg]
    """The result of a task that has ended; CancelledError or OSError where the scheduler is lost."""
    if future.status == "cancelled":
        raise CancelledError(future.status)
    error: Exception | None = future.exception()
    if isinstance(error, CancelledError):
        raise error
    if error is not None:
        return ShardResult(name=shard, error=error)
    try:
        result: ShardResult = future.result()
    except Exception as again:
        # Its worker went meanwhile, and doing the shard again failed.
        if isinstance(again, CancelledError) or future.status != "error":
            raise
        return ShardResult(name=shard, error=again)
    return result


@dataclass(frozen=True)
class _Attempt:
    """A shard that a worker is to do, the how-manieth time; `left_to` has those it is left to, none if to any."""

    job: ShardJob
    number: int
    left_to: frozenset[str]


class _Tasks:
    """The shards of one extraction that a cluster has; the caller gives them, and takes what becomes of each."""

    def __init__(
        self,
        client: Client,
        sharing: int,
        assignment: Assignment,
        on_progress: Callable[[int, int], None],
        on_workers: Callable[[int], None],
    ) -> None:
        self._client, self._sharing, self._assignment, self._on_workers = client, sharing, assignment, on_workers
        # A scheduler may have other extractions at the same time, of shards of the same names.
        self._topic = f"milan-pipe-{uuid.uuid4().hex}"
        self._numbers = itertools.count()
        self._waiting: dict[Future, _Attempt] = {}  # type: ignore[type-arg]
        self._finished = as_completed(loop=client.loop)
        self._known: set[str] = set()
        # The workers that began each, one after the other.
        self.begun: dict[str, list[str]] = defaultdict(list)
        self.count = _counter(on_progress)
        client.subscribe_topic(self._topic, lambda event: self.count(*event[1]))
        client.subscribe_topic(f"{self._topic}-begun", lambda event: self.begun[event[1][0]].append(event[1][1]))
        self._look_at_workers()

    def submit(self, job: ShardJob, number: int = 1) -> None:
        # A worker that fails is the first to be free again; another may be sound.
        others = self._known.difference(self.begun[job.name]) if number > 1 else set()
        future = self._client.submit(
            _task, self._assignment, self._sharing, job, self._topic,
            key=f"{self._topic}-{job.name}-{next(self._numbers)}",
            # First come, first served, so that what is left at the end is the tail and not holes.
            priority=-int(job.name),
            workers=sorted(others) or None, allow_other_workers=bool(others),
        )  # fmt: skip
        self._waiting[future] = _Attempt(job, number, frozenset(others))
        self._finished.add(future)

    def ended(self) -> Iterator[tuple[_Attempt, ShardResult]]:
        """What became of each, until none is left; more may be submitted meanwhile.

        Raises:
            StoreError: the scheduler was lost, or all processes of this machine.
        """
        due = _report_timer()
        # Asked for in threads: the result of a worker that is lost is waited for until another has done the shard.
        pool = ThreadPoolExecutor(_ASKED_FOR)
        asked: dict[Any, Future] = {}  # type: ignore[type-arg]
        try:
            while self._waiting:
                # The connection may go at any moment, also between two questions to it.
                try:
                    if due():
                        self._look_at_workers()
                    while self._finished.has_ready():
                        future = next(self._finished)
                        if future in self._waiting:
                            asked[pool.submit(_outcome, future, self._waiting[future].job.name)] = future
                    answer = next((answer for answer in asked if answer.done()), None)
                    if answer is None:
                        time.sleep(_LOOK_SECONDS)
                        continue
                    attempt = self._waiting.pop(asked.pop(answer), None)
                    if attempt is None:
                        continue
                    # The last to end may be the one that took over what a lost worker had.
                    if not self._waiting:
                        self._look_at_workers()
                    result = answer.result()
                except (CancelledError, OSError) as gone:
                    if isinstance(gone, MilanError):
                        raise
                    named = f" {scheduler}" if (scheduler := self._assignment.extract.scheduler) else ""
                    raise StoreError(f"the scheduler{named} was lost") from gone
                yield attempt, result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _look_at_workers(self) -> None:
        present = set(self._client.scheduler_info(n_workers=-1)["workers"])
        if lost := self._known - present:
            then = "what they had is done again by others"
            if not present and (scheduler := self._assignment.extract.scheduler):
                then = f"none is left, waiting for `dask worker {scheduler}`"
            _warn(f"lost {len(lost)} of {len(self._known)} workers; {then}")
        self._known = present
        self._on_workers(len(present))
        cluster = self._client.cluster
        if not present and cluster is not None and _given_up(cluster) == len(cluster.workers):
            raise StoreError("all processes of this machine have ended, and cannot be started again")
        # Dask leaves to nobody what was left to workers that are gone.
        for future, attempt in list(self._waiting.items()):
            if attempt.left_to and not attempt.left_to & present:
                del self._waiting[future]
                future.cancel()
                self.submit(attempt.job, attempt.number)


def extract_on_cluster(
    assignment: Assignment,
    jobs: Sequence[ShardJob],
    on_progress: Callable[[int, int], None],
    on_workers: Callable[[int], None],
) -> Generator[ShardResult, None, None]:
    """Do shards on a cluster of this machine, or on one that runs already; results come as shards end.

    Args:
        on_progress: called with views done and samples skipped, from whichever worker.
        on_workers: called with how many workers there are.

    Raises:
        StoreError: no scheduler answers, it was lost, or two shards in a row killed all workers that tried them.
    """
    _silence_dask()
    with _client(assignment, len(jobs)) as (client, sharing):
        tasks = _Tasks(client, sharing, assignment, on_progress, on_workers)
        for job in jobs:
            tasks.submit(job)
        killed: Counter[str] = Counter()
        killed_in_row = 0
        for attempt, result in tasks.ended():
            job = attempt.job
            if result.source is not None:
                killed_in_row = 0
                tasks.count(job.name, result.views, len(result.source.bad))
                yield result
            elif isinstance(result.error, KilledWorker):
                killed[job.name] += 1
                if not tasks.begun[job.name] and killed[job.name] < _ATTEMPTS:
                    # It stood behind a shard that killed its workers, and died with them by Dask's count.
                    tasks.submit(job, attempt.number)
                    continue
                killed_in_row += 1
                death = (
                    f"the worker died {result.error.allowed_failures + 1} times over shard {job.name} ({job.images}); "
                    "see the worker's own log"
                )
                # One may be what no worker can do; two are a machine without memory.
                kind = DataError if killed_in_row == 1 else StoreError
                yield ShardResult(name=job.name, error=kind(death))
            elif attempt.number == _ATTEMPTS:
                yield result
            else:
                tasks.submit(job, attempt.number + 1)
