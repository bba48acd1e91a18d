"""What the errors of extraction say, word for word. Each case runs in a folder of its own, on images of 16 pixels."""

from __future__ import annotations

import collections
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import KilledWorker
from support.images import image, png, write_tar
from support.messages import Case, require_message
from support.targets import header, random_blocks, write_blocks, write_store

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings, ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.targets import CodecSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, DeviceFullError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.extraction import cluster, run
from milan_pipe.extraction.against import verify_against_teacher
from milan_pipe.extraction.render import ShardJob, SourceError, digest
from milan_pipe.extraction.worker import Assignment, do_shard
from milan_pipe.images.shards import expand_shards
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets.schema import ViewInfo
from milan_pipe.teacher.clip import Teacher, TeacherOutput, load_teacher

GOOD, BAD = png(image(0, 0)), b"no image"
STUDENT = StudentSettings(image_size=16, patch_size=8)
SEEN = header(views=1, shards=2, size=16).model_copy(
    update={"views": ViewInfo(size=16, renderer="torch", **ViewSettings(count=1).model_dump())}
)
# The kernel answers a read of it with an input/output error, as a disk does that fails.
UNREADABLE = "/proc/self/mem"
# A disk that is full.
FULL = "/dev/full"


@cache
def teacher() -> Teacher:
    return load_teacher(TeacherSettings(), grid=grid_of(STUDENT))


def images(*shards: Sequence[bytes] | None) -> str:
    """A folder of shards with these images; None is one that cannot be read, and one of no images an empty file."""
    for number, contents in enumerate(shards):
        path = Path(f"i/{number}.tar")
        path.parent.mkdir(exist_ok=True)
        if contents is None:
            path.symlink_to(UNREADABLE)
        elif contents:
            write_tar(path, {f"{row}.png": data for row, data in enumerate(contents)})
        else:
            path.touch()
    return "i"


def extract(
    source: str | None,
    *,
    codec: str = "int8",
    views: ViewSettings | None = None,
    student: StudentSettings = STUDENT,
    change: Callable[[TeacherOutput], object] = lambda _: None,
    **more: Any,
) -> None:
    """Extract into t, whatever becomes of what the teacher gives."""
    names = ("redo", "verify_sources", "on_progress", "views_from")
    arguments = {name: more.pop(name) for name in names if name in more}
    params = Params(
        student=student,
        views=views or ViewSettings(count=1),
        codec=CodecSettings(name=codec),  # type: ignore[arg-type]
        extract=ExtractSettings(**{"threads": 1, "teacher_threads": 1, "device": "cpu", **more}),
    )

    @torch.inference_mode()
    def disturb(_module: object, _inputs: object, given: TeacherOutput) -> None:
        change(given)

    hook = teacher().register_forward_hook(disturb)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "load_extraction_teacher", lambda _: teacher())
            run.extract_targets(source, "t", params, **arguments)
    finally:
        hook.remove()


def scale(factor: float) -> Callable[[TeacherOutput], object]:
    return lambda given: given.features_BST.mul_(factor)


def no_attention(given: TeacherOutput) -> None:
    given.importance_BL.zero_()


def full(_given: TeacherOutput) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def failing(_given: TeacherOutput) -> None:
    raise ZeroDivisionError("a fault of ours")


def changed(change: Callable[[Path], object], **more: Any) -> None:
    """Extract again where the first of two shards was changed."""
    extract(images([GOOD], [GOOD]))
    change(Path("i/0.tar"))
    extract("i", **more)


def other_image(shard: Path) -> None:
    size = shard.stat().st_size
    write_tar(shard, {"0.png": png(np.zeros_like(image(0, 0)))})
    os.truncate(shard, size)


def seen(change: Callable[[Path], object] = lambda _: None, **more: Any) -> None:
    """Extract from the views of a, which was changed."""
    write_store("a", SEEN, [1, 1])
    change(Path("a"))
    extract(None, views_from="a", **more)


