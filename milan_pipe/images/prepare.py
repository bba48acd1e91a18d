"""Pack images of any source into webdataset shards that are the same bytes each time.

Jobs of `samples_per_shard` images run in a process pool and write tars with temporary names. This process gives them
their final names in job order, and writes `index.json` last. A marker file is in the folder meanwhile, so that after a
kill the same command knows its own files and starts over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from loky import ProcessPoolExecutor

from milan_pipe.config.images import IMAGE_LIMITS, ImageSettings, PrepareSettings
from milan_pipe.digests import sha256_of_file
from milan_pipe.errors import DataError, MilanError, MissingError, StoreError, printable_json
from milan_pipe.images.ahead import thread_count
from milan_pipe.images.files import IMAGE_SUFFIXES, printable_name
from milan_pipe.images.index import PREPARE_MARKER, ImageIndex, ShardRecord, begin_index, write_index
from milan_pipe.images.source import Bad, Job, Source
from milan_pipe.images.source_demo import DEMO, demo_source
from milan_pipe.images.source_folder import folder_source, image_files
from milan_pipe.images.source_table import LIST_SUFFIXES, find_tables, table_source
from milan_pipe.spawning import end_with
from milan_pipe.storage import is_url, local_folder
from milan_pipe.storage.kinds import IMAGES, mistaken
from milan_pipe.storage.local import beside, flush, real_path

BAD_SAMPLES_NAME = "bad_samples.jsonl"

_EXPECTED = f"a folder of images, parquet files, a list of images (.csv, .tsv) or the word {DEMO!r}"


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote: shards, images in them, and their size.

    Attributes:
        bad: images that were skipped; `bad_samples.jsonl` has key, file and reason of each.
        classes: class names, labels are indices into them; None where there are none.
    """

    shards: int
    samples: int
    bytes: int
    bad: int
    classes: tuple[str, ...] | None


_Packed = tuple[ShardRecord | None, list[Bad]]
"""A finished tar under its temporary name; None where no image could be read."""


def prepare(
    source: str | Path,
    images: str | Path,
    settings: PrepareSettings,
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    limits: ImageSettings = IMAGE_LIMITS,
    workers: int | None = None,
) -> PrepareReport:
    """Write the images of `source` as shards, `index.json` and, if any are bad, `bad_samples.jsonl` into `images`.

    A folder is read with all its subfolders, without hidden files. If it holds nothing but `SPLIT_FOLDERS`, each is a
    split. Within a split the first subfolder is the class; an image outside of one has label -1. Classes are sorted,
    over all splits together. Images are decoded once, as a check, and stored with their bytes unchanged. Keys are the
    path in the source, with "-" for "/" and "_" for dots and unprintable characters; of two that are equal, the later
    one gets a part of its path's hash.

    Parquet files have the bytes of an image in each row, as the hub's datasets do, or name it, as lists do: by a path,
    relative to the list's folder, or by a URL, which is fetched. Labels are whole numbers, or names, which are sorted;
    captions become `.txt` members. Keys are the file's name and the number of the row in it.

    The same source and settings give the same bytes, with any number of workers.

    Args:
        source: the word "demo"; a folder of images or of parquet files; a parquet, CSV or TSV file, or a glob. Parquet
            files and lists may be URLs.
        images: the folder to write; made where it does not exist. What an earlier run on the same source wrote in it is
            replaced.
        progress: called with (samples done, all samples) after each shard.
        limits: an image above them is skipped.
        workers: processes, by default one per usable core.

    Raises:
        MissingError: the source is not there.
        DataError: the source is another file, empty, holds no image that can be read, or mixes splits with other
            folders; or a table has no column of images or a label that is none.
        MismatchError: `images` holds shards that were not prepared from this source.
        StoreError: `images` cannot be written, or an object store cannot be read.
        SettingError: `images` is a URL, or a column that the settings name is not there.
    """
    images = local_folder(images, "shards")
    found = _source(source, images, settings, limits)
    try:
        begin_index(images, found.described)
        shards, bad = _pack_all(images, found.jobs, progress, workers)
        if shards:
            index = ImageIndex(source=found.described, classes=found.classes, shards=tuple(shards))
            write_index(images, index.model_copy(update={"mask_classes": found.mask_classes}))
        (images / PREPARE_MARKER).unlink()
        flush(images)
    except MilanError:
        raise
    except OSError as error:
        raise StoreError(
            f"{error.filename or images} cannot be written: {error.strerror or error}; run the same command again "
            "when that is repaired"
        ) from error
    if not shards:
        with (images / BAD_SAMPLES_NAME).open(encoding="utf-8") as listed:
            first = json.loads(next(listed))
        reason = f"the first is {first['file']}: {first['reason']}"
        raise DataError(f"none of the {bad} images in {source} can be read; {reason}")
    return PrepareReport(
        shards=len(shards),
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        bad=bad,
        classes=found.classes,
    )


# --- sources ------------------------------------------------------------------------------------------------------


