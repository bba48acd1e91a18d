"""Records and manifest of a store: what was committed, with a digest of every file.

The record `manifest/000123.json` is written after all files of shard 000123 and commits it. The manifest,
`manifest.json`, is written when all shards are committed and lists them. Each record carries the name of its shard and
its own digest, so that neither a damaged record nor that of another shard is accepted.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, TypeVar

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from milan_pipe.digests import sha256_of, verified, with_digest
from milan_pipe.errors import DataError, MissingError, first_problem, printable_json
from milan_pipe.storage import Location
from milan_pipe.targets.schema import FileRecord, ShardName, ShardRecord, SourceShard, StoreHeader, shard_path

FOLDER, MANIFEST, BAD_SAMPLES = "manifest", "manifest.json", "bad_samples.jsonl"
_PARALLEL_READS = 16


def _file_of(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def to_file(values: Mapping[str, Any]) -> bytes:
    """Values with their digest, as a file."""
    return _file_of(with_digest(values))


def _from_file(data: bytes) -> dict[str, Any] | None:
    """Values of a file that is to the byte as `to_file` wrote it, else None."""
    try:
        found = json.loads(data)
        values = verified(found)
        return values if values is not None and _file_of(found) == data else None
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """A committed shard in `manifest.json`: samples kept and skipped, bytes of its files, digest of its record.

    `views_sha256` is that of the record.
    """

    samples: PositiveInt
    bad: NonNegativeInt
    bytes: NonNegativeInt
    record_sha256: str
    views_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: digests of header and `bad_samples.jsonl`, and all shards by name."""

    header_sha256: str
    bad_samples_sha256: str
    shards: Mapping[ShardName, ManifestEntry]


_RECORD, _MANIFEST = TypeAdapter(ShardRecord), TypeAdapter(Manifest)
T = TypeVar("T")


def _checked(kind: TypeAdapter[T], values: Any, where: str) -> T:
    # The digest fits, so whoever made it did not use this package, and no command repairs it.
    try:
        return kind.validate_python(values)
    except ValidationError as error:
        raise DataError(
            f"{where} was not written by milan-pipe: {first_problem(error)}; use a store that you trust"
        ) from None


@dataclass(frozen=True, kw_only=True)
class CommittedShard:
    """A committed shard without the digests of its files, which are nearly all of a record."""

    source: SourceShard
    entry: ManifestEntry


def write_record(location: Location, name: str, record: ShardRecord) -> None:
    """Commit a shard."""
    location.write(_path(name), to_file({"shard": name, **_values_of(record)}))


def _values_of(record: ShardRecord | ManifestEntry) -> dict[str, Any]:
    """Its values, without those that are not known."""
    return {name: value for name, value in asdict(record).items() if value is not None}


def read_record(location: Location, name: str, expected: ManifestEntry | None = None) -> ShardRecord:
    """The record of a committed shard.

    Args:
        expected: its entry in `manifest.json`, where that exists.

    Raises:
        MissingError: the shard is not committed.
        DataError: the record is damaged, or another one.
    """
    return _record_of(location, name, location.read(_path(name)), expected)[0]


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _record_of(location: Location, name: str, data: bytes, expected: ManifestEntry | None) -> tuple[ShardRecord, str]:
    """A record and the digest of its file."""
    values, digest = _from_file(data), sha256_of(data)
    if values is None:
        what = "is damaged: its content does not fit its digest"
    elif values.get("shard") != name:
        what = f"is the record of shard {values.get('shard')!r}"
    elif expected is not None and digest != expected.record_sha256:
        what = f"does not fit its digest in {MANIFEST}"
    else:
        record = _checked(_RECORD, values, f"{location}/{_path(name)}")
        if record.blocks.keys() <= record.files.keys() and all(
            offset <= record.files[path].bytes for path, blocks in record.blocks.items() for offset, _ in blocks
        ):
            return record, digest
        what = "has blocks outside of the files that it names"
    raise DataError(f"{location}/{_path(name)} {what}; write the shard again with `{redo_command(location, name)}`")


def redo_command(location: Location, name: str) -> str:
    """What a user runs to have one shard written again, or several with commas between their names."""
    return f"{extract_command(location)} --redo {shlex.quote(name)}"


def extract_command(location: Location) -> str:
    """What a user runs to have the store finished."""
    return f"milan-pipe extract-targets IMAGES {shlex.quote(str(location)) if location.writable else 'TARGETS'}"


