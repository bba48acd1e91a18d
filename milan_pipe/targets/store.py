"""A target store as a whole: its header, its manifest, and the backend that its header names."""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from milan_pipe.digests import sha256_of, sha256_of_file, verified, with_digest
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, StoreError, system_reason
from milan_pipe.storage import Location, location_of, require_writable
from milan_pipe.storage.kinds import TARGETS, mistaken
from milan_pipe.targets import manifest, tar_store, zarr_store
from milan_pipe.targets.manifest import CommittedShard, ManifestEntry
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    READABLE_VERSIONS,
    SHARDS,
    FileRecord,
    OpenShard,
    ShardFiles,
    ShardRecord,
    SourceShard,
    StoreHeader,
    TargetBlock,
    ViewDigest,
    ViewRun,
    require_same_header,
    shard_path,
)
from milan_pipe.units import some

_HEADER = "milan_pipe"
HEADER_FILES = (f"{SHARDS}/zarr.json", "header.json", "zarr.json")
"""Of format zarr, of format webdataset, and of format zarr in schema 2."""
# Blocks are read in random order over the shards: with one open shard, nearly every block would open one anew.
_OPEN_SHARDS = 32
_MOST_NAMED = 10


def header_name(header: StoreHeader) -> str:
    """Name of the file that makes a folder a store."""
    return shard_path(header, zarr_store.GROUP_FILE) if header.format == "zarr" else tar_store.HEADER_FILE


def header_file(header: StoreHeader) -> tuple[str, bytes]:
    """Name and content of the file that makes a folder a store."""
    return header_name(header), _header_content(with_digest(header.model_dump(mode="json")))


def header_sha256(header: StoreHeader) -> str:
    """Digest of the file that makes a folder a store."""
    return sha256_of(header_file(header)[1])


def _header_content(values: Mapping[str, Any]) -> bytes:
    content: dict[str, Any] = {_HEADER: values}
    if values.get("format", "zarr") == "zarr":
        content = {"zarr_format": 3, "node_type": "group", "attributes": content}
    return json.dumps(content, indent=2).encode() + b"\n"


def is_as_written(data: bytes) -> bool:
    """Whether a header's file has the very bytes that its values are written as; an older one has fewer values."""
    content = json.loads(data)
    return data == _header_content(content.get("attributes", content)[_HEADER])


def read_header(location: Location) -> StoreHeader | None:
    """The header of a store, or None where there is no store.

    Raises:
        DataError: the header is damaged, or the file is not one.
        MismatchError: another schema version.
    """
    return _header_and_digest(location)[0]


def _header_and_digest(location: Location) -> tuple[StoreHeader | None, str]:
    for name in HEADER_FILES:
        try:
            data = location.read(name)
        except MissingError:
            continue
        try:
            content = json.loads(data)
            found = content.get("attributes", content)[_HEADER]
            version = found.get("schema_version")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise DataError(
                f"{location}/{name} is not the header of a target store; extract into another folder"
            ) from None
        # The version goes first: the digest may change with it.
        if version not in READABLE_VERSIONS:
            raise MismatchError(
                f"{location} has schema version {version}, this version of milan-pipe reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}; extract the targets again, or use the version that "
                f"wrote them ({found.get('package_version')})"
            )
        values = verified(found)
        if values is None:
            raise DataError(
                f"{location}/{name} is damaged: its content does not fit its digest. Remove it and run the same "
                "`milan-pipe extract-targets` again: where all shards had been committed, it writes the header anew"
            )
        header: StoreHeader = StoreHeader.parse(values, f"{location}/{name}")
        if header_name(header) != name:
            raise DataError(
                f"{location}/{name} is the header of a store of schema {version} in format {header.format}, which lies "
                "elsewhere; use a store as it was written"
            )
        return header, sha256_of(data)
    return None, ""


