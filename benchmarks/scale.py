"""What grows with the data set, not the devices: the Dask scheduler, the sample order, the manifest; and plans.

    python -m benchmarks.scale WORK [--only scheduler order manifest plans] [--photos PHOTOS]

- scheduler: `dask scheduler` in a process of its own, workers in another, and the extraction's own client, with a
  teacher that takes no time: a shard is done the moment that it is given out. Seconds are processor time of the
  scheduler's process, so that the other processes do not blur them. `reports` are reports of progress a shard.
- order: what a rank needs to begin an epoch of a billion images in shards of 10,000.
- manifest: shards of 10,000 images with 8 views of 24 KB, of which one is written and its record used again and again.
- plans: `milan-pipe plan` for ImageNet-1K, ImageNet-21K and a billion images, with PHOTOS as the sample.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from milan_pipe import api
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings
from milan_pipe.config.params import load_params
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.extraction import cluster
from milan_pipe.extraction.render import ShardJob
from milan_pipe.extraction.shard import ShardResult
from milan_pipe.extraction.worker import Assignment
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.views import encode_jpeg
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.storage import location_of
from milan_pipe.targets import manifest
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
)
from milan_pipe.targets.store import TargetStoreWriter, header_file, open_targets

BILLION, SHARD, VIEWS, JPEG_BYTES = 10**9, 10_000, 8, 24_000
A100_TFLOPS = 39.0
"""What the published run's 456 images a second come to; see docs/recipes.md."""

DATA = {
    "ImageNet-1K": (1_281_167, 1_000, 400),
    "ImageNet-21K": (14_197_122, 10_000, 90),
    "1 billion": (BILLION, SHARD, 8),
}
MODELS = {"B": "imagenet1k-vit-b-16", "L": "imagenet1k-vit-l-16"}


# --- scheduler ----------------------------------------------------------------------------------------------------


def _source(name: str) -> SourceShard:
    return SourceShard(name=f"train-{name}.tar", bytes=10**9, sha256="0" * 64, samples=SHARD, bad=())


def _workers(address: str, count: int, reports: int) -> None:
    """So many workers in this process, each with a teacher that takes no time."""
    from distributed import Worker

    def instant(_: Assignment, job: ShardJob, report: Callable[[int, int], None]) -> ShardResult:
        for _ in range(reports):
            report(BLOCK_SAMPLES, 0)
        return ShardResult(
            name=job.name, source=_source(job.name), error=None, views=SHARD * VIEWS, cosine_sum=0.0, seconds={}
        )

    cluster.do_shard = instant
    # Every report is sent: what one costs is the question.
    cluster._REPORT_SECONDS = 0.0

    async def run() -> None:
        workers = [Worker(address, nthreads=1, dashboard=False) for _ in range(count)]
        await asyncio.gather(*workers)
        await asyncio.gather(*(worker.finished() for worker in workers))

    asyncio.run(run())


