"""Many shards on a Dask cluster: a shard is a task, and what a lost worker had is done again by another."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dask
import psutil
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed, get_worker

from milan_pipe.data.ahead import thread_count
from milan_pipe.errors import StoreError
from milan_pipe.extract.render import ShardJob
from milan_pipe.extract.shard import ShardResult
from milan_pipe.extract.worker import Assignment, do_shard

_TOPIC = "milan-pipe"
_FOLDER = "milan-pipe-dask"
_ATTEMPTS = 3
_CONNECT_SECONDS = 30


def _task(assignment: Assignment, job: ShardJob) -> ShardResult:
    worker = get_worker()

    def tell(views: int, bad: int) -> None:
        worker.log_event(_TOPIC, {"views": views, "bad": bad})

    result = do_shard(assignment, job, tell)
    if result.error is not None:
        raise result.error
    return result


@contextmanager
def _client(assignment: Assignment) -> Iterator[tuple[Client, int]]:
    """A client, and the number of workers that share a machine with each other."""
    extract = assignment.extract
    if extract.scheduler is not None:
        try:
            client = Client(extract.scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"no Dask scheduler answers at {extract.scheduler} ({' '.join(str(error).split())[:200]}); start one "
                "with `dask scheduler` and name the address that it prints"
            ) from error
        with client:
            hosts = Counter(worker["host"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
            yield client, max(hosts.values(), default=1)
        return
    share = str(max(1, thread_count(0) // extract.workers))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), share)
    environment["DASK_LOGGING__DISTRIBUTED"] = "critical"
    with (
        _own_folder() as folder,
        dask.config.set({"distributed.nanny.pre-spawn-environ": environment, "temporary-directory": folder}),
        LocalCluster(
            n_workers=extract.workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
            local_directory=folder,
            preload=["milan_pipe.extract.local_worker"],
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client, extract.workers


@contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary folder for Dask, named by this process; those of runs that were killed are removed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}-*-*"):
        process = path.name.split("-")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}-{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield folder


def extract_on_cluster(
    assignment: Assignment,
    jobs: Sequence[ShardJob],
    on_progress: Callable[[int, int], None],
    on_workers: Callable[[int], None],
) -> Iterator[ShardResult]:
    """Do shards on a cluster of this machine, or on one that runs already.

    Args:
        on_progress: told views done and samples set aside, from whichever worker.
        on_workers: told how many workers there are.

    Yields:
        One result per job, as they come. A shard that failed three times comes with its error.

    Raises:
        StoreError: no scheduler answers.
    """
    # Dask tells of each worker that comes, goes or hangs at length; what matters of it is told below, in a line.
    for name in ("distributed", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _client(assignment) as (client, sharing):
        assignment = assignment.with_share(sharing)
        client.subscribe_topic(_TOPIC, lambda event: on_progress(event[1]["views"], event[1]["bad"]))

        def submit(job: ShardJob, attempt: int) -> Future:  # type: ignore[type-arg]
            key = f"extract-{job.name}-{attempt}"
            # First come, first served, so that what is left at the end is the tail and not holes.
            return client.submit(_task, assignment, job, key=key, pure=False, priority=-int(job.name))

        known: set[str] = set()

        def look_at_workers() -> None:
            there = set(client.scheduler_info(n_workers=-1)["workers"])
            if known - there:
                warnings.warn(
                    f"lost {len(known - there)} of {len(known)} workers; what they had is done again by others",
                    RuntimeWarning,
                    stacklevel=2,
                )
            known.clear()
            known.update(there)
            on_workers(len(there))

        look_at_workers()
        waiting = {submit(job, 1): (job, 1) for job in jobs}
        finished = as_completed(list(waiting))
        for future in finished:
            job, attempt = waiting.pop(future)
            look_at_workers()
            error = future.exception() if future.status != "cancelled" else StoreError("the scheduler was lost")
            if error is None:
                yield future.result()
            elif attempt < _ATTEMPTS and not isinstance(error, KilledWorker):
                again = submit(job, attempt + 1)
                waiting[again] = (job, attempt + 1)
                finished.add(again)
            else:
                if isinstance(error, KilledWorker):
                    error = StoreError(f"the worker died {_ATTEMPTS} times over it; see the worker's own log")
                yield ShardResult(name=job.name, source=None, error=error, views=0, cosine_sum=0.0, seconds={})
