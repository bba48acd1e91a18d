"""Embeddings of images, shard by shard: which are still to do, and what they came to."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from milan_pipe.config.extraction import parse_share
from milan_pipe.config.params import Params
from milan_pipe.config.teacher import portable_name
from milan_pipe.digests import sha256_of
from milan_pipe.embeddings.files import Rows, new_file, require_packages
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, SettingError, printable_json
from milan_pipe.evaluation.backbone import pooled
from milan_pipe.evaluation.features import embedded, numbered_samples, require_directions
from milan_pipe.evaluation.frozen import Subject, subject_of
from milan_pipe.images.bad import too_many_bad
from milan_pipe.images.labelled import is_class_folder, labelled_images
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import OnBad, Sample, read_shard
from milan_pipe.storage import Location, location_of, require_writable
from milan_pipe.storage.kinds import EMBEDDINGS, require_new
from milan_pipe.storage.local import lies_in
from milan_pipe.units import some

RECORD, RECORDS, BAD_SAMPLES = "embeddings.json", "records", "bad_samples.jsonl"
_VERSION = 1
_IMAGES_OF_FOLDERS = 4096
_PARALLEL_READS = 16
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class EmbedProgress:
    """Shards that are whole, and images and skipped ones of this run."""

    shards_done: int
    shards: int
    images: int
    bad: int


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What an embedding came to.

    Attributes:
        shards, images, bad: of OUT, earlier runs included.
        complete: whether all shards are whole.
        skipped: shards that earlier runs have done.
        width: of an embedding; `patches` is their grid, where they were wanted.
        seconds, images_per_second: of this run.
    """

    subject: str
    shards: int
    complete: bool
    skipped: int
    images: int
    bad: int
    width: int
    patches: tuple[int, int] | None
    seconds: float
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Images of one file of OUT; `state` changes with their names, labels and bytes, `written` with their files."""

    source: str
    state: str
    files: Sequence[Path]
    samples: Callable[[OnBad], Iterator[Sample]]

    def written(self) -> str | None:
        """A digest of sizes and times of the files; None for those of a bucket."""
        found = [path.stat() for path in self.files if path.is_file()]
        times = [f"{one.st_size} {one.st_mtime_ns}" for one in found]
        return sha256_of("\n".join(times).encode()) if self.files else None


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What `records/000123.json` says: it is written after the file, and makes it whole.

    Records of earlier versions say neither how the images' files were nor how many bytes the file of embeddings has.
    """

    source: str
    state: str
    written: str | None = None
    bytes: int | None = None
    images: Annotated[int, Field(ge=0, lt=2**63)]
    bad: list[tuple[str, str]] = field(default_factory=list)


def _pieces(images: str | Path) -> dict[str, _Piece]:
    if is_class_folder(images):
        listed: list[tuple[str, str]] = []
        found = labelled_images(images, lambda key, reason: listed.append((key, reason)))

        def of(numbers: range) -> _Piece:
            def samples(on_bad: OnBad) -> Iterator[Sample]:
                for key, reason in listed if numbers.start == 0 else ():
                    on_bad(key, reason)
                yield from numbered_samples(found, numbers, on_bad)

            names = "\n".join(f"{found.keys[n]} {found.label_N[n]}" for n in numbers)
            source = f"images {numbers.start} to {numbers.stop - 1}"
            files = [found.files[number] for number in numbers]
            return _Piece(source=source, state=sha256_of(names.encode()), files=files, samples=samples)

        starts = range(0, len(found), _IMAGES_OF_FOLDERS)
        pieces = [of(range(start, min(start + _IMAGES_OF_FOLDERS, len(found)))) for start in starts]
    else:
        pieces = [
            _Piece(
                source=shard.name,
                state=f"{shard.size()} bytes",
                files=[] if shard.location.local is None else [shard.location.local / shard.name],
                samples=partial(read_shard, shard),
            )
            for shard in expand_shards(images)
        ]
    return {f"{number:06d}": piece for number, piece in enumerate(pieces)}


