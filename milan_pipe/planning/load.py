"""What a plan needs of a cluster's scheduler and of a node, and what runs out first."""

from __future__ import annotations

import time
from dataclasses import dataclass

from milan_pipe.extraction.space import FreeSpace
from milan_pipe.images.count import ImageCount
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Loader, Reader
from milan_pipe.planning.speed import ExtractionHours, Speed
from milan_pipe.planning.store import StoreEstimate
from milan_pipe.targets.schema import BLOCK_SAMPLES
from milan_pipe.units import size

NODE_DEVICES = 8
"""Most devices of one node."""

SCHEDULER_TASK_SECONDS = 0.0018
"""Processor seconds of Dask's scheduler for one task.

Measured by `python -m benchmarks.scale`, on the processor that docs/scale.md names.
"""

_LOADER_SECONDS = 1.0
_HOUR = 3600

RECORD_BYTES_PER_SECOND = 15e6
"""How fast records of shards are read, checked and taken apart: `python -m benchmarks.scale`, docs/scale.md."""

_FAST_RESTART_SECONDS = 600
_LONG_SHARD_HOURS = 1.0
# Names of shards are numbers of six digits, which sort as they count.
_MOST_SHARDS = 1_000_000


def loader_images_per_core(reader: Reader, with_targets: bool) -> float:
    """Images that the loader reads, checks, decodes and batches in a second of one processor.

    Args:
        reader: of a store with at least one sample; read over and over, from the page cache.
        with_targets: whether codes are handed out.

    Raises:
        DataError: the store is damaged.
    """
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    order = EpochOrder(samples=samples, views=reader.header.views.count, block=BLOCK_SAMPLES, shuffle_blocks=1, seed=0)
    plan, read, epoch = BatchPlan(order=order, batch_size=sum(samples)), 0, 0
    with Loader(reader, plan, threads=1, with_targets=with_targets) as loader:
        list(loader.batches(0))  # opens the shard
        began = time.process_time()
        while time.process_time() - began < _LOADER_SECONDS:
            epoch += 1
            read += sum(len(batch.keys) for batch in loader.batches(epoch))
        return read / (time.process_time() - began)


@dataclass(frozen=True, kw_only=True)
class ClusterLoad:
    """An extraction as a Dask cluster sees it.

    Attributes:
        devices: of all workers; each does a shard at a time, together.
        tasks: one for each shard.
        shard_hours: of one shard on one device, which a kill loses at the most.
        scheduler_share: of the time that the scheduler is busy; above 1 it cannot keep up.
    """

    devices: int
    tasks: int
    shard_hours: float
    scheduler_share: float


def cluster_load(images: ImageCount, extraction: ExtractionHours, devices: int) -> ClusterLoad:
    """Extrapolate from what a task costs elsewhere; a report of progress, one a second and worker, costs hardly any."""
    shard_hours = extraction.hours[1] / images.shards
    per_second = min(devices, images.shards) / (shard_hours * _HOUR)
    return ClusterLoad(
        devices=devices,
        tasks=images.shards,
        shard_hours=shard_hours,
        scheduler_share=per_second * SCHEDULER_TASK_SECONDS,
    )


@dataclass(frozen=True, kw_only=True)
class NodeLoad:
    """Pretraining as one node sees it.

    Attributes:
        devices: of the node.
        images_per_second: that they take together.
        bytes_per_second: to be read for them.
        loader_per_core: images a second that one processor gives; measured.
        cores: processors that the loader needs.
    """

    devices: int
    images_per_second: float
    bytes_per_second: float
    loader_per_core: float
    cores: float


def node_load(student: Speed, bytes_per_image: float, loader_per_core: float, devices: int) -> NodeLoad:
    """Extrapolate to the devices of one node, at most `NODE_DEVICES`."""
    here = min(devices, NODE_DEVICES)
    images = here * student.per_second
    return NodeLoad(
        devices=here,
        images_per_second=images,
        bytes_per_second=images * bytes_per_image,
        loader_per_core=loader_per_core,
        cores=images / loader_per_core,
    )


@dataclass(frozen=True)
class Limit:
    """Something that a plan needs, against what there is.

    Attributes:
        share: needed over present; above 1 it does not fit.
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
    """All limits that are known, the tightest first.

    Args:
        files: that may still be made at the storage location.
        cores: processors of a node.
    """
    restart = store.record_bytes / RECORD_BYTES_PER_SECOND
    found = [
        Limit(
            "scheduler",
            cluster.scheduler_share,
            f"Dask's scheduler is busy for {100 * cluster.scheduler_share:.2g} % of the time with {cluster.devices} "
            "devices at work",
            "larger shards, or several extractions with --shards i/n",
        ),
        Limit(
            "shards",
            cluster.devices / images.shards,
            f"{images.shards}, each done by one device; devices: {cluster.devices}",
            "smaller shards",
        ),
        Limit(
            "length of a shard",
            cluster.shard_hours / _LONG_SHARD_HOURS,
            f"a shard takes {cluster.shard_hours:.2g} hours, which an interruption loses",
            "smaller shards",
        ),
        Limit(
            "processors of a node",
            node.cores / cores,
            f"the loader needs {node.cores:.2g} processors of a node, there are {cores}",
            "codec.zstd_level=0, or more processors",
        ),
        Limit(
            "start again",
            restart / _FAST_RESTART_SECONDS,
            f"an interrupted extraction first reads {size(store.record_bytes)} of records, {restart:.2g} s",
            "format webdataset, whose records are short",
        ),
        Limit(
            "names of shards",
            images.shards / _MOST_SHARDS,
            f"{images.shards} shards, whose names have six digits",
            "larger shards, or several stores",
        ),
    ]
    if space.free_bytes is not None:
        words = f"{size(space.needed_bytes)} are needed, {size(space.free_bytes)} free"
        share = space.needed_bytes / max(space.free_bytes, 1)
        found.append(Limit("free disk", share, words, "codec klt, fewer views, or a bucket"))
    if files is not None:
        words = f"{store.files:,} files are needed, {files:,} can be made"
        advice = "format webdataset, which has one file for each shard and view"
        found.append(Limit("number of files", store.files / files, words, advice))
    return tuple(sorted(found, key=lambda limit: limit.share, reverse=True))
