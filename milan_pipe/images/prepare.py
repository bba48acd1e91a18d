"""Pack images, or the demo's scenes, into webdataset shards that are the same bytes each time.

Jobs of `samples_per_shard` images run in a process pool and write tars with temporary names. This process gives them
their final names in job order, and writes `index.json` last. A marker file is in the folder meanwhile, so that after a
kill the same command knows its own files and starts over.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from loky import ProcessPoolExecutor
from numpy.typing import NDArray
from PIL import Image

from milan_pipe.config.images import TEST_SCENE_OFFSET, PrepareSettings
from milan_pipe.digests import sha256_of_file
from milan_pipe.errors import DataError, MilanError, MissingError, StoreError
from milan_pipe.images.ahead import thread_count
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.files import IMAGE_SUFFIXES, MASK_SUFFIX, OTHER_IMAGE_SUFFIXES, files_under, read_file
from milan_pipe.images.index import PREPARE_MARKER, ImageIndex, ShardRecord, begin_index, write_index
from milan_pipe.images.scenes import MASK_CLASSES, THINGS, render_scene
from milan_pipe.storage import is_url, local_folder
from milan_pipe.storage.local import beside, flush

DEMO = "demo"
"""The source whose images are rendered."""

SPLIT_FOLDERS = ("train", "val", "test")
"""Names of subfolders that are splits."""

BAD_SAMPLES_NAME = "bad_samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote: shards, images in them, and their size.

    Attributes:
        bad: (path relative to the source, reason) of each image that was skipped.
        classes: class names, labels are indices into them; None where there are none.
    """

    shards: int
    samples: int
    bytes: int
    bad: list[tuple[str, str]]
    classes: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Image:
    """A file to pack. `name` is its path relative to the source, in printable characters."""

    path: Path
    name: str
    key: str
    label: int


_Items = range | tuple[_Image, ...]
"""Numbers of scenes, or images."""

_Bad = dict[str, str]
"""Key, file and reason of an image that was skipped."""

_Packed = tuple[ShardRecord | None, list[_Bad]]
"""A finished tar under its temporary name; None where no image could be read."""


@dataclass(frozen=True)
class _Job:
    """What goes into one tar."""

    split: str
    items: _Items
    seed: int


_Plan = tuple[list[_Job], ImageIndex]
"""Jobs, and the index of their shards, which is without shards yet."""


def prepare(
    source: str | Path,
    images: str | Path,
    settings: PrepareSettings,
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    workers: int | None = None,
) -> PrepareReport:
    """Write the images of `source` as shards, `index.json` and, if any are bad, `bad_samples.jsonl` into `images`.

    A folder is read with all its subfolders, without hidden files. If it holds nothing but `SPLIT_FOLDERS`, each is a
    split. Within a split the first subfolder is the class; an image outside of one has label -1. Classes are sorted,
    over all splits together. Images are decoded once, as a check, and stored with their bytes unchanged. Keys are the
    path in the source, with "-" for "/" and "_" for dots and unprintable characters; of two that are equal, the later
    one gets a part of its path's hash.

    The same source and settings give the same bytes, with any number of workers.

    Args:
        source: the word "demo", or a folder of images.
        images: the folder to write; made where it does not exist. What an earlier run on the same source wrote in it is
            replaced.
        progress: called with (samples done, all samples) after each shard.
        workers: processes, by default one per usable core.

    Raises:
        MissingError: the source is not there.
        DataError: the source is a file, empty, holds no image that can be read, or mixes splits with other folders.
        MismatchError: `images` holds shards that were not prepared from this source.
        StoreError: `images` cannot be written.
        SettingError: `images` is a URL.
    """
    images = local_folder(images, "shards")
    jobs, index = _plan_demo(settings) if source == DEMO else _plan_folder(source, images, settings)
    try:
        begin_index(images, index.source)
        (images / BAD_SAMPLES_NAME).unlink(missing_ok=True)
        shards, bad = _pack_all(images, jobs, progress, workers)
        if bad:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
            (images / BAD_SAMPLES_NAME).write_text(lines, encoding="utf-8", newline="\n")
        if shards:
            write_index(images, index.model_copy(update={"shards": tuple(shards)}))
        (images / PREPARE_MARKER).unlink()
    except MilanError:
        raise
    except OSError as error:
        raise StoreError(
            f"{error.filename or images} cannot be written: {error.strerror or error}; run the same command again "
            "when that is repaired"
        ) from error
    if not shards:
        first = f"{bad[0]['file']}: {bad[0]['reason']}"
        raise DataError(f"none of the {len(bad)} images in {source} can be read; the first is {first}")
    return PrepareReport(
        shards=len(shards),
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        bad=[(row["file"], row["reason"]) for row in bad],
        classes=index.classes,
    )