def embed(
    checkpoint: str | Path,
    images: str | Path,
    out: str | Path,
    params: Params,
    *,
    patches: bool = False,
    shards: str | None = None,
    on_progress: Callable[[EmbedProgress], None] = lambda _: None,
) -> EmbedReport:
    """Write embeddings of all images to OUT/000000.parquet or OUT/000000.zarr, one for each shard.

    Columns or arrays are key, label (-1 where an image has none), embedding (D), and patches (L, D) where wanted. It
    goes on where an earlier run stopped; the same command gives the same bytes. A class folder counts as shards of
    4,096 images.

    Args:
        checkpoint: see `subject_of`.
        images: shards as `expand_shards` takes them, or a folder with one subfolder per class.
        out: folder, local or a URL.
        patches: write the patches too.
        shards: `i/n`: do only every n-th shard, beginning with number i.

    Raises:
        MissingError, DataError, SettingError: as `subject_of`; images are missing, too many of them are unreadable, or
            shards cannot be read: all others are whole.
        MismatchError: OUT has embeddings of another model, other images or settings.
        StoreError: OUT cannot be written.
    """
    began, settings = time.monotonic(), params.embed
    share, count = parse_share(shards) if shards is not None else (0, 1)
    location = location_of(out)
    require_writable(location)
    require_new(location.local, EMBEDDINGS)
    if location.local is not None and is_class_folder(images) and lies_in(Path(images), location.local):
        raise SettingError(f"{location} lies in {images}, whose folders are classes; name another folder")
    if (suffix := Path(location.name).suffix) in (".parquet", ".zarr"):
        raise SettingError(f"{location} has the name of a file, and a folder of files is written: leave {suffix!r} out")
    require_packages(settings.format)
    pieces = _pieces(images)
    subject = subject_of(checkpoint, params)
    subject.layout.require(settings.pool, "embed.pool", subject.name)
    _require_same(location, _record_of(subject, pieces, params, patches=patches))
    run = _Run(location, pieces, subject, params, patches, on_progress)
    todo = [name for name in pieces if name not in run.done and int(name) % count == share]
    skipped = len(run.done)
    run.report()
    run.require_few_bad()
    failed: dict[str, MilanError] = {}
    try:
        for name in todo:
            try:
                run.do(name)
            except _SourceError as error:
                failed[name] = error.reason
            else:
                run.require_few_bad()
    finally:
        if count > 1:
            run.done |= _read_done(location, pieces, settings.format)
        run.write_bad()
    if failed:
        first = "; ".join(f"{name}: {error}" for name, error in list(failed.items())[:_MOST_NAMED])
        raise DataError(
            f"{len(failed)} of {len(pieces)} shards failed: {first}. {len(run.done)} are whole; repair these and run "
            "the same command again"
        )
    complete = len(run.done) == len(pieces)
    if complete:
        # What was left by processes that were killed.
        for folder in (location, location.child(RECORDS)):
            folder.clear_scratch()
    seconds = time.monotonic() - began
    return EmbedReport(
        subject=subject.name,
        shards=len(run.done),
        complete=complete,
        skipped=skipped,
        images=sum(done.images for done in run.done.values()),
        bad=sum(len(done.bad) for done in run.done.values()),
        width=subject.layout.width,
        patches=subject.layout.grid if patches else None,
        seconds=seconds,
        images_per_second=run.images / seconds,
    )