def _source(source: str | Path, images: Path, settings: PrepareSettings, limits: ImageSettings) -> Source:
    if source == DEMO:
        return demo_source(settings)
    root = Path(source)
    if not is_url(source) and root.is_dir():
        if images.exists() and real_path(images) == real_path(root):
            raise DataError(f"source and images are the same folder, {root}; choose another one to write shards into")
        if found := image_files(root):
            return folder_source(root, found, settings, limits)
    if tables := find_tables(source):
        return table_source(source, tables, settings, limits)
    raise _no_source(source)


def _no_source(source: str | Path) -> MilanError:
    root = Path(source)
    if is_url(source):
        return DataError(
            f"source {source} is a URL, expected a local folder of images, or parquet files, "
            "which may lie anywhere; copy the images to a disk. Shards in a bucket are used as images without `prepare`"
        )
    if root.is_dir():
        return DataError(mistaken(root, IMAGES) or _what_else(root))
    if root.exists():
        what = "name the folder it lies in"
        if root.suffix == ".tar":
            what = "it is a shard already, use it as images without `prepare`"
        elif root.suffix[1:].lower() not in IMAGE_SUFFIXES:
            what = "a list of images has a header, and ends in .csv or .tsv"
        return DataError(f"source {root} is a file, expected {_EXPECTED}; {what}")
    near = isinstance(source, str) and get_close_matches(source.lower(), [DEMO], n=1, cutoff=0.6)
    hint = f"did you mean {DEMO!r}?" if near else f"give {_EXPECTED}"
    return MissingError(f"source {str(source)!r} is not there; {hint}")


def _what_else(root: Path) -> str:
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    if not names:
        return f"source {root} is empty; expected images ({', '.join(IMAGE_SUFFIXES)}), in class folders or right there"
    if any(name.endswith(".tar") for name in names):
        return f"source {root} holds .tar shards and no images; use it as images without `prepare`"
    lists = [name for name in names if name.endswith(LIST_SUFFIXES)]
    hint = f"; is {printable_name(lists[0])} the list of images? Name it as the source" if lists else ""
    return (
        f"source {root} holds no images; found {len(names)} other files, as {printable_name(names[0])}; "
        f"expected {', '.join(IMAGE_SUFFIXES)}{hint}"
    )


# --- packing ------------------------------------------------------------------------------------------------------


def _pack_all(
    images: Path, jobs: Sequence[Job], progress: Callable[[int, int], None], workers: int | None
) -> tuple[list[ShardRecord], int]:
    """Run all jobs, and list what they skip: the shards, and how many images were skipped.

    Names are given in job order, so that a job without a readable image leaves no gap.
    """
    total, done = sum(len(job.part) for job in jobs), 0
    paths = [beside(images / f"{number:06d}.tar") for number in range(len(jobs))]
    shards: list[ShardRecord] = []
    bad = 0
    counts: Counter[str] = Counter()
    listed = images / BAD_SAMPLES_NAME
    listed.unlink(missing_ok=True)
    with listed.open("x", encoding="utf-8", newline="\n") as lines:
        for job, path, (record, skipped) in zip(jobs, paths, _packed(jobs, paths, workers), strict=True):
            bad += len(skipped)
            lines.writelines(printable_json(row) + "\n" for row in skipped)
            if record is not None:
                name = f"{job.split}-{counts[job.split]:06d}.tar"
                counts[job.split] += 1
                path.replace(images / name)
                shards.append(record.model_copy(update={"name": name}))
            done += len(job.part)
            progress(done, total)
    if bad:
        flush(listed)
    else:
        listed.unlink()
    return shards, bad


def _packed(jobs: Sequence[Job], paths: list[Path], workers: int | None) -> Iterator[_Packed]:
    workers = min(len(jobs), thread_count(workers or 0))
    if workers <= 1:
        yield from map(_pack, jobs, paths)
        return
    # Not forked: the caller may have threads of torch running, which a fork would copy in any state. Nor spawned by the
    # standard library, which runs the caller's script again in each process.
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        # Not by `map`, which cancels what is left when it is left early: the pool, killed, then stumbles over that.
        futures = deque(pool.submit(_pack, job, path) for job, path in zip(jobs, paths, strict=True))
        while futures:
            # Not kept: it holds what was skipped.
            yield futures.popleft().result()
    except BrokenProcessPool:
        reason = "a process that packs shards was killed, perhaps for memory; run the same command again"
        raise StoreError(reason) from None
    finally:
        pool.shutdown(kill_workers=True)


def _begin_worker(parent: int) -> None:
    end_with(parent)
    # Ctrl-C reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # webdataset imports torch where it can, which takes seconds; writing tars does without.
    sys.modules["torch"] = None  # type: ignore[assignment]


def _pack(job: Job, path: Path) -> _Packed:
    """Write one tar, unless no image can be read. Runs in a worker process."""
    # Imported here as it loads torch.
    from webdataset.writer import TarWriter

    bad: list[Bad] = []
    samples = 0
    # The same bytes on every machine: neither time nor owner.
    with path.open("wb") as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for key, parts in job.part.members(bad):
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
