"""Every byte and every promise of a store, checked."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from milan_pipe.digests import sha256_of_file
from milan_pipe.errors import DataError, MilanError, MissingError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.storage import Location, location_of
from milan_pipe.targets import manifest
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, ShardRecord, StoreHeader, ViewRun
from milan_pipe.targets.store import header_file, open_shard, read_header

# A row of L float16 values that were rounded one by one.
_SUM_TOLERANCE = 4e-3
# Codes of one byte; -128 is never written.
_MOST_CODE = 127
_PARALLEL_READS = 8

ShardCheck = Callable[[str, int, int, int, ViewRun], Iterator["Problem"]]
"""Takes shard, its samples, view, first sample and a run; see `milan_pipe.extraction.against` for the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was written.

    Attributes:
        shard: name, or "" for the store's own files.
        array: array, file or folder.
        what: what was found and what was expected.
        repair: what to run.
    """

    shard: str
    array: str
    what: str
    repair: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a check came to.

    Attributes:
        shards, samples, views, files, bytes: what was looked at.
        problems: all of them; none means that the store is whole.
        repair: what to run, one after another, to be rid of all of them.
    """

    shards: int
    samples: int
    views: int
    files: int
    bytes: int
    problems: tuple[Problem, ...]
    repair: tuple[str, ...]