class StoreShardWriter:
    """One shard in the making, in a scratch folder.

    Of several processes that make one shard at once, the last to begin removes the scratch of the others, which then
    fail and leave what is committed alone. Libraries recreate a folder that was removed while they wrote, so only the
    very folder that was begun is committed.
    """

    def __init__(self, location: Location, name: str, header: StoreHeader) -> None:
        self._location = location
        self._name = name
        self._header = header
        self._scratch = location.scratch(name)
        self._begun = -1
        self._samples = 0
        self._views = ViewDigest()
        make = zarr_store.ZarrShardFiles if header.format == "zarr" else tar_store.TarShardFiles
        try:
            with self._errors():
                # Held open: the number of a folder that was removed may be given to the one that takes its place.
                self._begun = os.open(self._scratch, os.O_RDONLY)
                self._files: ShardFiles = make(self._scratch, header)
        except BaseException:
            # Who gets no writer has nothing to discard it with.
            self.discard()
            raise

    def _require_own(self, cause: Exception | None = None) -> None:
        try:
            own = os.path.samestat(self._scratch.stat(), os.fstat(self._begun))
        except OSError:
            own = False
        if not own:
            raise StoreError(
                f"{self._location}/{self._name}: {self._scratch} was removed while it was written, by another process "
                "that does the same shard or has finished the store; run one extraction, or share the shards out with "
                "--shards"
            ) from cause

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        # A folder that goes while it is written shows as KeyError, RuntimeError and more, by what was to be done next.
        except Exception as error:
            self._require_own(error)
            if isinstance(error, OSError) and not isinstance(error, MilanError):
                raise StoreError(f"{self._scratch} cannot be written: {system_reason(error)}") from error
            raise

    def append(self, block: TargetBlock) -> None:
        """Write the next samples; StoreError where they cannot be written, or do not follow a whole block."""
        count = len(block.keys)
        if self._samples % BLOCK_SAMPLES or not 0 < count <= BLOCK_SAMPLES:
            raise StoreError(
                f"{self._location}/{self._name}: a block of {count} samples cannot follow {self._samples} samples"
            )
        with self._errors():
            self._files.append(block)
        self._require_own()
        self._views.add(block)
        self._samples += count

    def commit(self, source: SourceShard, mean_cosine: float | None = None) -> None:
        """Make the shard visible: all its files, and after them its record; for `mean_cosine` see `ShardRecord`.

        Raises:
            StoreError: it cannot be written, or does not have the samples that `source` names.
        """
        count = self._samples
        if not count or source.samples != count:
            raise StoreError(f"{self._location}/{self._name}: {count} samples written, {source.samples} announced")
        with self._errors():
            blocks = self._files.close()
            files = {
                path.relative_to(self._scratch).as_posix(): FileRecord(
                    bytes=path.stat().st_size, sha256=sha256_of_file(path)
                )
                for path in sorted(self._scratch.rglob("*"))
                if path.is_file()
            }
            self._require_own()
            self._location.publish(self._scratch, shard_path(self._header, self._name))
        views = self._views.value()
        record = ShardRecord(source=source, files=files, blocks=blocks, mean_cosine=mean_cosine, views_sha256=views)
        manifest.write_record(self._location, self._name, record)
        self._close()

    def discard(self) -> None:
        """Remove what was written; what another process makes of the same shard stays."""
        # One write that fails ends the call, while others beside it go on and would make the folder anew.
        zarr_store.wait_for_writes()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        if self._begun >= 0:
            os.close(self._begun)
            self._begun = -1