# --- planning -----------------------------------------------------------------------------------------------------


def _plan_demo(settings: PrepareSettings) -> _Plan:
    jobs = [
        *_cut("train", range(settings.train_scenes), settings),
        *_cut("test", range(TEST_SCENE_OFFSET, TEST_SCENE_OFFSET + settings.test_scenes), settings),
    ]
    source = {"kind": DEMO, "seed": settings.seed}
    return jobs, ImageIndex(source=source, classes=THINGS, mask_classes=MASK_CLASSES, shards=())


def _cut(split: str, items: _Items, settings: PrepareSettings) -> list[_Job]:
    step = settings.samples_per_shard
    return [_Job(split, items[start : start + step], settings.seed) for start in range(0, len(items), step)]


def _plan_folder(source: str | Path, images: Path, settings: PrepareSettings) -> _Plan:
    root = Path(source)
    _check_source(source, images)
    files = [path.relative_to(root).parts for path in files_under(root, IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES)]
    if not files:
        raise DataError(_what_else(root))
    splits = _split_folders(root, files)
    depth = 1 if splits else 0
    classes = sorted({file[depth] for file in files if len(file) > depth + 1})
    labels = {name: label for label, name in enumerate(classes)}
    members: dict[str, list[_Image]] = {split: [] for split in splits or [settings.split]}
    keys: set[str] = set()
    for file in files:
        image = _Image(
            path=root.joinpath(*file),
            name=_printable("/".join(file)),
            key=_free_key(file, keys),
            label=labels[file[depth]] if len(file) > depth + 1 else -1,
        )
        members[file[0] if splits else settings.split].append(image)
        keys.add(image.key)
    described = {"kind": "folder", "path": _printable(root.as_posix())}
    names = tuple(map(_printable, classes)) or None
    return (
        [job for split, inner in members.items() for job in _cut(split, tuple(inner), settings)],
        ImageIndex(source=described, classes=names, shards=()),
    )


def _check_source(source: str | Path, images: Path) -> None:
    root = Path(source)
    if is_url(source):
        raise DataError(
            f"source {source} is a URL, expected a local folder of images; copy the images to a disk. Shards in a "
            "bucket are used as images without `prepare`"
        )
    if not root.exists():
        near = isinstance(source, str) and get_close_matches(source.lower(), [DEMO], n=1, cutoff=0.6)
        hint = f"did you mean {DEMO!r}?" if near else f"give a folder of images, or the word {DEMO!r}"
        raise MissingError(f"source {str(source)!r} is not there; {hint}")
    if not root.is_dir():
        packed = root.suffix == ".tar"
        what = "it is a shard already, use it as images without `prepare`" if packed else "name the folder it lies in"
        raise DataError(f"source {root} is a file, expected a folder of images or the word {DEMO!r}; {what}")
    if images.exists() and images.resolve() == root.resolve():
        raise DataError(f"source and images are the same folder, {root}; choose another one to write shards into")


def _what_else(root: Path) -> str:
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    if not names:
        return f"source {root} is empty; expected images ({', '.join(IMAGE_SUFFIXES)}), in class folders or right there"
    if any(name.endswith(".tar") for name in names):
        return f"source {root} holds .tar shards and no images; use it as images without `prepare`"
    return (
        f"source {root} holds no images; found {len(names)} other files, as {_printable(names[0])}; "
        f"expected {', '.join(IMAGE_SUFFIXES)}"
    )


def _split_folders(root: Path, files: list[tuple[str, ...]]) -> list[str]:
    """The splits that a source is divided into, if it is."""
    tops = {file[0] if len(file) > 1 else "" for file in files}
    present = [name for name in SPLIT_FOLDERS if name in tops]
    others = sorted(tops - set(present))
    if not others:
        return present
    # One such name among others is a class, as "train" among vehicles. Two are splits with something beside them.
    if len(present) > 1:
        beside = _printable(others[0]) or "images"
        raise DataError(
            f"source {root} holds the splits {', '.join(present)} beside {beside}; expected only split folders or only "
            "class folders: move the rest elsewhere"
        )
    return []