def bad_view(folder: Path) -> None:
    shutil.rmtree(folder)
    first, second = (random_blocks(SEEN, 1, seed) for seed in range(2))
    write_blocks(folder, SEEN, [[replace(first[0], jpegs=[[b"no JPEG"]])], second])


def lost_record(folder: Path) -> None:
    (folder / "manifest" / "000001.json").unlink()


def unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    lost_record(folder)


def seen_twice() -> None:
    seen()
    shutil.rmtree("a")
    seen(bad_view)


def in_the_way(now: run.ExtractProgress) -> None:
    """Called when the store is there and its first shard is not."""
    if not now.views:
        shutil.rmtree("t/manifest", ignore_errors=True)
        Path("t/manifest").touch()


def full_disk() -> None:
    def full(now: run.ExtractProgress) -> None:
        if now.shards_done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    extract(images([GOOD]), on_progress=full)


def full_temporary_folder() -> None:
    (shard,) = expand_shards(images([GOOD]))
    with pytest.MonkeyPatch.context() as patch, Path(FULL).open("wb", buffering=0) as copy:
        patch.setattr(tempfile, "tempdir", "scratch")
        digest(shard, copy)


def worker() -> None:
    extract = ExtractSettings(device="cpu")
    assignment = Assignment(
        targets="t", header_sha256="", teacher=TeacherSettings(), extract=extract, limits=ImageSettings()
    )
    (shard,) = expand_shards(images([GOOD]))
    do_shard(assignment, ShardJob(name="000000", images=shard), lambda *_: None)