class TargetStoreWriter:
    """A store that shards are added to; an existing one is opened if its configuration is the same."""

    def __init__(self, where: str | Path, header: StoreHeader) -> None:
        """Open or begin a store.

        Raises:
            MismatchError: the existing store has another configuration.
            DataError: the folder holds something else.
            StoreError: the folder cannot be written.
        """
        self.location = location_of(where)
        require_writable(self.location)
        self.header = header
        name, content = header_file(header)
        found = read_header(self.location)
        if found is None:
            # Nothing may be here but a store without its header, which was this one.
            present = self.location.sizes()
            previous = manifest.read_manifest(self.location) if present else None
            if present and (previous is None or previous.header_sha256 != sha256_of(content)):
                raise DataError(
                    f"{self.location} is not a target store and not empty (it holds {min(present)}); name another "
                    "folder"
                )
            if not self.location.write(name, content, replace=False):
                # Another process of the same job was first.
                found = read_header(self.location)
        if found is not None:
            require_same_header(found, header, self.location)
            # Its package version stays, and with it its bytes.
            self.header = found

    def committed(self, *, sizes: bool = False) -> dict[str, CommittedShard]:
        """The shards that are committed, by name. One whose record is damaged is left out, with a warning.

        Args:
            sizes: also leave out those whose files do not all exist in full length.
        """
        found, broken = manifest.read_committed(self.location, sizes_of=self.header if sizes else None)
        if broken:
            first = min(broken)
            warnings.warn(
                f"{self.location}: {len(broken)} shards are not as they were written and are done again: "
                f"{some(sorted(broken), _MOST_NAMED)} (the first: {broken[first]})",
                RuntimeWarning,
                stacklevel=3,
            )
        return found

    def open_shard(self, name: str) -> StoreShardWriter:
        """Begin a shard; what an interrupted attempt left is removed."""
        self.location.clear_scratch(name)
        self.location.child(manifest.FOLDER).clear_scratch(f"{name}.json")
        return StoreShardWriter(self.location, name, self.header)

    def forget(self, name: str) -> None:
        """Take a shard back, so that it is done again."""
        self.location.remove(manifest.MANIFEST)
        self.location.remove(f"{manifest.FOLDER}/{name}.json")
        self.location.remove(shard_path(self.header, name))

    def finish(self) -> None:
        """Write `bad_samples.jsonl` and `manifest.json`; call it when all shards are committed."""
        committed, count = self.committed(), self.header.source.shards
        if len(committed) != count:
            raise StoreError(
                f"{self.location}: {len(committed)} of {count} shards are whole; run the same command again"
            )
        try:
            manifest.write_manifest(self.location, self.location.read(header_name(self.header)), committed)
        except StoreError as error:
            raise StoreError(f"{error}. All shards are whole; the same command goes on from there") from error
        for folder in ("", manifest.FOLDER, SHARDS):
            self.location.child(folder).clear_scratch()


class TargetStore:
    """A store that is read, by any number of threads; see `open_targets`."""

    def __init__(self, location: Location, header: StoreHeader, shards: Mapping[str, ManifestEntry]) -> None:
        self.location = location
        self.header = header
        self.shards = tuple(shards)
        self._entries = dict(shards)
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._opening = threading.Lock()

    def samples(self, shard: str) -> int:
        """Number of samples of a shard; LookupError where there is none."""
        return self._entries[shard].samples

    def views_sha256(self, shard: str) -> str | None:
        """The digest of a shard's views and keys; None where its store was written before there was one."""
        return self._entries[shard].views_sha256

    def record(self, shard: str) -> ShardRecord:
        """What was committed of a shard.

        Raises:
            LookupError: no such shard.
            DataError: its record is damaged, missing, or not the one that the store was opened with.
        """
        expected = self._entries[shard]
        try:
            return manifest.read_record(self.location, shard, expected)
        except MissingError as error:
            raise damaged(self.location, shard, str(error)) from error

    def committed(self, *, sizes: bool = False) -> dict[str, CommittedShard]:
        """What was committed of all shards, by name; their records are read side by side.

        Args:
            sizes: also look at the sizes of all files.

        Raises:
            DataError: a record is damaged, missing, or not the one that the store was opened with, or a size is wrong.
        """
        expected = self.header if sizes else None
        found, broken = manifest.read_committed(self.location, sizes_of=expected, expected=self._entries)
        if broken:
            raise _broken(self.location, broken)
        return found

    def _shard(self, name: str) -> OpenShard:
        with self._opening:
            if name not in self._open:
                self._open[name] = open_shard(self.location, name, self.header, self.record(name))
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return self._open[name]

    def keys(self, shard: str) -> Sequence[str]:
        """Keys of a shard's samples, in order; of a tar, its first view is read for them. Raises as `record` does."""
        with self._reading(shard):
            return self._shard(shard).keys()

    @contextmanager
    def _reading(self, shard: str) -> Iterator[None]:
        try:
            yield
        except MissingError as error:
            raise damaged(self.location, shard, str(error)) from error
        # A header that nobody checked may speak of features wider than memory.
        except MemoryError as error:
            raise StoreError(f"{self.location}, shard {shard} cannot be read: {system_reason(error)}") from error

    def read(
        self, shard: str, view: int, start: int, stop: int, *, with_views: bool = True, with_features: bool = True
    ) -> ViewRun:
        """Samples `start` to `stop` of one view of a shard; what is not wanted is as `OpenShard.read` says.

        Raises:
            DataError: the shard is damaged; names it and the array.
            IndexError: no such shard, view or samples.
        """
        count = self._entries[shard].samples if shard in self._entries else 0
        if not (0 <= view < self.header.views.count and 0 <= start < stop <= count):
            raise IndexError(
                f"{self.location}: samples {start}:{stop} of view {view} of shard {shard!r} were asked for; "
                f"it has {count} samples, {self.header.views.count} views"
            )
        with self._reading(shard):
            return self._shard(shard).read(view, start, stop, with_views=with_views, with_features=with_features)