def _free_key(file: tuple[str, ...], used: set[str]) -> str:
    stem = "/".join((*file[:-1], Path(file[-1]).stem))
    # A dot would end the key; what does not print may not pass through JSON, logs or other file systems.
    key = re.sub(r"[./\\]", lambda found: "_" if found[0] == "." else "-", stem)
    key = "".join(letter if letter.isprintable() else "_" for letter in key)
    path = "/".join(file)
    digest = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
    for free in (key, *(f"{key}-{digest[:length]}" for length in (8, 16, 24, 32))):
        if free not in used:
            return free
    raise DataError(f"no free key for {_printable(path)}; rename the file")


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- packing ------------------------------------------------------------------------------------------------------


def _pack_all(
    images: Path, jobs: Sequence[_Job], progress: Callable[[int, int], None], workers: int | None
) -> tuple[list[ShardRecord], list[_Bad]]:
    """Run all jobs; names are given in job order, so that a job without a readable image leaves no gap."""
    total, done = sum(len(job.items) for job in jobs), 0
    paths = [beside(images / f"{number:06d}.tar") for number in range(len(jobs))]
    shards: list[ShardRecord] = []
    bad: list[_Bad] = []
    counts: Counter[str] = Counter()
    for job, path, (record, skipped) in zip(jobs, paths, _packed(jobs, paths, workers), strict=True):
        bad += skipped
        if record is not None:
            name = f"{job.split}-{counts[job.split]:06d}.tar"
            counts[job.split] += 1
            path.replace(images / name)
            shards.append(record.model_copy(update={"name": name}))
        done += len(job.items)
        progress(done, total)
    return shards, bad


def _packed(jobs: Sequence[_Job], paths: list[Path], workers: int | None) -> Iterator[_Packed]:
    workers = min(len(jobs), thread_count(workers or 0))
    if workers <= 1:
        yield from map(_pack, jobs, paths)
        return
    # Not forked: the caller may have threads of torch running, which a fork would copy in any state. Nor spawned by the
    # standard library, which runs the caller's script again in each process.
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker)
    try:
        # Not by `map`, which cancels what is left when it is left early: the pool, killed, then stumbles over that.
        for future in [pool.submit(_pack, job, path) for job, path in zip(jobs, paths, strict=True)]:
            yield future.result()
    except BrokenProcessPool:
        reason = "a process that packs shards was killed, perhaps for memory; run the same command again"
        raise StoreError(reason) from None
    finally:
        pool.shutdown(kill_workers=True)


def _begin_worker() -> None:
    # Ctrl-C reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # webdataset imports torch where it can, which takes seconds; writing tars does without.
    sys.modules["torch"] = None  # type: ignore[assignment]


def _pack(job: _Job, path: Path) -> _Packed:
    """Write one tar, unless no image can be read. Runs in a worker process."""
    # Imported here as it loads torch.
    from webdataset.writer import TarWriter

    bad: list[_Bad] = []
    samples = 0
    # The same bytes on every machine: neither time nor owner.
    with path.open("wb") as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for key, parts in _members(job, bad):
            samples += 1
            for suffix, data in parts.items():
                # One at a time: TarWriter sorts the members of a sample, and the image comes first.
                tar.write({"__key__": key, suffix: data})
    flush(path)
    if not samples:
        path.unlink()
        return None, bad
    size, digest = path.stat().st_size, sha256_of_file(path)
    return ShardRecord(name=path.name, split=job.split, samples=samples, bytes=size, sha256=digest), bad


def _members(job: _Job, bad: list[_Bad]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by suffix of each sample; what cannot be read goes into `bad`."""
    for item in job.items:
        if isinstance(item, int):
            scene = render_scene(job.seed, item)
            parts = {
                "png": _png(scene.image),
                "cls": str(scene.label).encode(),
                "txt": "\n".join(scene.captions).encode(),
            }
            yield f"scene-{item:010d}", {**parts, MASK_SUFFIX: _png(scene.segmentation)}
            continue
        suffix = item.path.suffix[1:].lower()
        try:
            if suffix in OTHER_IMAGE_SUFFIXES:
                raise DataError(f"images of type .{suffix} are not read; convert to {', '.join(IMAGE_SUFFIXES)}")
            data = read_file(item.path)
            decode_pixels(data)
        except DataError as error:
            bad.append({"key": item.key, "file": item.name, "reason": str(error)})
        else:
            yield item.key, {suffix: data} | ({"cls": str(item.label).encode()} if item.label >= 0 else {})


def _png(values: NDArray[np.uint8]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    return png.getvalue()