def no_scheduler(address: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_CONNECT_SECONDS", 0.1)
        extract(images([GOOD]), scheduler=address)


class Completed(collections.deque[object]):
    """As Dask's `as_completed`, where all have ended."""

    add = collections.deque.append
    __next__ = collections.deque.popleft

    def has_ready(self) -> bool:
        return bool(self)


def on_cluster(*, status: str = "error", error: BaseException | None = None, **more: Any) -> None:
    """Extract on a cluster that ends each task so."""

    class Task:
        def __init__(self) -> None:
            self.status = status

        def exception(self) -> BaseException | None:
            return error

    client = SimpleNamespace(
        cluster=None,
        loop=None,
        subscribe_topic=lambda *_: None,
        scheduler_info=lambda **_: {"workers": {}},
        submit=lambda *_, **__: Task(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_client", lambda *_: nullcontext((client, 1)))
        patch.setattr(cluster, "precision_of_workers", lambda *_: "float32")
        patch.setattr(cluster, "as_completed", lambda **_: Completed())
        extract(images([GOOD]), **more)


SKIPPED = "0: not a JPEG, PNG..."
WHOLE = "shards are whole; the same command goes on from there"
NONE_WHOLE = f"0 of 1 {WHOLE}"
AGAIN = "shards are committed; repair these and run the same command again"
CHANGED = "source shards have changed since their targets were made (i/0.tar: {}). Extract them again with --redo {}"
DISK = "input/output error; look at the disk, or at the network mount"
CASES: dict[str, Case] = {
    # --- images -----------------------------------------------------------------------------------------------------
    "shard that cannot be read": (
        lambda: extract(images(None)),
        SourceError,
        f"shard i/0.tar cannot be read: {DISK}",
    ),
    "some shards that cannot be read": (
        lambda: extract(images(None, [GOOD], None)),
        DataError,
        f"2 of 3 shards failed: 000000: shard i/0.tar cannot be read: {DISK}; 000002: shard i/2.tar cannot be read: "
        f"{DISK}. 1 {AGAIN}",
    ),
    "many shards that cannot be done": (
        lambda: extract(images(*[[]] * 7, [GOOD])),
        DataError,
        f"7 of 8 shards failed: 000000: shard i/0.tar is an empty file; ...; 000004: shard i/4.tar is an empty file; "
        f"and 2 more. 1 {AGAIN}",
    ),
    "no readable image": (
        lambda: extract(images([BAD])),
        DataError,
        f"i/0.tar has no readable image (1 skipped; the first: {SKIPPED})",
    ),
    "too many that are unreadable": (
        lambda: extract(images([BAD, GOOD])),
        DataError,
        f"1 of 2 images are unreadable, more than extract.max_bad_fraction 0.05 allows (0.tar: {SKIPPED}). "
        "t/bad_samples.jsonl lists them: repair the source, or raise the limit",
    ),
    "nothing to fit klt to": (
        lambda: extract(images([BAD]), codec="klt"),
        DataError,
        "i/0.tar has no readable image to fit codec klt to; repair the images, or use codec int8",
    ),
    "nothing in many to fit klt to": (
        lambda: extract(images([BAD], [BAD], [BAD]), codec="klt"),
        DataError,
        "i/0.tar and 2 more of 3 shards have no readable image to fit codec klt to; repair the images, or use codec "
        "int8",
    ),
    "other size": (
        lambda: changed(lambda shard: os.truncate(shard, shard.stat().st_size + 512)),
        MismatchError,
        f"1 {CHANGED.format('... bytes, ... when it was extracted', '000000')}",
    ),
    "other bytes": (
        lambda: changed(other_image, verify_sources=True),
        MismatchError,
        f"1 {CHANGED.format('another sha256 than when it was extracted', '000000')}",
    ),
    "no such shard to do again": (
        lambda: extract(images([GOOD], [GOOD]), redo=["000002"]),
        DataError,
        "there is no shard '000002' to do again; t has 000000 to 000001",
    ),
    # --- views of a store -------------------------------------------------------------------------------------------
    "images and views": (
        lambda: extract("i", views_from="a"),
        SettingError,
        "expected images or views_from, a store whose views are seen; found both",
    ),
    "neither images nor views": (
        lambda: extract(None),
        SettingError,
        "expected images or views_from, a store whose views are seen; found neither",
    ),
    "views of the store itself": (
        lambda: extract(None, views_from="./t"),
        SettingError,
        "t is the store that is read; name another folder for the new store",
    ),
    "views of no store": (
        lambda: extract(None, views_from="a"),
        MissingError,
        "a is not there; write targets with `milan-pipe extract-targets IMAGES a`",
    ),
    "views of an unfinished store": (
        lambda: seen(unfinished),
        DataError,
        "a has 1 of 2 shards; finish its extraction first with `milan-pipe extract-targets IMAGES a`",
    ),
    "views of a store with a lost record": (
        lambda: seen(lost_record),
        DataError,
        "a: 1 shards are not as they were written (000001: a/manifest/000001.json is not there); write "
        "them again with `milan-pipe extract-targets IMAGES a --redo 000001`",
    ),
    "other settings of views": (
        lambda: seen(views=ViewSettings(count=2, seed=1)),
        MismatchError,
        "a does not fit the settings: views.count: store has 1, the settings say 2; views.seed: store has 0, the "
        "settings say 1. Change the settings, or extract the targets that they describe",
    ),
    "other size and grid": (
        lambda: seen(student=StudentSettings(image_size=32)),
        MismatchError,
        "a does not fit the settings: views.size: store has 16, the settings say 32; teacher.grid: store has [2, 2], "
        "the settings say [4, 4]. Change the settings, or extract the targets that they describe",
    ),
    "stored view that is no JPEG": (
        lambda: seen(bad_view),
        DataError,
        "1 of 2 shards failed: 000000: a, shard 000000: view 0 of dir/k\u00e9y-0-0: JPEG cannot be decoded: .... "
        f"Write it again with `milan-pipe extract-targets IMAGES a --redo 000000`. 1 {AGAIN}",
    ),
    "other views than those that were seen": (
        seen_twice,
        MismatchError,
        "1 source shards have changed since their targets were made (a/000000: other views than when it was "
        "extracted). Extract them again with --redo 000000",
    ),
    # --- what the teacher gives ---------------------------------------------------------------------------------------
    "output that is no target": (
        lambda: extract(images([GOOD]), change=no_attention),
        DataError,
        "i/0.tar: view 0 of 0: the teacher gave attention that is zero for every patch; ...",
    ),
    "output that klt cannot be fitted to": (
        lambda: extract(images([GOOD]), codec="klt", change=no_attention),
        DataError,
        "i/0.tar: 0: the teacher gave attention that is zero for every patch; ...",
    ),
    "features that are not kept": (
        lambda: extract(images([GOOD]), change=scale(1e-9)),
        DataError,
        "i/0.tar: view 0 of 0: codec int8 keeps the teacher's features at a mean cosine of 0.000000, expected at least "
        "0.999; check the teacher's checkpoint, or use another codec",
    ),
    "features that do not fit": (
        lambda: extract(images([GOOD]), codec="float16", change=scale(1e8)),
        DataError,
        "i/0.tar: view 0 of 0: a feature of ... does not fit float16 (at most 65504); use codec int8",
    ),
    "full device": (
        lambda: extract(images([GOOD], [GOOD]), change=full, batch_size=48),
        DeviceFullError,
        "the device has too little memory for extract.batch_size 48 (CUDA out of memory); try extract.batch_size=24",
    ),
    "a fault of ours": (
        lambda: extract(images([GOOD]), change=failing),
        DataError,
        f"1 of 1 shards failed: 000000: ZeroDivisionError: a fault of ours. 0 {AGAIN}",
    ),
    # --- stores -----------------------------------------------------------------------------------------------------
    "store that cannot be written": (
        lambda: extract(images([GOOD]), on_progress=in_the_way),
        StoreError,
        f"t/manifest/... cannot be written: ... {NONE_WHOLE}",
    ),
    "full disk": (full_disk, StoreError, f"t: No space left on device. 1 of 1 {WHOLE}"),
    "full temporary folder": (
        full_temporary_folder,
        StoreError,
        "scratch cannot be written: No space left on device; shards that are far away are fetched there: set TMPDIR to "
        "a folder with room for some of them",
    ),
    "no store to verify": (
        lambda: verify_against_teacher("t", Params(), 1),
        MissingError,
        "t is not a target store; write one with `milan-pipe extract-targets IMAGES t`",
    ),
    # --- clusters -----------------------------------------------------------------------------------------------------
    "store that a worker does not see": (
        worker,
        DataError,
        "t is not a target store as seen from this worker; it must be a shared folder or bucket",
    ),
    "no scheduler": (
        lambda: no_scheduler("tcp://127.0.0.1:9"),
        StoreError,
        "no Dask scheduler answers at tcp://127.0.0.1:9 (...); start one with `dask scheduler` and name the address "
        "that it prints",
    ),
    "no address of a scheduler": (
        lambda: no_scheduler("nothing"),
        StoreError,
        "no Dask scheduler answers at nothing (...); start one with `dask scheduler` and name the address "
        "that it prints",
    ),
    "a protocol that is not set up": (
        lambda: no_scheduler("tls://127.0.0.1:9"),
        StoreError,
        "no Dask scheduler answers at tls://127.0.0.1:9 (...); start one with `dask scheduler` and name the address "
        "that it prints",
    ),
    "lost scheduler": (
        lambda: on_cluster(status="cancelled", scheduler="tcp://127.0.0.1:9"),
        StoreError,
        f"the scheduler tcp://127.0.0.1:9 was lost. {NONE_WHOLE}",
    ),
    "lost scheduler of this machine": (
        lambda: on_cluster(status="cancelled", workers=2),
        StoreError,
        f"the scheduler was lost. {NONE_WHOLE}",
    ),
    "workers that die": (
        lambda: on_cluster(error=KilledWorker("task", None, 3), workers=2),
        DataError,
        "the worker died 4 times over shard 000000 (i/0.tar); see the worker's own log",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