class _Check:
    def __init__(self, location: Location, header: StoreHeader, on_run: ShardCheck) -> None:
        self.location = location
        self.header = header
        self.on_run = on_run
        self.problems: list[Problem] = []
        self.samples = self.views = self.files = self.bytes = 0
        self.finished = False
        self._removals: list[str] = []
        self._keys: dict[str, NDArray[np.uint64]] = {}

    def report(self, shard: str, array: str, what: str) -> None:
        repair = manifest.redo_command(self.location, shard) if shard else manifest.extract_command(self.location)
        self.problems.append(Problem(shard=shard, array=array, what=what, repair=repair))

    def report_header(self, name: str, what: str) -> None:
        repair = f"{self._removal(name)}; {manifest.extract_command(self.location)}"
        self.problems.append(Problem(shard="", array=name, what=what, repair=repair))

    def report_stray(self, shard: str, path: str, what: str) -> None:
        # What has not a store's own name is the user's, as a run that was put here, and is never advised away.
        is_own = shard or re.fullmatch(r"[0-9]{6,9}|manifest/[0-9]{6,9}\.json|zarr\.json|header\.json", path)
        inside = f"{shard}/{path}" if shard else path
        repair = self._removal(inside) if is_own else self._removal(inside, ("mv", "move"), " ELSEWHERE")
        self.problems.append(Problem(shard=shard, array=path, what=what, repair=repair))

    def _removal(self, path: str, verbs: tuple[str, str] = ("rm -rf", "remove"), where: str = "") -> str:
        verb = verbs[self.location.local is None]
        self._removals.append(f"{verb} {shlex.quote(f'{self.location}/{path}')}{where}")
        return self._removals[-1]

    def repair(self) -> tuple[str, ...]:
        """What repairs all problems: one extraction, after what is too much is gone."""
        rest = [problem for problem in self.problems if problem.repair not in self._removals]
        shards = sorted({problem.shard for problem in rest} - {""})
        if shards:
            last = [manifest.redo_command(self.location, ",".join(shards))]
        else:
            last = [manifest.extract_command(self.location)] if rest else []
        return (*dict.fromkeys(self._removals), *last)

    def store(self) -> dict[str, int]:
        """Check header, manifest and bad samples. Returns samples by shard."""
        name, content = header_file(self.header)
        data = self.location.read(name)
        if data != content:
            self.report_header(name, "differs from what was written")
        try:
            found = manifest.read_manifest(self.location)
            if found is None:
                self.report("", manifest.MANIFEST, "is missing: extraction has not come to its end")
        except DataError as error:
            self.report("", manifest.MANIFEST, str(error))
            found = None
        self.finished = found is not None
        committed = self._committed(found)
        if found is None:
            return dict.fromkeys(sorted(committed), -1)
        if manifest.sha256_of(data) != found.header_sha256:
            self.report_header(name, f"does not fit its digest in {manifest.MANIFEST}")
        try:
            bad = manifest.sha256_of(self.location.read(manifest.BAD_SAMPLES))
        except MissingError:
            bad = ""
        if bad != found.bad_samples_sha256:
            self.report("", manifest.BAD_SAMPLES, "does not fit its digest" if bad else "is missing")
        if len(found.shards) != self.header.source.shards:
            self.report("", manifest.MANIFEST, f"has {len(found.shards)} of {self.header.source.shards} shards")
        samples = {}
        for shard, entry in sorted(found.shards.items()):
            path = f"{manifest.FOLDER}/{shard}.json"
            if shard not in committed:
                self.report(shard, path, "is missing")
                continue
            samples[shard] = entry.samples
            if manifest.sha256_of(self.location.read(path)) != entry.record_sha256:
                self.report(shard, path, f"does not fit its digest in {manifest.MANIFEST}")
        return samples

    def _committed(self, found: manifest.Manifest | None) -> set[str]:
        if self.location.listable:
            return set(manifest.committed_names(self.location))
        # A web server cannot list: look for the records that the manifest names.
        shards = found.shards if found is not None else ()
        present = self.location.child(manifest.FOLDER).present(f"{shard}.json" for shard in shards)
        return {path.removesuffix(".json") for path in present}

    def strays(self, shards: set[str]) -> None:
        """Files of a store that nothing refers to; a folder of them counts as one."""
        name, _ = header_file(self.header)
        own = {name, manifest.MANIFEST, manifest.BAD_SAMPLES, *(f"{manifest.FOLDER}/{shard}.json" for shard in shards)}
        strays: dict[str, int] = {}
        for path in self.location.sizes():
            top, _, inside = path.partition("/")
            # The next shard of an unfinished store may exist before it is committed.
            begun = inside and top.isdigit() and not self.finished
            if path not in own and top not in shards and not begun:
                entry = path if top == manifest.FOLDER else top
                strays[entry] = strays.get(entry, 0) + 1
        for entry, files in strays.items():
            what = "is not part of the store"
            self.report_stray("", entry, what if files == 1 else f"{what}, with {files} files")

    def shard(self, name: str, samples: int) -> None:
        try:
            record = manifest.read_record(self.location, name)
        except MilanError as error:
            self.report(name, f"{manifest.FOLDER}/{name}.json", str(error))
            return
        if samples not in (-1, record.source.samples):
            self.report(name, f"{manifest.FOLDER}/{name}.json", f"has {record.source.samples} samples, not {samples}")
        least = codec_of(self.header.codec).least_cosine
        if record.mean_cosine is not None and not record.mean_cosine >= least:
            self.report(
                name,
                "features",
                f"a mean cosine of {record.mean_cosine:g} to the teacher's, expected at least {least:g}",
            )
        if self._files(name, record):
            self._content(name, record)

    def _files(self, name: str, record: ShardRecord) -> bool:
        sizes = self.location.child(name).sizes(record.files)
        readable = [path for path, file in record.files.items() if sizes.get(path) == file.bytes]
        # Far away each file takes a while to answer.
        with ThreadPoolExecutor(1 if self.location.local is not None else _PARALLEL_READS) as pool:
            digests = dict(zip(readable, pool.map(self._sha256, (f"{name}/{path}" for path in readable)), strict=True))
        good = True
        for path, file in record.files.items():
            found = sizes.get(path)
            if found is None:
                what = "is missing"
            elif found != file.bytes:
                what = f"has {found} bytes, {file.bytes} were written"
            elif digests[path] != file.sha256:
                what = "has other bytes than were written"
            else:
                self.files += 1
                self.bytes += file.bytes
                continue
            good = False
            self.report(name, path.partition("/")[0], f"{path} {what}")
        for path in sorted(sizes.keys() - record.files.keys()):
            self.report_stray(name, path, "is not part of the shard")
        return good

    def _sha256(self, path: str) -> str:
        with self.location.open(path) as file:
            return sha256_of_file(file)

    def _content(self, name: str, record: ShardRecord) -> None:
        """What the bytes say; they are those that were written, so this finds what was wrong from the start."""
        try:
            opened = open_shard(self.location, name, self.header, record)
            keys: list[list[str]] = []
            for view in range(self.header.views.count):
                seen: list[str] = []
                for start in range(0, record.source.samples, BLOCK_SAMPLES):
                    run = opened.read(view, start, min(start + BLOCK_SAMPLES, record.source.samples))
                    seen += run.keys
                    self._run(name, record.source.samples, view, start, run)
                keys.append(seen)
        except (DataError, MissingError) as error:
            array = re.search(r"array '(\w+)'|(view-\d+\.tar)", str(error))
            self.report(name, (array[1] or array[2]) if array is not None else "", str(error))
            return
        repeated = sorted(key for key, count in Counter(keys[0]).items() if count > 1)
        if repeated:
            self.report(name, "key", f"{_named(repeated)} more than once in the shard; rename in IMAGES first")
        if any(seen != keys[0] for seen in keys):
            self.report(name, "key", "the views do not have the same keys")
        self._keys[name] = np.unique(_digests(keys[0]))
        self.samples += record.source.samples

    def keys_of_all_shards(self) -> None:
        """Find keys that are in several shards, by eight bytes of memory each."""
        if not self._keys:
            return
        owners = np.repeat(np.arange(len(self._keys)), [len(digests) for digests in self._keys.values()])
        digests = np.concatenate(list(self._keys.values()))
        order = np.argsort(digests, kind="stable")
        digests, owners = digests[order], owners[order]
        again = np.flatnonzero(digests[1:] == digests[:-1]) + 1
        names = list(self._keys)
        for owner in np.unique(owners[again]):
            here = again[owners[again] == owner]
            name, other = names[owner], names[owners[here[0] - 1]]
            record = manifest.read_record(self.location, name)
            keys = open_shard(self.location, name, self.header, record).keys()
            wanted = set(digests[here].tolist())
            repeated = zip(keys, _digests(keys).tolist(), strict=True)
            shared = sorted({key for key, digest in repeated if digest in wanted})
            self.report(name, "key", f"{_named(shared)} in another shard too, as {other}; rename in IMAGES first")

    def _run(self, name: str, samples: int, view: int, start: int, run: ViewRun) -> None:
        where = f"view {view}, samples from {start}"
        codec = codec_of(self.header.codec)
        if not codec.coefficient_major and not run.code_NST.any(axis=2).all():
            self.report(name, "features", f"{where}: tokens that are all zero, which point nowhere")
        if codec.dtype.kind == "f" and not np.isfinite(run.code_NST).all():
            self.report(name, "features", f"{where}: values that are not finite")
        if codec.dtype.kind == "i" and run.code_NST.min() < -_MOST_CODE:
            self.report(name, "features", f"{where}: codes out of their range, -{_MOST_CODE} to {_MOST_CODE}")
        if run.scale_NS is not None and not (np.isfinite(run.scale_NS).all() and (run.scale_NS >= 0).all()):
            self.report(name, "scale", f"{where}: values that are not finite, or negative")
        attention = run.attention_NL.astype(np.float64)
        sums = attention.sum(axis=1)
        worst = sums[np.abs(sums - 1).argmax()]
        if not abs(worst - 1) <= _SUM_TOLERANCE:
            self.report(name, "attention", f"{where}: a row sums to {worst:g}, expected 1")
        elif attention.min() < 0:
            self.report(name, "attention", f"{where}: a row has a negative value, {attention.min():g}")
        if (run.crop_N4[:, 2:] < 1).any() or (run.crop_N4[:, :2] < 0).any():
            self.report(name, "crop", f"{where}: a box that is empty, or outside of its image")
        size = self.header.views.size
        for key, jpeg in zip(run.keys, run.jpegs, strict=True):
            try:
                shape = decode_jpeg(jpeg).shape
            except DataError as error:
                self.report(name, "view_bytes", f"{where}: {key}: {error}")
                continue
            if shape != (size, size, 3):
                self.report(name, "view_bytes", f"{where}: {key} is {shape}, expected {(size, size, 3)}")
        self.views += len(run.keys)
        self.problems += self.on_run(name, samples, view, start, run)