@contextmanager
def _scheduler(work: Path) -> Iterator[tuple[str, psutil.Process]]:
    where = work / "scheduler.json"
    where.unlink(missing_ok=True)
    words = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(where)]
    with subprocess.Popen(
        [sys.executable, "-m", "dask", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=work
    ) as process:
        try:
            while not where.is_file() or not where.read_text():
                time.sleep(0.1)
            yield json.loads(where.read_text())["address"], psutil.Process(process.pid)
        finally:
            process.terminate()


def _busy(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def scheduler(work: Path, tasks: int, workers: int, reports: int) -> dict[str, Any]:
    """One extraction of `tasks` shards."""
    with _scheduler(work) as (address, process):
        doing = multiprocessing.get_context("spawn").Process(
            target=_workers, args=(address, workers, reports), daemon=True
        )
        doing.start()
        from distributed import Client

        with Client(address) as client:
            client.wait_for_workers(workers)
        assignment = Assignment(
            targets=str(work / "targets"),
            teacher=TeacherSettings(),
            extract=ExtractSettings(scheduler=address),
            limits=ImageSettings(),
        )
        location = location_of(work)
        jobs = [
            ShardJob(name=f"{number:06d}", images=ShardFile(location, f"train-{number:06d}.tar", 10**9))
            for number in range(tasks)
        ]

        def extract(count: int) -> Iterator[ShardResult]:
            return cluster.extract_on_cluster(assignment, jobs[:count], lambda *_: None, lambda _: None)

        # What a scheduler is given, it unpickles: the first task has it import torch, which takes seconds and 0.8 GB.
        list(extract(workers))
        client_process = psutil.Process()
        before = _busy(process), process.memory_info().rss, client_process.memory_info().rss
        most, began = before[1], time.perf_counter()
        done = 0
        for _ in extract(tasks):
            done += 1
            if done % 500 == 0:
                most = max(most, process.memory_info().rss)
        seconds = time.perf_counter() - began
        busy, client_rss = _busy(process) - before[0], client_process.memory_info().rss - before[2]
        doing.terminate()
        doing.join()
    return {
        "tasks": done,
        "workers": workers,
        "reports": reports,
        "seconds": round(seconds, 1),
        "scheduler_seconds": round(busy, 2),
        "scheduler_ms_a_task": round(1000 * busy / done, 3),
        "scheduler_mb_before": round(before[1] / 1e6),
        "scheduler_most_mb": round(most / 1e6),
        "scheduler_kb_a_task": round((most - before[1]) / done / 1e3, 2),
        "client_mb_more": round(client_rss / 1e6),
    }


# --- order --------------------------------------------------------------------------------------------------------


def order(samples: int, streams: int = 4) -> dict[str, Any]:
    """Seconds and memory until a rank has the first blocks of an epoch, from each of its streams."""
    shards = (SHARD,) * (samples // SHARD)
    whole = EpochOrder(samples=shards, views=VIEWS, block=BLOCK_SAMPLES, shuffle_blocks=128, seed=0)
    plan = BatchPlan(order=whole, batch_size=4096, canonical_streams=32, rank=0, ranks=32 // streams)

    def begin(epoch: int) -> int:
        first = [next(iter(whole.groups(epoch, piece.stream))) for piece in plan.pieces()]
        return sum(len(blocks) for blocks, _ in first)

    began = time.perf_counter()
    blocks = begin(0)
    seconds = time.perf_counter() - began
    tracemalloc.start()
    begin(1)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "samples": samples,
        "streams": streams,
        "blocks": blocks,
        "seconds": round(seconds, 2),
        "most_mb": round(most / 1e6),
        "kept_mb": round(kept / 1e6),
    }


# --- manifest -------------------------------------------------------------------------------------------------------


def _header(store_format: str, shards: int) -> StoreHeader:
    return StoreHeader(
        package_version="0",
        format=store_format,  # type: ignore[arg-type]
        teacher=TeacherInfo(
            model="demo",
            pretrained=None,
            weights_sha256="0" * 64,
            normalization="clip",
            precision="float32",
            image_size=16,
            grid=(1, 1),
            width=4,
        ),
        views=ViewInfo(count=VIEWS, size=16, scale=(0.2, 1), ratio=(0.75, 1.33), flip=0.5, seed=0, jpeg_quality=95),
        codec=CodecInfo(name="int8"),
        source=SourceInfo(shards=shards, fingerprint="0" * 64),
    )


def _shard(writer: TargetStoreWriter, name: str) -> None:
    """A whole shard of tiny images in one feature of 4 numbers: as many files as any other but for the JPEGs."""
    jpeg = encode_jpeg(np.zeros((16, 16, 3), np.uint8), 95)
    shard = writer.open_shard(name)
    for start in range(0, SHARD, BLOCK_SAMPLES):
        n = min(BLOCK_SAMPLES, SHARD - start)
        shard.append(
            TargetBlock(
                keys=[f"{row:08d}" for row in range(start, start + n)],
                label_N=np.zeros(n, np.int64),
                code_KNST=np.ones((VIEWS, n, 2, 4), np.int8),
                scale_KNS=np.ones((VIEWS, n, 2), np.float16),
                attention_KNL=np.ones((VIEWS, n, 1), np.float16),
                crop_KN4=np.ones((VIEWS, n, 4), np.int32),
                flip_KN=np.zeros((VIEWS, n), np.bool_),
                jpegs=[[jpeg] * n for _ in range(VIEWS)],
            )
        )
    shard.commit(_source(name), 0.9999)


def manifests(work: Path, store_format: str, shards: int) -> dict[str, Any]:
    """What it takes to begin an extraction again, to end it, and to open the store."""
    where = work / f"manifest-{store_format}"
    shutil.rmtree(where, ignore_errors=True)
    writer = TargetStoreWriter(where, _header(store_format, shards))
    _shard(writer, "000000")
    record = manifest.read_record(writer.location, "000000")
    if store_format == "zarr":
        # Of rendered views as large as those of photographs there are more files.
        files, blocks = dict(record.files), dict(record.blocks)
        first = "view_bytes/c/0"
        for number in range(1, SHARD * VIEWS * JPEG_BYTES // (8 * 1024 * 1024) + 1):
            files[f"view_bytes/c/{number}"] = files[first]
            blocks[f"view_bytes/c/{number}"] = blocks[first]
        record = dataclasses.replace(record, files=files, blocks=blocks)
    for number in range(shards):
        manifest.write_record(writer.location, f"{number:06d}", record)
    size = writer.location.size(f"{manifest.FOLDER}/000000.json")
    began = time.perf_counter()
    committed = writer.committed()
    restart = time.perf_counter() - began
    tracemalloc.start()
    writer.committed()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    manifest.write_manifest(writer.location, header_file(writer.header)[1], committed)
    began = time.perf_counter()
    opened = open_targets(where)
    opening = time.perf_counter() - began
    result = {
        "format": store_format,
        "shards": len(opened.shards),
        "files_a_shard": len(record.files),
        "record_bytes": size,
        "restart_ms_a_shard": round(1000 * restart / shards, 2),
        "records_mb_a_second": round(size * shards / restart / 1e6, 1),
        "restart_most_kb_a_shard": round(most / shards / 1e3, 1),
        "summary_bytes_a_shard": round(writer.location.size(manifest.MANIFEST) / shards),
        "open_ms_a_shard": round(1000 * opening / shards, 4),
    }
    shutil.rmtree(where)
    return result


# --- plans --------------------------------------------------------------------------------------------------------


def plans(work: Path, photos: Path, devices: int) -> Iterator[dict[str, Any]]:
    """What `milan-pipe plan` says of data sets and devices that are not here."""
    images = work / "photos"
    if not images.is_dir():
        api.prepare(str(photos), images, load_params(None, []))
    for model, recipe in MODELS.items():
        for data, (total, per_shard, epochs) in DATA.items():
            for views in (4, 8):
                settings = [
                    "teacher.pretrained=random",
                    f"views.count={views}",
                    f"pretrain.epochs={epochs}",
                    f"pretrain.warmup_epochs={max(1, epochs // 10)}",
                    f"prepare.samples_per_shard={per_shard}",
                    "extract.threads=12",
                ]
                report = api.plan(
                    images,
                    work / "targets",
                    load_params(recipe, settings),
                    sample=24,
                    total=total,
                    devices=devices,
                    tflops=A100_TFLOPS,
                )
                webdataset = next(
                    store for store in report.stores if (store.codec, store.format) == ("int8", "webdataset")
                )
                klt = next(store for store in report.stores if (store.codec, store.format) == ("klt", "zarr"))
                yield {
                    "data": data,
                    "model": model,
                    "views": views,
                    "epochs": epochs,
                    "int8_tb": round(report.chosen.bytes / 1e12, 2),
                    "klt_tb": round(klt.bytes / 1e12, 2),
                    "files_zarr": report.chosen.files,
                    "files_webdataset": webdataset.files,
                    "extract_device_hours": round(report.extraction.hours[1], 1),
                    "extract_limited_by": report.extraction.limited_by,
                    "pretrain_device_hours": round(report.pretraining.pretrain_hours),
                    "online_device_hours": round(report.pretraining.online_hours),
                    "tasks": report.cluster.tasks,
                    "shard_seconds": round(3600 * report.cluster.shard_hours, 1),
                    "scheduler_share": round(report.cluster.scheduler_share, 4),
                    "node_images_per_second": round(report.node.images_per_second),
                    "node_mb_per_second": round(report.node.bytes_per_second / 1e6),
                    "node_cores": round(report.node.cores, 2),
                    "teacher_per_second": round(report.teacher.per_second),
                    "student_per_second": round(report.student.per_second),
                    "limits": {limit.name: float(f"{limit.share:.3g}") for limit in report.limits},
                }


def main() -> None:
    """Measure what was asked for, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parts = ("scheduler", "order", "manifest", "plans")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--photos", type=Path, help="a folder of photographs, for plans")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--reports", type=int, default=500, help="of the run that measures what one costs")
    parser.add_argument("--shards", type=int, default=1_000, help="records of the manifest")
    parser.add_argument("--devices", type=int, default=64, help="of the plans")
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["DASK_LOGGING__DISTRIBUTED"] = "critical"

    def tell(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)

    if "scheduler" in arguments.only:
        for tasks in arguments.tasks:
            tell(scheduler(work, tasks, arguments.workers, 0))
        tell(scheduler(work, arguments.tasks[0], arguments.workers, arguments.reports))
    if "order" in arguments.only:
        for samples in (1_280_000, 14_200_000, BILLION):
            tell(order(samples))
    if "manifest" in arguments.only:
        for store_format in ("zarr", "webdataset"):
            tell(manifests(work, store_format, arguments.shards))
    if "plans" in arguments.only:
        if arguments.photos is None:
            parser.error("plans need --photos")
        for result in plans(work, arguments.photos, arguments.devices):
            tell(result)


if __name__ == "__main__":
    main()
