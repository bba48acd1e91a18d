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

from milan_pipe.digests import sha256_of, sha256_of_file
from milan_pipe.errors import DataError, MilanError, MissingError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.storage import Location, location_of
from milan_pipe.storage.kinds import TARGETS, mistaken
from milan_pipe.targets import manifest
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, ShardRecord, StoreHeader, ViewRun, shard_path
from milan_pipe.targets.store import header_name, is_as_written, open_shard, read_header

# A row of L float16 values that were rounded one by one.
_SUM_TOLERANCE = 4e-3
# Codes of one byte; -128 is never written.
_MOST_CODE = 127
_PARALLEL_READS = 8
# What a hub, or a download from one, puts beside a store.
_OF_A_HUB = frozenset(("README.md", ".gitattributes", ".cache"))

ShardCheck = Callable[[str, int, int, int, ViewRun], Iterator["Problem"]]
"""Takes shard, its samples, view, first sample and a run; see `milan_pipe.extraction.against` for the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was written, and the command to run; shard "" for the store's own files."""

    shard: str
    array: str
    what: str
    repair: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was looked at, what is wrong, and what to run, one after another, to repair all of it."""

    shards: int
    samples: int
    views: int
    files: int
    bytes: int
    problems: tuple[Problem, ...]
    repair: tuple[str, ...]


class _Check:
    def __init__(self, location: Location, header: StoreHeader, on_run: ShardCheck) -> None:
        self.location, self.header, self.on_run = location, header, on_run
        self.problems: list[Problem] = []
        self.samples = self.views = self.files = self.bytes = 0
        self.finished = False
        self._removals: list[str] = []
        self._keys: dict[str, NDArray[np.uint64]] = {}

    def report(self, shard: str, array: str, what: str, repair: str = "") -> None:
        again = manifest.redo_command(self.location, shard) if shard else manifest.extract_command(self.location)
        self.problems.append(Problem(shard=shard, array=array, what=what, repair=repair or again))

    def report_header(self, name: str, what: str) -> None:
        self.report("", name, what, f"{self._removal(name)}; {manifest.extract_command(self.location)}")

    def report_stray(self, shard: str, path: str, what: str) -> None:
        # What has not a store's own name is the user's, as a run that was put here, and is never advised away.
        is_own = shard or re.fullmatch(
            r"(shards/)?[0-9]{6,9}|manifest/[0-9]{6,9}\.json|(shards/)?zarr\.json|header\.json", path
        )
        inside = f"{shard_path(self.header, shard)}/{path}" if shard else path
        self.report(shard, path, what, self._removal(inside) if is_own else self._removal(inside, "mv", " ELSEWHERE"))

    def _removal(self, path: str, verb: str = "rm -rf", where: str = "") -> str:
        if self.location.local is None:
            verb = {"rm -rf": "remove", "mv": "move"}[verb]
        self._removals.append(f"{verb} {shlex.quote(f'{self.location}/{path}')}{where}")
        return self._removals[-1]

    def repair(self) -> tuple[str, ...]:
        """What repairs all problems: one extraction, after what is too much is gone."""
        commands = list(dict.fromkeys(self._removals))
        rest = {problem.shard for problem in self.problems if problem.repair not in commands}
        if shards := sorted(rest - {""}):
            commands.append(manifest.redo_command(self.location, ",".join(shards)))
        elif rest:
            commands.append(manifest.extract_command(self.location))
        return tuple(commands)

    def store(self) -> dict[str, int]:
        """Check header, manifest and bad samples. Returns samples by shard."""
        name = header_name(self.header)
        data = self.location.read(name)
        if not is_as_written(data):
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
        if sha256_of(data) != found.header_sha256:
            self.report_header(name, f"does not fit its digest in {manifest.MANIFEST}")
        try:
            bad = sha256_of(self.location.read(manifest.BAD_SAMPLES))
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
            if sha256_of(self.location.read(path)) != entry.record_sha256:
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
        name = header_name(self.header)
        own = {name, manifest.MANIFEST, manifest.BAD_SAMPLES, *(f"{manifest.FOLDER}/{shard}.json" for shard in shards)}
        strays: Counter[str] = Counter()
        place = shard_path(self.header, "")
        for path in self.location.sizes():
            among = place if path.startswith(place) else ""
            top, _, inside = path.removeprefix(among).partition("/")
            # The next shard of an unfinished store may exist before it is committed.
            begun = inside and top.isdigit() and not self.finished
            beside = path.partition("/")[0] in _OF_A_HUB
            if path not in own and not beside and not (among == place and (top in shards or begun)):
                strays[path if top == manifest.FOLDER else among + top] += 1
        for entry, files in strays.items():
            self.report_stray("", entry, f"is not part of the store{f', with {files} files' if files > 1 else ''}")

    def shard(self, name: str, samples: int) -> None:
        path = f"{manifest.FOLDER}/{name}.json"
        try:
            record = manifest.read_record(self.location, name)
        except MilanError as error:
            self.report(name, path, str(error))
            return
        if samples not in (-1, record.source.samples):
            self.report(name, path, f"has {record.source.samples} samples, not {samples}")
        cosine, least = record.mean_cosine, codec_of(self.header.codec).least_cosine
        if cosine is not None and not cosine >= least:
            self.report(name, "features", f"a mean cosine of {cosine:g} to the teacher's, expected at least {least:g}")
        if self._files(name, record):
            self._content(name, record)

    def _files(self, name: str, record: ShardRecord) -> bool:
        folder = self.location.child(shard_path(self.header, name))
        sizes = folder.sizes(record.files)

        def wrong(path: str) -> str | None:
            expected = record.files[path]
            if what := manifest.wrong_bytes(sizes.get(path), expected):
                return what
            with folder.open(path) as file:
                return None if sha256_of_file(file) == expected.sha256 else "has other bytes than were written"

        # Far away each file takes a while to answer.
        with ThreadPoolExecutor(1 if self.location.local is not None else _PARALLEL_READS) as pool:
            found = dict(zip(record.files, pool.map(wrong, record.files), strict=True))
        for path, what in found.items():
            if what is not None:
                self.report(name, path.partition("/")[0], f"{path} {what}")
        good = [path for path, what in found.items() if what is None]
        self.files += len(good)
        self.bytes += sum(record.files[path].bytes for path in good)
        for path in sorted(sizes.keys() - record.files.keys()):
            self.report_stray(name, path, "is not part of the shard")
        return len(good) == len(found)

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
        names = list(self._keys)
        owners = np.repeat(np.arange(len(names)), [len(digests) for digests in self._keys.values()])
        digests = np.concatenate(list(self._keys.values()))
        order = np.argsort(digests, kind="stable")
        digests, owners = digests[order], owners[order]
        again = np.flatnonzero(digests[1:] == digests[:-1]) + 1
        for owner in np.unique(owners[again]):
            here = again[owners[again] == owner]
            name, other = names[owner], names[owners[here[0] - 1]]
            record = manifest.read_record(self.location, name)
            keys = open_shard(self.location, name, self.header, record).keys()
            shared = sorted(set(np.array(keys, object)[np.isin(_digests(keys), digests[here])]))
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
                decode_jpeg(jpeg, side=size)
            except DataError as error:
                self.report(name, "view_bytes", f"{where}: {key}: {error}")
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
        on_run: a further check.
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
            mistaken(location.local, TARGETS)
            or f"{location} is not a target store; write one with `{manifest.extract_command(location)}`"
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