def committed_names(location: Location) -> tuple[str, ...]:
    """Names of all committed shards, in order."""
    found = (re.fullmatch(r"([0-9]{6,9})\.json", path) for path in location.child(FOLDER).sizes())
    return tuple(sorted(match[1] for match in found if match is not None))


def read_committed(
    location: Location, *, sizes_of: StoreHeader | None = None, expected: Mapping[str, ManifestEntry] | None = None
) -> tuple[dict[str, CommittedShard], dict[str, str]]:
    """All committed shards, read side by side, and what is wrong with those that cannot be.

    A store of a billion images has gigabytes of records: what is kept of each does not grow with its files.

    Args:
        sizes_of: also check that all files of a shard exist in full length, in a store with this header.
        expected: the shards of a manifest, where it is known: their records must be those that it names.

    Returns:
        Shards that are whole, and a reason for each that is not, by name.
    """
    parsing = Lock()

    def read(name: str) -> CommittedShard | str:
        try:
            data = location.read(_path(name))
            # Fetching alone gains by threads: those that parse fight for the interpreter, and take twice as long.
            with parsing:
                record, digest = _record_of(location, name, data, None if expected is None else expected[name])
            wrong = None if sizes_of is None else wrong_size(location.child(shard_path(sizes_of, name)), record)
        except (MissingError, DataError) as error:
            return str(error)
        if wrong is not None:
            return wrong
        source, size = record.source, sum(file.bytes for file in record.files.values())
        entry = ManifestEntry(
            samples=source.samples,
            bad=len(source.bad),
            bytes=size,
            record_sha256=digest,
            views_sha256=record.views_sha256,
        )
        return CommittedShard(source=source, entry=entry)

    names = committed_names(location) if expected is None else tuple(expected)
    whole: dict[str, CommittedShard] = {}
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        for name, found in zip(names, pool.map(read, names), strict=True):
            if isinstance(found, str):
                broken[name] = found
            else:
                whole[name] = found
    return whole, broken


def wrong_size(folder: Location, record: ShardRecord) -> str | None:
    """The first file of a shard's folder that does not exist in full length, and what was found; None where all do.

    zarr reads a missing chunk, or an empty file, as zeros.
    """
    # Far away one listing is cheaper than a question for each file.
    sizes = folder.sizes(record.files) if folder.local is None else folder.present(record.files)
    wrong = ((path, wrong_bytes(sizes.get(path), file)) for path, file in record.files.items())
    return next((f"{path} {what}" for path, what in wrong if what is not None), None)


def wrong_bytes(found: int | None, file: FileRecord) -> str | None:
    """What is wrong with a file of `found` bytes, which is None where it does not exist; None where nothing is."""
    if found is None:
        return "is missing"
    return None if found == file.bytes else f"has {found} bytes, {file.bytes} were written"


def write_bad_samples(location: Location, committed: Mapping[str, CommittedShard]) -> bytes:
    """Write `bad_samples.jsonl`, one line for each sample skipped; returns its content."""
    lines = [
        printable_json({"shard": name, "source": c.source.name, "key": key, "reason": reason}) + "\n"
        for name, c in sorted(committed.items())
        for key, reason in c.source.bad
    ]
    data = "".join(lines).encode()
    _write_new(location, BAD_SAMPLES, data)
    return data


def write_manifest(location: Location, header: bytes, committed: Mapping[str, CommittedShard]) -> None:
    """Write `bad_samples.jsonl` and, after it, `manifest.json`; files that are the same already stay."""
    bad = write_bad_samples(location, committed)
    shards = {name: _values_of(shard.entry) for name, shard in sorted(committed.items())}
    manifest = {"header_sha256": sha256_of(header), "bad_samples_sha256": sha256_of(bad), "shards": shards}
    _write_new(location, MANIFEST, to_file(manifest))


def _write_new(location: Location, name: str, data: bytes) -> None:
    # A store that is finished may lie where nothing can be written.
    try:
        same = location.read(name) == data
    except MissingError:
        same = False
    if not same:
        location.write(name, data)


def read_manifest(location: Location) -> Manifest | None:
    """`manifest.json`, or None where extraction has not come to its end.

    Raises:
        DataError: it is damaged, or not of this package's making.
    """
    try:
        data = location.read(MANIFEST)
    except MissingError:
        return None
    values = _from_file(data)
    if values is None:
        raise DataError(
            f"{location}/{MANIFEST} is damaged; remove it and run the same `milan-pipe extract-targets` again, which "
            "writes a new one"
        )
    return _checked(_MANIFEST, values, f"{location}/{MANIFEST}")
