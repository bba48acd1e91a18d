"""Pack images, or the demo's scenes, into webdataset shards that are the same bytes each time.

Work is cut into jobs of `samples_per_shard` images that run in a process pool. A job writes its tar beside its
place; this process gives the tars their final names in job order, and writes `index.json` last. A marker file stands
in the folder meanwhile, so that after a kill the same command knows its own leftovers and starts over.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from loky import ProcessPoolExecutor
from numpy.typing import NDArray
from PIL import Image

from milan_pipe.config.images import TEST_SCENE_OFFSET, PrepareSettings
from milan_pipe.digests import sha256_of_file
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, StoreError
from milan_pipe.images.decode import decode_image
from milan_pipe.images.files import IMAGE_SUFFIXES, MASK_SUFFIX, OTHER_IMAGE_SUFFIXES, read_file
from milan_pipe.images.index import INDEX_NAME, PREPARE_MARKER, ImageIndex, ShardRecord, read_index, write_index
from milan_pipe.images.scenes import MASK_CLASSES, SHAPES, render_scene
from milan_pipe.storage import is_url, local_folder, location_of
from milan_pipe.storage.local import beside, flush

DEMO = "demo"
"""The source that is rendered and not read."""


SPLIT_FOLDERS = ("train", "val", "test")
"""Names of subfolders that are splits."""

BAD_SAMPLES_NAME = "bad_samples.jsonl"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6}\.tar")


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        shards: number of shards written.
        samples: number of images in them.
        bytes: their size together.
        bad: (file name relative to the source, reason) of each image that was skipped.
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


@dataclass(frozen=True, kw_only=True)
class _Scenes:
    """Demo scenes `start` to `stop` - 1."""

    seed: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What goes into one tar."""

    split: str
    content: _Scenes | tuple[_Image, ...]

    @property
    def size(self) -> int:
        return self.content.stop - self.content.start if isinstance(self.content, _Scenes) else len(self.content)


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """A finished tar under its temporary name; `samples` may be 0, then there is no file."""

    samples: int
    bytes: int
    sha256: str
    bad: list[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    jobs: list[_Job]
    classes: tuple[str, ...] | None
    source: Mapping[str, Any]


def prepare(
    source: str | Path,
    images: str | Path,
    config: PrepareSettings,
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int | None = None,
) -> PrepareReport:
    """Write the images of `source` as shards, `index.json` and, if any are bad, `bad_samples.jsonl` into `images`.

    A folder is read with all its subfolders; hidden files are passed over. If it holds nothing but `SPLIT_FOLDERS`,
    each is a split. Within a split the first subfolder is the class, and an image that lies in none has label -1.
    Classes are sorted, over all splits together. Images are decoded once to see that they are whole and stored with
    their bytes unchanged. Keys are the path in the source, with "-" for "/" and "_" for dots and unprintable
    characters; where two meet, the later one gets a part of its path's hash.

    The same source and settings give the same bytes, with any number of workers.

    Args:
        source: the word "demo", or a folder of images.
        images: the folder to write; made if it is not there. What an earlier run on the same source wrote in it is
            replaced.
        progress: called with (samples done, samples in all) after each shard.
        workers: processes, by default one per usable core.

    Raises:
        MissingError: the source is not there.
        DataError: the source is a file, empty, holds no image that can be read, or mixes splits with other folders.
        MismatchError: `images` holds shards that were not prepared from this source.
        StoreError: `images` cannot be written.
        SettingError: `images` is a URL.
    """
    images = local_folder(images, "shards")
    plan = _plan_demo(config) if source == DEMO else _plan_folder(source, images, config)
    try:
        _claim(images, plan.source)
        shards, bad = _pack_all(images, plan, progress, workers)
        _write_bad(images, bad)
        if shards:
            write_index(
                images,
                ImageIndex(
                    shards=tuple(shards),
                    classes=plan.classes,
                    source=plan.source,
                    mask_classes=MASK_CLASSES if source == DEMO else None,
                ),
            )
        (images / PREPARE_MARKER).unlink()
    except MilanError:
        raise
    except OSError as error:
        raise StoreError(
            f"{error.filename or images} cannot be written: {error.strerror or error}; run the same command again "
            "when that is repaired"
        ) from error
    if not shards:
        _, name, reason = bad[0]
        raise DataError(f"none of the {len(bad)} images in {source} can be read; the first is {name}: {reason}")
    return PrepareReport(
        shards=len(shards),
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        bad=[(name, reason) for _, name, reason in bad],
        classes=plan.classes,
    )


# --- planning -----------------------------------------------------------------------------------------------------


def _plan_demo(config: PrepareSettings) -> _Plan:
    jobs = []
    for split, first, count in (("train", 0, config.train_scenes), ("test", TEST_SCENE_OFFSET, config.test_scenes)):
        for start in range(first, first + count, config.samples_per_shard):
            stop = min(start + config.samples_per_shard, first + count)
            jobs.append(_Job(split=split, content=_Scenes(seed=config.seed, start=start, stop=stop)))
    return _Plan(jobs=jobs, classes=SHAPES, source={"kind": DEMO, "seed": config.seed})


def _plan_folder(source: str | Path, images: Path, config: PrepareSettings) -> _Plan:
    root = Path(source)
    _check_source(source, root, images)
    files = _images_under(root)
    if not files:
        raise DataError(_what_else(root))
    splits = _splits(root, files, config.split)
    named = {parts[0] for _, inner in splits for _, parts in inner if len(parts) > 1}
    classes = tuple(sorted(named)) or None
    numbers = {name: number for number, name in enumerate(classes or ())}
    taken: set[str] = set()
    jobs = []
    for split, inner in splits:
        members = [
            _Image(
                path=root.joinpath(*file),
                name=_printable("/".join(file)),
                key=_free_key(file, taken),
                label=numbers[parts[0]] if len(parts) > 1 else -1,
            )
            for file, parts in inner
        ]
        starts = range(0, len(members), config.samples_per_shard)
        contents = (tuple(members[start : start + config.samples_per_shard]) for start in starts)
        jobs += [_Job(split=split, content=content) for content in contents]
    described = None if classes is None else tuple(_printable(name) for name in classes)
    return _Plan(jobs=jobs, classes=described, source={"kind": "folder", "path": _printable(root.as_posix())})


def _check_source(source: str | Path, root: Path, images: Path) -> None:
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


def _images_under(root: Path) -> list[tuple[str, ...]]:
    """Paths, as parts relative to `root`, of all files with an image's suffix, sorted; links to folders followed."""
    found: list[tuple[str, ...]] = []
    entered: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(folder)
        # A link that leads back up would never end.
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        if real in entered:
            continue
        entered.add(real)
        parts = Path(folder).relative_to(root).parts
        for name in names:
            suffix = Path(name).suffix[1:].lower()
            if not name.startswith(".") and (suffix in IMAGE_SUFFIXES or suffix in OTHER_IMAGE_SUFFIXES):
                found.append((*parts, name))
    return sorted(found)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error


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


_Placed = list[tuple[tuple[str, ...], tuple[str, ...]]]


def _splits(root: Path, files: list[tuple[str, ...]], default: str) -> list[tuple[str, _Placed]]:
    """Splits in order, each with (path relative to the source, path relative to the split) of its files."""
    tops = {file[0] if len(file) > 1 else "" for file in files}
    present = [name for name in SPLIT_FOLDERS if name in tops]
    others = sorted(tops - set(present))
    if present and not others:
        return [(name, [(file, file[1:]) for file in files if file[0] == name]) for name in present]
    # One such name among others is a class, as "train" among vehicles. Two are splits with something beside them.
    if len(present) > 1:
        beside = _printable(others[0]) or "images"
        raise DataError(
            f"source {root} holds the splits {', '.join(present)} beside {beside}; expected only split folders or only "
            "class folders: move the rest elsewhere"
        )
    return [(default, [(file, file) for file in files])]


def _free_key(file: tuple[str, ...], taken: set[str]) -> str:
    path = "/".join(file)
    stem = "/".join((*file[:-1], Path(file[-1]).stem))
    # A dot would end the key; what does not print may not pass through JSON, logs or other file systems.
    key = re.sub(r"[./\\]", lambda found: "_" if found[0] == "." else "-", stem)
    key = "".join(letter if letter.isprintable() else "_" for letter in key)
    digest = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
    free, length = key, 8
    while free in taken:
        free, length = f"{key}-{digest[:length]}", length + 8
        if length > 48:
            raise DataError(f"no free key for {_printable(path)}; rename the file")
    taken.add(free)
    return free


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- the target folder --------------------------------------------------------------------------------------------


def _claim(images: Path, source: Mapping[str, Any]) -> None:
    """Make the folder ready: refuse foreign shards, put up the marker, clear away what an earlier run wrote."""
    if images.exists() and not images.is_dir():
        raise StoreError(f"{images} is a file; expected a folder to write shards into")
    images.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in images.iterdir() if path.suffix == ".tar"}
    marker = images / PREPARE_MARKER
    described = json.dumps(dict(source), sort_keys=True) + "\n"
    own: set[str] = set()
    earlier: Mapping[str, Any] | None = None
    if (images / INDEX_NAME).exists():
        index = read_index(images)
        own, earlier = {shard.name for shard in index.shards}, index.source
    if marker.exists():
        # An earlier run was killed: every shard of our naming is its work, or of the index that it was replacing.
        own |= {name for name in present if _SHARD_NAME.fullmatch(name)}
        earlier = earlier or _described(marker)
    foreign = sorted(present - own)
    if foreign:
        raise MismatchError(
            f"{images} holds {len(foreign)} shards that `prepare` did not write there, as {foreign[0]}; choose an "
            "empty folder, or move them away"
        )
    if own and earlier is not None and not _same_place(earlier, source):
        raise MismatchError(
            f"{images} holds shards of {_place(earlier)}, asked for {_place(source)}; choose another folder, or delete "
            "this one"
        )
    marker.write_text(described, encoding="utf-8")
    (images / INDEX_NAME).unlink(missing_ok=True)
    (images / BAD_SAMPLES_NAME).unlink(missing_ok=True)
    for name in own & present:
        (images / name).unlink()
    location_of(images).clear_scratch()


