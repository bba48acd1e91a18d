"""What a plan asks of a cluster's scheduler and of a node, beside its devices."""

from __future__ import annotations

import time
from dataclasses import dataclass

from milan_pipe.images.count import ImageCount
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Loader
from milan_pipe.planning.speed import ExtractionHours, Speed
from milan_pipe.planning.store import StoreEstimate
from milan_pipe.targets.schema import BLOCK_SAMPLES, TargetReader

NODE_DEVICES = 8
"""Devices of one node, where there are as many."""

SCHEDULER_TASK_SECONDS = 0.0018
"""Processor seconds of Dask's scheduler for one task.

Measured by `python -m benchmarks.scale`, on the processor that docs/scale.md names.
"""

_LOADER_SECONDS = 1.0
_HOUR = 3600


def loader_images_per_core(reader: TargetReader, with_targets: bool) -> float:
    """Images that the loader reads, checks, decodes and batches in a second of one processor.

    Args:
        reader: of a store with at least one sample; read over and over, from the page cache.
        with_targets: whether codes are handed out.

    Raises:
        DataError: the store is damaged.
    """
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    order = EpochOrder(samples=samples, views=reader.header.views.count, block=BLOCK_SAMPLES, shuffle_blocks=1, seed=0)
    read, epoch = 0, 0
    with Loader(
        reader, BatchPlan(order=order, batch_size=sum(samples)), threads=1, with_targets=with_targets
    ) as loader:
        list(loader.batches(0))  # opens the shard
        began = time.process_time()
        while time.process_time() - began < _LOADER_SECONDS:
            epoch += 1
            read += sum(len(batch.keys) for batch in loader.batches(epoch))
        return read / (time.process_time() - began)


@dataclass(frozen=True, kw_only=True)
class ClusterLoad:
    """An extraction as a Dask cluster sees it, a worker for each device.

    Attributes:
        devices: workers at a time.
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


def node_load(student: Speed, store: StoreEstimate, loader_per_core: float, devices: int) -> NodeLoad:
    """Extrapolate to the devices of one node, at most `NODE_DEVICES`."""
    here = min(devices, NODE_DEVICES)
    images = here * student.per_second
    return NodeLoad(
        devices=here,
        images_per_second=images,
        bytes_per_second=images * store.bytes_per_view,
        loader_per_core=loader_per_core,
        cores=images / loader_per_core,
    )
