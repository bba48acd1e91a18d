"""Statistics of a store's features: fitted once, kept beside the store and in the run."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.errors import DataError, StoreError
from milan_pipe.student.standardise import Standardise, fit_statistics, standardise_of
from milan_pipe.targets.codec import decode_run
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader
from milan_pipe.targets.store import TargetStore
from milan_pipe.weights_file import load_tensors, metadata_of, vouched, weights_digest, write_weights

_MOST_BYTES = 256 * 1024**2
_MOST_SAMPLES = 4096

Statistics = dict[str, Tensor]
"""As `fit_statistics` gives them."""


def identity_of(store: TargetStore) -> str:
    """A digest of all that a store's features depend on."""
    header = store.header.model_dump(mode="json", exclude={"package_version", "format", "source"})
    samples = [(shard, store.samples(shard), store.views_sha256(shard)) for shard in store.shards]
    return hashlib.sha256(json.dumps([header, samples], sort_keys=True).encode()).hexdigest()


def file_in(run: Path, number: int) -> Path:
    """Where a run keeps the statistics of its store of this number, from 0."""
    return run / "statistics" / f"{number}.safetensors"


def _beside(store: TargetStore) -> Path | None:
    local = store.location.local
    return None if local is None else local.with_name(f"{local.name}.statistics.safetensors")


def _read(file: Path) -> tuple[Statistics, str]:
    """What a file holds, and the identity of its store; files of earlier versions have no digest."""
    found = load_tensors(file)
    said = metadata_of(file).get("identity", "")
    identity, _, digest = said.partition(" ")
    if digest and said != vouched(identity, found):
        raise DataError(f"{file} is damaged: its values do not fit their digest")
    return found, identity


def _kept(file: Path | None, identity: str) -> Statistics | None:
    """What a file holds, if it is of this store."""
    if file is None or not file.is_file():
        return None
    try:
        found, of = _read(file)
    except DataError as error:
        warnings.warn(f"{error}; statistics are computed again", RuntimeWarning, stacklevel=1)
        return None
    return found if of == identity else None


def statistics_of(store: TargetStore, run: Path, number: int) -> Statistics:
    """Statistics that the run has, or that lie beside the store, or else of some of its samples, spread over all of it.

    Raises:
        DataError: the store is damaged, or its features do not vary.
        StoreError: one of them cannot be read.
    """
    identity, beside = identity_of(store), _beside(store)
    for file in (file_in(run, number), beside):
        if (found := _kept(file, identity)) is not None:
            return found
    tokens, width = store.header.tokens, store.header.teacher.width
    count = min(_MOST_SAMPLES, max(1, _MOST_BYTES // (8 * tokens * width)))
    blocks = [
        (shard, start, min(start + BLOCK_SAMPLES, store.samples(shard)))
        for shard in store.shards
        for start in range(0, store.samples(shard), BLOCK_SAMPLES)
    ]
    chosen = max(1, min(len(blocks), -(-count // BLOCK_SAMPLES)))
    features = []
    for block in range(chosen):
        shard, start, stop = blocks[block * len(blocks) // chosen]
        # Views in turn, so that all of them count.
        view = block % store.header.views.count
        run_of = store.read(shard, view, start, min(stop, start + count), with_views=False)
        features.append(decode_run(store.header.codec, run_of))
    return fit_statistics(features, width)


def keep_statistics(statistics: Statistics, store: TargetStore, run: Path, number: int) -> None:
    """Write them to the run, and beside a store on disk where that can be written; StoreError for the run's."""
    identity, beside = identity_of(store), _beside(store)
    metadata = {"identity": vouched(identity, statistics)}
    write_weights(statistics, file_in(run, number), metadata)
    try:
        if beside is not None and _kept(beside, identity) is None:
            write_weights(statistics, beside, metadata)
    except StoreError:
        # A folder of others is not ours to write; the run has its own.
        return


def kept_standardise(
    run: Path, headers: Sequence[StoreHeader], params: Params, digests: Mapping[str, Any]
) -> list[Standardise]:
    """What a run does with the features of each store, by the statistics that it kept; nothing is nothing.

    Args:
        digests: of the statistics that the run was begun with, by number, where they are known.

    Raises:
        DataError, StoreError: its statistics are damaged, lost or cannot be read.
    """
    kind = params.teachers.standardise
    if kind == "none":
        return []
    try:
        kept = []
        for number in range(len(headers)):
            found, _ = _read(file := file_in(run, number))
            if (begun := digests.get(str(number))) is not None and weights_digest(found) != begun:
                raise DataError(f"{file} is not what the run was begun with")
            kept.append(found)
    except (DataError, StoreError) as error:
        raise type(error)(
            f"{error}. The same one lies beside the store as TARGETS.statistics.safetensors, unless the store was "
            "written again: copy it there"
        ) from error
    return [standardise_of(kind, one, header.teacher.width) for one, header in zip(kept, headers, strict=True)]
