"""What gives in first: what a plan needs, over what is there."""

from __future__ import annotations

from dataclasses import dataclass

from milan_pipe.extraction.space import FreeSpace
from milan_pipe.images.count import ImageCount
from milan_pipe.planning.load import ClusterLoad, NodeLoad
from milan_pipe.planning.store import StoreEstimate
from milan_pipe.units import size

RECORD_BYTES_PER_SECOND = 15e6
"""How fast records of shards are read, checked and taken apart: `python -m benchmarks.scale`, docs/scale.md."""

_FAST_RESTART_SECONDS = 600
_LONG_SHARD_HOURS = 1.0
# Names of shards are numbers of six digits, which sort as they count.
_MOST_SHARDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Something that a plan needs of something that is there.

    Attributes:
        share: needed over there; above 1 it does not fit.
        what: both, in words.
        advice: what to do about it.
    """

    name: str
    share: float
    what: str
    advice: str


def limits(
    images: ImageCount,
    store: StoreEstimate,
    space: FreeSpace,
    files: int | None,
    cluster: ClusterLoad,
    node: NodeLoad,
    cores: int,
) -> tuple[Limit, ...]:
    """All limits that are known, the one that gives in first at the head.

    Args:
        files: that may still be made where the store is to lie.
        cores: processors of a node.
    """
    restart = store.record_bytes / RECORD_BYTES_PER_SECOND
    found = [
        Limit(
            name="scheduler",
            share=cluster.scheduler_share,
            what=f"Dask's scheduler is busy for {100 * cluster.scheduler_share:.2g} % of the time with "
            f"{cluster.devices} devices at work",
            advice="larger shards, or several extractions with --shards i/n",
        ),
        Limit(
            name="shards",
            share=cluster.devices / images.shards,
            what=f"{images.shards}, each done by one device; devices: {cluster.devices}",
            advice="smaller shards",
        ),
        Limit(
            name="length of a shard",
            share=cluster.shard_hours / _LONG_SHARD_HOURS,
            what=f"a shard takes {cluster.shard_hours:.2g} hours, which an interruption loses",
            advice="smaller shards",
        ),
        Limit(
            name="processors of a node",
            share=node.cores / cores,
            what=f"the loader needs {node.cores:.2g} processors of a node, there are {cores}",
            advice="codec.zstd_level=0, or more processors",
        ),
        Limit(
            name="start again",
            share=restart / _FAST_RESTART_SECONDS,
            what=f"an interrupted extraction first reads {size(store.record_bytes)} of records, {restart:.2g} s",
            advice="format webdataset, whose records are short",
        ),
        Limit(
            name="names of shards",
            share=images.shards / _MOST_SHARDS,
            what=f"{images.shards} shards, whose names have six digits",
            advice="larger shards, or several stores",
        ),
    ]
    if space.free_bytes is not None:
        found.append(
            Limit(
                name="free disk",
                share=space.needed_bytes / max(space.free_bytes, 1),
                what=f"{size(space.needed_bytes)} are needed, {size(space.free_bytes)} free",
                advice="codec klt, fewer views, or a bucket",
            )
        )
    if files is not None:
        found.append(
            Limit(
                name="number of files",
                share=store.files / files,
                what=f"{store.files:,} files are needed, {files:,} can be made",
                advice="format webdataset, which has one file for each shard and view",
            )
        )
    return tuple(sorted(found, key=lambda limit: limit.share, reverse=True))