def _named(keys: Sequence[str]) -> str:
    """A few keys as the subject of a sentence."""
    first = repr(keys[0])
    return f"key {first} is" if len(keys) == 1 else f"key {first} and {len(keys) - 1} more are"


def _digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    data = b"".join(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(data, np.uint64)


def verify_store(
    where: str | Path,
    *,
    on_run: ShardCheck = lambda *_: iter(()),
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> VerifyReport:
    """Check a store: every file's presence, size and sha256, and that what it says makes sense.

    Args:
        on_run: a further check, called with shard, view, number of the first sample, and the samples.
        on_progress: called with shards done and shards in all.

    Raises:
        MissingError: no store there.
        DataError, MismatchError: its header is damaged, or of another schema version.
        StoreError: it cannot be reached.
    """
    location = location_of(where)
    header = read_header(location)
    if header is None:
        raise MissingError(
            f"{location} is not a target store; write one with `milan-pipe extract-targets IMAGES {location}`"
        )
    check = _Check(location, header, on_run)
    shards = check.store()
    check.strays(set(shards) | {problem.shard for problem in check.problems})
    for done, (name, samples) in enumerate(shards.items()):
        on_progress(done, len(shards))
        check.shard(name, samples)
    check.keys_of_all_shards()
    on_progress(len(shards), len(shards))
    return VerifyReport(
        shards=len(shards),
        samples=check.samples,
        views=check.views,
        files=check.files,
        bytes=check.bytes,
        problems=tuple(check.problems),
        repair=check.repair(),
    )