class _SourceError(Exception):
    """A shard cannot be read; others may be."""

    def __init__(self, reason: MilanError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Run:
    """What is done so far."""

    def __init__(
        self,
        location: Location,
        pieces: Mapping[str, _Piece],
        subject: Subject,
        params: Params,
        patches: bool,
        on_progress: Callable[[EmbedProgress], None],
    ) -> None:
        self._location, self._pieces, self._subject = location, pieces, subject
        self._settings, self._limits = params.embed, params.images
        self._patches, self._on_progress = patches, on_progress
        self.done = _read_done(location, pieces, params.embed.format)
        self.images = self.bad = 0

    def report(self) -> None:
        self._on_progress(
            EmbedProgress(shards_done=len(self.done), shards=len(self._pieces), images=self.images, bad=self.bad)
        )

    def do(self, name: str) -> None:
        """Write the file of a shard, and then its record."""
        piece, bad, images = self._pieces[name], [], 0
        written = piece.written()
        file = f"{name}.{self._settings.format}"
        location, layout, settings = self._location, self._subject.layout, self._settings
        location.clear_scratch(file)

        def skip(key: str, reason: str) -> None:
            bad.append((key, reason))
            self.bad += 1

        def features(pixels_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
            tokens_BSD = self._subject.tokens(pixels_BHWC)
            pooled_BD = pooled(tokens_BSD, settings.pool, layout).float()
            return pooled_BD.cpu(), layout.patches(tokens_BSD).float().cpu() if self._patches else None

        def samples() -> Iterator[Sample]:
            try:
                yield from piece.samples(skip)
            except (DataError, MissingError) as error:
                raise _SourceError(error) from error

        with new_file(location, file, settings.format) as writer:
            for batch in embedded(samples(), features, self._subject.size, settings, self._limits, skip):
                embedding_BD, patches_BLD = batch.value
                require_directions(embedding_BD)
                rows = Rows(
                    keys=batch.keys,
                    label_B=np.array(batch.labels, np.int64),
                    embedding_BD=self._as_written(embedding_BD),
                    patches_BLD=None if patches_BLD is None else self._as_written(patches_BLD),
                )
                writer.append(rows)
                images += len(rows)
                self.images += len(rows)
                self.report()
            if not images:
                first = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
                none = f"{piece.source} has no readable image ({len(bad)} skipped{first})"
                raise _SourceError(DataError(none))
        # Threads may report bad images out of turn.
        done = _Done(
            source=piece.source,
            state=piece.state,
            written=written,
            bytes=_bytes_of(location, file),
            images=images,
            bad=sorted(bad),
        )
        location.write(f"{RECORDS}/{name}.json", _json(asdict(done)))
        self.done[name] = done
        self.report()

    def _as_written(self, values: Tensor) -> Any:
        written = values.to(getattr(torch, self._settings.dtype))
        if not written.isfinite().all():
            raise SettingError(f"features are too large for {self._settings.dtype}; set embed.dtype=float32")
        return written.numpy()

    def require_few_bad(self) -> None:
        """Over all shards that are whole, earlier runs included."""
        bad = sum(len(done.bad) for done in self.done.values())
        seen = bad + sum(done.images for done in self.done.values())
        limit = self._settings.max_bad_fraction
        if too_many_bad(bad, seen, len(self.done), len(self._pieces), limit):
            raise DataError(
                f"{bad} of {seen} images are unreadable, more than embed.max_bad_fraction {limit:g} allows. "
                f"{self._location}/{BAD_SAMPLES} lists them: repair the source, or raise the limit"
            )

    def write_bad(self) -> None:
        """List all skipped images of the shards that are whole."""
        lines = [
            printable_json({"shard": name, "source": done.source, "key": key, "reason": reason}) + "\n"
            for name, done in sorted(self.done.items())
            for key, reason in done.bad
        ]
        self._location.write(BAD_SAMPLES, "".join(lines).encode())


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"


def _record_of(subject: Subject, pieces: Mapping[str, _Piece], params: Params, *, patches: bool) -> dict[str, Any]:
    names = "".join(f"{piece.source}\n" for piece in pieces.values())
    layout = subject.layout
    return {
        "version": _VERSION,
        # Embeddings are passed on: no folders of this machine.
        "subject": portable_name(subject.name) if ":" in subject.name else Path(subject.name).name,
        "identity": sha256_of(subject.identity.encode()),
        "image_size": subject.size,
        "width": layout.width,
        "patches": list(layout.grid) if patches else None,
        "structure": sha256_of(subject.structure.encode()),
        **params.embed.model_dump(mode="json", include={"pool", "crop", "dtype", "format"}),
        "shards": len(pieces),
        "sources": sha256_of(names.encode()),
    }


def _shown(value: Any) -> str:
    """A value for messages; of a digest the beginning tells it from others."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "none" if value is None else repr(value)


def _require_same(location: Location, record: dict[str, Any]) -> None:
    """Write OUT/embeddings.json, or refuse an OUT of other embeddings."""
    if location.write(RECORD, _json(record), replace=False):
        return
    try:
        found = json.loads(location.read(RECORD))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}/{RECORD} is damaged ({error}); remove the folder, or name another one") from error
    # The name says who it was, the digest whether it is the same.
    differences = [
        f"{name}: there {_shown(found.get(name))}, asked for {_shown(record.get(name))}"
        # Records of earlier versions do not say how the model is built.
        for name in sorted((record.keys() | found.keys()) - {"subject"} - ({"structure"} - found.keys()))
        if found.get(name) != record.get(name)
    ]
    if differences:
        who = f" of {found.get('subject')!r}" if found.get("identity") != record["identity"] else ""
        raise MismatchError(
            f"{location} holds other embeddings{who}: {'; '.join(differences)}. "
            "Use the same model, images and settings to "
            "go on, or name another folder"
        )


def _read_done(location: Location, pieces: Mapping[str, _Piece], format: str) -> dict[str, _Done]:
    """Shards that are whole."""
    listing = location.listing()
    present = {*listing.files, *listing.folders}
    recorded = {Path(name).stem for name in location.child(RECORDS).sizes()}
    names = [name for name in pieces if f"{name}.{format}" in present and name in recorded]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = dict(zip(names, pool.map(lambda name: _read_one(location, name, pieces[name]), names), strict=True))
        files = [f"{name}.{format}" for name in names]
        lengths = dict(zip(names, pool.map(lambda file: _bytes_of(location, file, listing.files), files), strict=True))
    changed = {name for name, done in found.items() if done.written not in (None, pieces[name].written())}
    changed |= {name for name, done in found.items() if done.bytes not in (None, lengths[name])}
    if changed:
        warnings.warn(
            f"{location}: {len(changed)} shards are embedded again, as their images' files or their own have changed: "
            f"{some(sorted(changed), _MOST_NAMED)}",
            RuntimeWarning,
            stacklevel=4,
        )
    return {name: done for name, done in found.items() if name not in changed}


def _bytes_of(location: Location, file: str, listed: Mapping[str, int] | None = None) -> int:
    """Of a file, which may have been listed with its bytes, or of all files of a folder."""
    if file.endswith(".zarr"):
        return sum(location.child(file).sizes().values())
    return location.size(file) if listed is None else listed[file]


def _read_one(location: Location, name: str, piece: _Piece) -> _Done:
    path = f"{RECORDS}/{name}.json"
    try:
        done = TypeAdapter(_Done).validate_json(location.read(path), strict=True)
    except ValueError as error:
        raise DataError(f"{location}/{path} is damaged; remove it, and its shard is embedded again") from error
    if (done.source, done.state) != (piece.source, piece.state):
        raise MismatchError(
            f"{piece.source} has changed since it was embedded: {done.state} then, {piece.state} now; remove "
            f"{location}/{path} to embed it again"
        )
    return done
