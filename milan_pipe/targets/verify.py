"""Every byte and every promise of a store, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from milan_pipe.data.views import decode_jpeg
from milan_pipe.errors import DataError, MilanError, MissingError
from milan_pipe.storage import Place, place_of
from milan_pipe.targets import ledger
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, ShardRecord, StoreHeader, ViewRun
from milan_pipe.targets.store import header_file, open_shard, read_header

_HASH_BYTES = 4 * 1024 * 1024
# A row of L float16 values that were rounded one by one.
_SUM_TOLERANCE = 4e-3

ShardCheck = Callable[[str, int, int, ViewRun], Iterator["Problem"]]
"""Takes shard, view, first sample and a run; see `milan_pipe.verification` for the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was written.

    Attributes:
        shard: name, or "" for the store's own files.
        array: array, file or folder.
        what: what was found and what was expected.
        mend: what to run.
    """

    shard: str
    array: str
    what: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a check came to: what was looked at, and all problems; none means that the store is whole."""

    shards: int
    samples: int
    views: int
    files: int
    bytes: int
    problems: tuple[Problem, ...]


class _Check:
    def __init__(self, place: Place, header: StoreHeader, on_run: ShardCheck) -> None:
        self.place = place
        self.header = header
        self.on_run = on_run
        self.problems: list[Problem] = []
        self.samples = self.views = self.files = self.bytes = 0

    def blame(self, shard: str, array: str, what: str, *, remove: str = "") -> None:
        drop = "rm -f" if self.place.local is not None else "remove"
        if remove:
            mend = f"{drop} {self.place}/{remove}"
        elif shard:
            mend = ledger.redo_command(self.place, shard)
        else:
            mend = f"{drop} {self.place}/{array}; milan-pipe extract-targets IMAGES {self.place}"
        self.problems.append(Problem(shard=shard, array=array, what=what, mend=mend))

    def store(self) -> dict[str, int]:
        """Check header, summary and bad samples. Returns samples by shard."""
        name, content = header_file(self.header)
        data = self.place.read(name)
        if data != content:
            self.blame("", name, "differs from what was written")
        try:
            summary = ledger.read_summary(self.place)
        except DataError as error:
            self.blame("", ledger.SUMMARY, str(error))
            summary = None
        else:
            if summary is None:
                self.blame("", ledger.SUMMARY, "is missing: extraction has not come to its end")
        committed = self._committed()
        if summary is None:
            return dict.fromkeys(committed, -1)
        if ledger.sha256_of(data) != summary.header_sha256:
            self.blame("", name, "does not fit the digest in the summary")
        try:
            bad = ledger.sha256_of(self.place.read(ledger.BAD_SAMPLES))
        except MissingError:
            bad = ""
        if bad != summary.bad_samples_sha256:
            self.blame("", ledger.BAD_SAMPLES, "does not fit its digest" if bad else "is missing")
        if len(summary.shards) != self.header.source.shards:
            self.blame("", ledger.SUMMARY, f"has {len(summary.shards)} of {self.header.source.shards} shards")
        for shard in sorted(summary.shards.keys() - set(committed)):
            self.blame(shard, f"{ledger.FOLDER}/{shard}.json", "is missing")
        for shard in sorted(summary.shards.keys() & set(committed)):
            record = ledger.sha256_of(self.place.read(f"{ledger.FOLDER}/{shard}.json"))
            if record != summary.shards[shard].record_sha256:
                self.blame(shard, f"{ledger.FOLDER}/{shard}.json", "does not fit its digest in the summary")
        for shard in sorted(set(committed) - summary.shards.keys()):
            self.blame(shard, f"{ledger.FOLDER}/{shard}.json", "is not in the summary")
        return {shard: summary.shards[shard].samples for shard in summary.shards if shard in committed}

    def _committed(self) -> tuple[str, ...]:
        names = ledger.committed_names(self.place)
        if self.place.local is None and not names:
            # A place that cannot be listed (https) has its summary alone to tell.
            summary = ledger.read_summary(self.place)
            names = tuple(summary.shards) if summary is not None else ()
        return names

    def strays(self, shards: set[str]) -> None:
        """Files of a store that nothing refers to."""
        name, _ = header_file(self.header)
        own = {name, ledger.SUMMARY, ledger.BAD_SAMPLES}
        for path in self.place.sizes():
            top = path.partition("/")[0]
            if path not in own and top != ledger.FOLDER and top not in shards:
                self.blame("", path, "is not part of the store", remove=path)

    def shard(self, name: str, samples: int) -> None:
        try:
            record = ledger.read_record(self.place, name)
        except MilanError as error:
            self.blame(name, f"{ledger.FOLDER}/{name}.json", str(error))
            return
        if samples not in (-1, record.source.samples):
            self.blame(name, f"{ledger.FOLDER}/{name}.json", f"tells of {record.source.samples} samples, not {samples}")
        if self._files(name, record):
            self._content(name, record)

    def _files(self, name: str, record: ShardRecord) -> bool:
        sizes = self.place.sizes(name, record.files)
        good = True
        for path, file in record.files.items():
            found = sizes.get(path)
            if found is None:
                what = "is missing"
            elif found != file.bytes:
                what = f"has {found} bytes, {file.bytes} were written"
            elif self._sha256(f"{name}/{path}") != file.sha256:
                what = "has other bytes than were written"
            else:
                self.files += 1
                self.bytes += file.bytes
                continue
            good = False
            self.blame(name, path.partition("/")[0], f"{path} {what}")
        for path in sorted(sizes.keys() - record.files.keys()):
            self.blame(name, path.partition("/")[0], f"{path} is not part of the shard", remove=f"{name}/{path}")
        return good

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self.place.open(path) as file:
            while data := file.read(_HASH_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def _content(self, name: str, record: ShardRecord) -> None:
        """What the bytes say; they are those that were written, so this finds what was wrong from the start."""
        try:
            opened = open_shard(self.place, name, self.header, record)
            keys: list[list[str]] = []
            for view in range(self.header.views.count):
                seen: list[str] = []
                for start in range(0, record.source.samples, BLOCK_SAMPLES):
                    run = opened.read(view, start, min(start + BLOCK_SAMPLES, record.source.samples))
                    seen += run.keys
                    self._run(name, view, start, run)
                keys.append(seen)
        except (DataError, MissingError) as error:
            self.blame(name, "", str(error))
            return
        if len(set(keys[0])) != record.source.samples:
            self.blame(name, "key", f"{record.source.samples - len(set(keys[0]))} keys occur twice")
        if any(seen != keys[0] for seen in keys):
            self.blame(name, "key", "the views do not have the same keys")
        self.samples += record.source.samples

    def _run(self, name: str, view: int, start: int, run: ViewRun) -> None:
        where = f"view {view}, samples from {start}"
        codec = codec_of(self.header.codec)
        if codec.dtype.kind == "f" and not np.isfinite(run.code_NST).all():
            self.blame(name, "features", f"{where}: values that are not finite")
        if run.scale_NS is not None and not (np.isfinite(run.scale_NS).all() and (run.scale_NS >= 0).all()):
            self.blame(name, "scale", f"{where}: values that are not finite, or negative")
        attention = run.attention_NL.astype(np.float64)
        off = np.abs(attention.sum(axis=1) - 1).max()
        if not (off <= _SUM_TOLERANCE and attention.min() >= 0):
            self.blame(name, "attention", f"{where}: a row sums to {1 + off:g}, or has a negative value")
        if (run.crop_N4[:, 2:] < 1).any() or (run.crop_N4[:, :2] < 0).any():
            self.blame(name, "crop", f"{where}: a box outside of its picture")
        size = self.header.views.size
        for key, jpeg in zip(run.keys, run.jpegs, strict=True):
            try:
                shape = decode_jpeg(jpeg).shape
            except DataError as error:
                self.blame(name, "view_bytes", f"{where}: {key}: {error}")
                continue
            if shape != (size, size, 3):
                self.blame(name, "view_bytes", f"{where}: {key} is {shape}, expected {(size, size, 3)}")
        self.views += len(run.keys)
        self.problems += self.on_run(name, view, start, run)


def verify_targets(
    where: str | Path,
    *,
    on_run: ShardCheck = lambda *_: iter(()),
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> VerifyReport:
    """Check a store: every file's presence, size and sha256, and that what it says makes sense.

    Args:
        on_run: a further check, called with shard, view, number of the first sample, and the samples.
        on_progress: told shards done and shards in all.

    Raises:
        MissingError: no store there.
        DataError, MismatchError: its header is damaged, or of another schema version.
        StoreError: it cannot be reached.
    """
    place = place_of(where)
    header = read_header(place)
    if header is None:
        raise MissingError(f"{place} is not a target store; write one with `milan-pipe extract-targets IMAGES {place}`")
    check = _Check(place, header, on_run)
    shards = check.store()
    check.strays(set(shards) | {problem.shard for problem in check.problems})
    for done, (name, samples) in enumerate(shards.items()):
        on_progress(done, len(shards))
        check.shard(name, samples)
    on_progress(len(shards), len(shards))
    return VerifyReport(
        shards=len(shards),
        samples=check.samples,
        views=check.views,
        files=check.files,
        bytes=check.bytes,
        problems=tuple(check.problems),
    )
