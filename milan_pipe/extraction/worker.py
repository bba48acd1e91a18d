"""What one process needs to extract shards of a store that exists; made of plain settings, so that it can be sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from milan_pipe import __version__
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings
from milan_pipe.config.params import Params
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.devices import cards, resolve_device
from milan_pipe.errors import DataError, MismatchError
from milan_pipe.extraction.render import ShardJob
from milan_pipe.extraction.shard import Extractor, ShardResult
from milan_pipe.images.ahead import thread_count
from milan_pipe.storage import location_of
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets.store import TargetStoreWriter, header_sha256, read_header
from milan_pipe.teacher.clip import Teacher, load_teacher, load_teacher_of, resolve_teacher_precision

# Threads of one process wait for their turns at the interpreter, so that it renders no more than some 2,400 views/s;
# docs/performance.md has the measurements. Each process has a teacher on the card.
_MOST_PER_CARD = 8


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A store to add to, and how; the rest is in the store's header.

    Attributes:
        targets: absolute, as a worker may run in another folder.
        header_sha256: of the header of this store.
        version: of milan-pipe, where shards are assigned.
    """

    targets: str
    header_sha256: str
    version: str = __version__
    teacher: TeacherSettings
    extract: ExtractSettings
    limits: ImageSettings

    def with_share(self, workers: int) -> Assignment:
        """The same for one of several processes on a machine: threads that were left open become its share."""
        share = max(1, thread_count(0) // workers)
        own = {name: getattr(self.extract, name) or share for name in ("threads", "teacher_threads")}
        return replace(self, extract=self.extract.model_copy(update=own))


def cards_of(extract: ExtractSettings) -> list[str]:
    """The cards that processes of this machine share out; none where the device is named."""
    return cards() if extract.device in ("auto", "cuda") else []


def process_count(extract: ExtractSettings) -> int:
    """Processes on this machine: `auto` is one for every two processors, at most 8 a card; without a card, one."""
    if extract.workers != "auto":
        return extract.workers
    cards = len(cards_of(extract))
    return cards * min(_MOST_PER_CARD, max(1, thread_count(0) // cards // 2)) if cards else 1


def _teacher_device(extract: ExtractSettings) -> torch.device:
    """The teacher's device; on a CPU, torch is given the teacher's number of threads."""
    device = resolve_device(extract.device)
    if device.type == "cpu" and extract.teacher_threads:
        torch.set_num_threads(extract.teacher_threads)
    return device


def teacher_precision(teacher: TeacherSettings, extract: ExtractSettings) -> str:
    """What the teacher's precision means in this process; SettingError as `resolve_device`."""
    return resolve_teacher_precision(teacher.precision, resolve_device(extract.device))


def load_extraction_teacher(params: Params) -> Teacher:
    """The teacher of a run, on its device, with the student's grid; raises as `load_teacher`."""
    teacher = load_teacher(params.teacher, _teacher_device(params.extract), grid=grid_of(params.student))
    return teacher.compile_tower() if params.extract.compile else teacher


_lock = threading.Lock()
_loaded: dict[Assignment, Extractor] = {}


def do_shard(assignment: Assignment, job: ShardJob, on_progress: Callable[[int, int], None]) -> ShardResult:
    """Do one shard in this process, with a teacher that stays loaded for the next.

    Raises:
        MismatchError: this machine's teacher is not the one that the store's header names, the store that is seen from
            here is another one, or milan-pipe is of another version.
        DataError: the store cannot be seen from here.
    """
    if assignment.version != __version__:
        raise MismatchError(
            f"this worker has milan-pipe {__version__}, the command {assignment.version}, and their bytes may differ; "
            "install the same everywhere"
        )
    with _lock:
        if assignment not in _loaded:
            # One job at a time has its teacher in memory.
            _loaded.clear()
            location = location_of(assignment.targets)
            header = read_header(location)
            if header is None:
                raise DataError(
                    f"{location} is not a target store as seen from this worker; it must be a shared folder or bucket"
                )
            if header_sha256(header) != assignment.header_sha256:
                raise MismatchError(
                    f"{location} is another store as seen from this worker; it must be a shared folder or bucket, one "
                    "for all"
                )
            teacher = load_teacher_of(header, assignment.teacher, _teacher_device(assignment.extract), location)
            if assignment.extract.compile:
                teacher.compile_tower()
            writer = TargetStoreWriter(assignment.targets, header)
            _loaded[assignment] = Extractor(teacher, writer, assignment.extract, assignment.limits)
        return next(_loaded[assignment].run([job], on_progress))