def damaged(location: Location, shard: str, what: str) -> DataError:
    """The error for a shard that cannot be read as it was written."""
    return DataError(
        f"{location}, shard {shard}: {what}. Write it again with `{manifest.redo_command(location, shard)}`"
    )


def open_shard(location: Location, name: str, header: StoreHeader, record: ShardRecord) -> OpenShard:
    """Open one shard for reading, after a check that all its files exist in full length.

    Raises:
        DataError: files are missing, cut, too long, or their metadata is damaged.
    """
    fail = partial(damaged, location, name)
    folder = location.child(shard_path(header, name))
    if wrong := manifest.wrong_size(folder, record):
        raise fail(wrong)
    backend = zarr_store.ZarrShard if header.format == "zarr" else tar_store.TarShard
    return backend(folder, header, record, fail)


def _broken(location: Location, broken: Mapping[str, str]) -> DataError:
    first = min(broken)
    return DataError(
        f"{location}: {len(broken)} shards are not as they were written ({first}: {broken[first]}); write them "
        f"again with `{manifest.redo_command(location, ','.join(sorted(broken)))}`"
    )


def open_targets(where: str | Path, *, complete: bool = False) -> TargetStore:
    """Open a store for reading.

    Args:
        complete: refuse one that has not all its shards yet.

    Raises:
        MissingError: no such folder.
        DataError: not a store, no shard committed, not complete, or damaged.
        MismatchError: another schema version.
        StoreError: it cannot be reached.
    """
    location = location_of(where)
    header, digest = _header_and_digest(location)
    if header is None:
        advice = f"write targets with `{manifest.extract_command(location)}`"
        if location.local is None or not location.local.is_dir():
            raise MissingError(f"{location} is not there; {advice}")
        names = f"neither {HEADER_FILES[0]} nor {HEADER_FILES[1]}"
        unknown = f"{location} is not a target store: it has {names}; {advice}"
        raise DataError(mistaken(location.local, TARGETS) or unknown)
    found = manifest.read_manifest(location)
    if found is not None:
        if digest != found.header_sha256:
            raise DataError(
                f"{location}: the header does not fit its digest in {manifest.MANIFEST}: one is of another store; "
                "bring back the true one, or extract the targets again into another folder"
            )
        return TargetStore(location, header, dict(sorted(found.shards.items())))
    committed, broken = manifest.read_committed(location)
    if broken:
        raise _broken(location, broken)
    if not committed:
        raise DataError(f"{location} has no committed shard; run extract-targets again to finish it")
    if complete and len(committed) != header.source.shards:
        raise DataError(
            f"{location} has {len(committed)} of {header.source.shards} shards; finish its extraction first with "
            f"`{manifest.extract_command(location)}`"
        )
    warnings.warn(
        f"{location} has no {manifest.MANIFEST}: {len(committed)} of {header.source.shards} shards are read; run the "
        "same extract-targets again to finish it",
        RuntimeWarning,
        stacklevel=2,
    )
    return TargetStore(location, header, {name: shard.entry for name, shard in sorted(committed.items())})
