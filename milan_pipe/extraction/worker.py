"""What one process needs to extract shards of a store that exists; made of plain settings, so that it can be sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ViewSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError
from milan_pipe.extraction.render import ShardJob
from milan_pipe.extraction.shard import Recipe, ShardResult, extract_shards
from milan_pipe.images.ahead import thread_count
from milan_pipe.storage import location_of
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import StoreHeader, require_same_header
from milan_pipe.targets.store import TargetStoreWriter, read_header
from milan_pipe.teacher.clip import Teacher, load_teacher


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A store to add to, and how; the rest is in the store's header."""

    targets: str
    teacher: TeacherSettings
    grid: tuple[int, int] | None
    views: ViewSettings
    extract: ExtractSettings

    def with_share(self, workers: int) -> Assignment:
        """The same for one of several processes on a machine: threads that were left open become its share."""
        share = max(1, thread_count(0) // workers)
        extract = self.extract.model_copy(
            update={
                "threads": self.extract.threads or share,
                "teacher_threads": self.extract.teacher_threads or share,
            }
        )
        return replace(self, extract=extract)


def load_assigned_teacher(assignment: Assignment) -> Teacher:
    """The teacher, on its device, with its number of threads.

    Raises:
        SettingError, MissingError, DataError: there is no such teacher, or its weights cannot be had.
    """
    device = resolve_device(assignment.extract.device)
    if device.type == "cpu" and assignment.extract.teacher_threads:
        torch.set_num_threads(assignment.extract.teacher_threads)
    return load_teacher(assignment.teacher, device, grid=assignment.grid)


class ShardWorker:
    """Teacher, codec and store, loaded once."""

    def __init__(self, assignment: Assignment, teacher: Teacher, header: StoreHeader) -> None:
        """Take up work on a store with this header."""
        self._writer = TargetStoreWriter(assignment.targets, header)
        self._recipe = Recipe(
            teacher=teacher,
            views=assignment.views,
            size=header.views.size,
            codec=codec_of(header.codec),
            batch_size=assignment.extract.batch_size,
            threads=thread_count(assignment.extract.threads),
        )

    def run(self, jobs: Iterable[ShardJob], on_progress: Callable[[int, int], None]) -> Iterator[ShardResult]:
        """Do shards one after another; see `extract_shards`."""
        return extract_shards(self._recipe, jobs, self._writer.open_shard, on_progress)


_lock = threading.Lock()
_loaded: dict[Assignment, ShardWorker] = {}


def _worker_of(assignment: Assignment) -> ShardWorker:
    if assignment not in _loaded:
        # One job at a time has its teacher in memory.
        _loaded.clear()
        location = location_of(assignment.targets)
        header = read_header(location)
        if header is None:
            raise DataError(
                f"{location} is not a target store as seen from this worker; it must be a shared folder or bucket"
            )
        teacher = load_assigned_teacher(assignment)
        require_same_header(header, header.model_copy(update={"teacher": teacher.info}), location)
        _loaded[assignment] = ShardWorker(assignment, teacher, header)
    return _loaded[assignment]


def do_shard(
    assignment: Assignment, job: ShardJob, on_progress: Callable[[int, int], None] = lambda *_: None
) -> ShardResult:
    """Do one shard in this process, with a teacher that stays loaded for the next.

    Raises:
        MismatchError: this machine's teacher is not the one that the store's header names.
        DataError: the store cannot be seen from here.
    """
    with _lock:
        return next(iter(_worker_of(assignment).run([job], on_progress)))