def _described(marker: Path) -> Mapping[str, Any] | None:
    try:
        plain = json.loads(marker.read_bytes())
    except ValueError:
        return None
    return plain if isinstance(plain, dict) else None


def _same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.get("kind") != other.get("kind"):
        return False
    return Path(str(one.get("path", ""))).resolve() == Path(str(other.get("path", ""))).resolve()


def _place(source: Mapping[str, Any]) -> str:
    return str(source.get("path", source.get("kind")))


def _write_bad(images: Path, bad: Sequence[tuple[str, str, str]]) -> None:
    if bad:
        lines = [
            json.dumps({"key": key, "file": name, "reason": reason}, ensure_ascii=False) for key, name, reason in bad
        ]
        (images / BAD_SAMPLES_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


# --- packing ------------------------------------------------------------------------------------------------------


def _pack_all(
    images: Path, plan: _Plan, progress: Callable[[int, int], None] | None, workers: int | None
) -> tuple[list[ShardRecord], list[tuple[str, str, str]]]:
    """Run all jobs; final names are given in job order, so that a job without a readable image leaves no gap."""
    total, done = sum(job.size for job in plan.jobs), 0
    paths = [beside(images / f"{number:06d}.tar") for number in range(len(plan.jobs))]
    shards: list[ShardRecord] = []
    bad: list[tuple[str, str, str]] = []
    counts: dict[str, int] = {}
    for job, path, packed in zip(plan.jobs, paths, _packed(plan.jobs, paths, workers), strict=True):
        bad += packed.bad
        if packed.samples:
            number = counts.get(job.split, 0)
            counts[job.split] = number + 1
            name = f"{job.split}-{number:06d}.tar"
            path.replace(images / name)
            shards.append(
                ShardRecord(
                    name=name, split=job.split, samples=packed.samples, bytes=packed.bytes, sha256=packed.sha256
                )
            )
        done += job.size
        if progress is not None:
            progress(done, total)
    return shards, bad


def _packed(jobs: list[_Job], paths: list[Path], workers: int | None) -> Iterator[_Packed]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), workers or usable)
    if workers <= 1:
        yield from map(_pack, jobs, paths)
        return
    # Not forked: the caller may have threads of torch running, which a fork would copy in any state. Nor spawned by the
    # standard library, which runs the caller's script again in each process.
    pool = ProcessPoolExecutor(workers)
    try:
        # Not by `map`, which cancels what is left when it is left early: the pool, killed, then stumbles over that.
        for future in [pool.submit(_pack, job, path) for job, path in zip(jobs, paths, strict=True)]:
            yield future.result()
    except BrokenProcessPool:
        raise StoreError(
            "a process that packs shards was killed, perhaps for memory; run the same command again"
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _pack(job: _Job, path: Path) -> _Packed:
    """Write one tar. Runs in a worker process."""
    bad: list[tuple[str, str, str]] = []
    skip = partial(_skip, bad)
    members = _scene_members(job.content) if isinstance(job.content, _Scenes) else _image_members(job.content, skip)
    samples = 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for key, parts in members:
            samples += 1
            for suffix, data in parts.items():
                # A bare header: time, owner and mode are the defaults 0, 0 and 0o644 on every machine.
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    flush(path)
    if not samples:
        path.unlink()
        return _Packed(samples=0, bytes=0, sha256="", bad=bad)
    return _Packed(samples=samples, bytes=path.stat().st_size, sha256=sha256_of_file(path), bad=bad)


def _skip(bad: list[tuple[str, str, str]], image: _Image, reason: str) -> None:
    bad.append((image.key, image.name, reason))


def _scene_members(scenes: _Scenes) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(scenes.start, scenes.stop):
        scene = render_scene(scenes.seed, number)
        parts = {
            "png": _png(scene.image),
            "cls": str(scene.label).encode(),
            "txt": scene.caption.encode(),
            MASK_SUFFIX: _png(scene.segmentation),
        }
        yield f"scene-{number:010d}", parts


def _png(values: NDArray[np.uint8]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    return png.getvalue()


def _image_members(
    images: Sequence[_Image], skip: Callable[[_Image, str], None]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for image in images:
        suffix = image.path.suffix[1:].lower()
        if suffix in OTHER_IMAGE_SUFFIXES:
            skip(image, f"images of type .{suffix} are not read; convert to {', '.join(IMAGE_SUFFIXES)}")
            continue
        try:
            data = read_file(image.path)
            decode_image(data)
        except DataError as error:
            skip(image, str(error))
        else:
            yield image.key, {suffix: data} | ({"cls": str(image.label).encode()} if image.label >= 0 else {})
