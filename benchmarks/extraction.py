"""Stage 1 against the bare forward pass of its teacher; several workers against one; what Dask adds to a shard.

    python -m benchmarks.extraction WORK PHOTOS [--images 1000] [--views 1 4 8] [--device cpu]
    python -m benchmarks.extraction WORK PHOTOS --only workers
    python -m benchmarks.extraction WORK PHOTOS --only dask [--shards 2000]

PHOTOS is a folder of photographs; they are repeated, each time under another key and so with other crops, until there
are `--images` of them, in shards of 250. The teacher is ViT-B-16 at 224 with random weights, codec int8.

Bare is the teacher's forward pass on batches of rendered views that lie in memory, of the same size; half of its
batches run before the extraction and half after it, so that both meet the same machine. End to end is all of
`extract_targets`:
loading the teacher, reading, decoding, cropping, JPEG, forward pass, codec, checksums, writing and committing.

The last part has shards of one tiny image and the small bundled teacher, so that a shard is little more than its own
files: once in this process, once through a Dask scheduler with one worker, and the scheduler alone, with tasks that do
nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.distributed import Client, LocalCluster
from PIL import Image

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings, ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.extraction.render import Clock, render_sample
from milan_pipe.extraction.run import ExtractReport, extract_targets
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard
from milan_pipe.images.views import decode_jpeg
from milan_pipe.teacher.clip import Teacher, load_teacher

SIZE, BATCH, SHARD_IMAGES = 224, 64, 250
TEACHER = TeacherSettings(model="ViT-B-16", pretrained="random")
PHASES = ("read", "decode", "crop", "jpeg", "teacher", "encode", "write")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_photos(work: Path, photos: Path, images: int) -> Path:
    """Shards of the photographs, over and over."""
    folder = work / f"photos-{images}"
    if folder.is_dir():
        return folder
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    beside = folder.with_suffix(".making")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for shard, start in enumerate(range(0, images, SHARD_IMAGES)):
        with tarfile.open(beside / f"photos-{shard:06d}.tar", "w") as tar:
            for number in range(start, min(start + SHARD_IMAGES, images)):
                file = files[number % len(files)]
                _add(tar, f"{number:06d}{file.suffix.lower()}", file.read_bytes())
    return beside.rename(folder)


def make_tiny(work: Path, shards: int) -> Path:
    """Shards of one image of 64 x 64."""
    folder = work / f"tiny-{shards}"
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(data, "JPEG")
    for shard in range(shards):
        with tarfile.open(folder / f"tiny-{shard:06d}.tar", "w") as tar:
            _add(tar, f"{shard:06d}.jpg", data.getvalue())
    return folder


def _rendered(images: Path, views: ViewSettings) -> torch.Tensor:
    """One batch of rendered views, as the teacher sees them."""
    rendered: list[np.ndarray[Any, Any]] = []
    for shard in expand_shards(images):
        for sample in read_shard(shard, lambda *_: None):
            rendered += [
                decode_jpeg(jpeg) for jpeg in render_sample(sample, views, SIZE, ImageSettings(), Clock()).jpegs
            ]
            if len(rendered) >= BATCH:
                return torch.from_numpy(np.stack(rendered[:BATCH]))
    raise SystemExit(f"{images} has fewer than {BATCH} views")


def _forward_seconds(teacher: Teacher, batch: torch.Tensor, batches: int) -> float:
    teacher(batch)
    began = time.perf_counter()
    for _ in range(batches):
        teacher(batch).features_BST.cpu()
    return time.perf_counter() - began


def _extract(images: Path, targets: Path, views: int, device: str, **extract: Any) -> ExtractReport:
    shutil.rmtree(targets, ignore_errors=True)
    return extract_targets(
        images,
        targets,
        Params(
            teacher=TEACHER,
            views=ViewSettings(count=views, scale=(0.2, 1)),
            student=StudentSettings(image_size=SIZE, patch_size=16),
            extract=ExtractSettings(batch_size=BATCH, device=device, **extract),
        ),
    )


def end_to_end(work: Path, photos: Path, images: int, counts: list[int], device: str, batches: int) -> None:
    """The table of extraction ÷ bare forward."""
    shards = make_photos(work, photos, images)
    titles = (
        "views an image",
        "views",
        "bare, views/s",
        "end to end, views/s",
        "÷",
        *(f"{name}, s" for name in PHASES),
    )
    print(f"| {' | '.join((*titles, 'in all, s'))} |\n|{'---|' * (len(titles) + 1)}", flush=True)
    teacher = load_teacher(TEACHER, torch.device(device))
    batch = _rendered(shards, ViewSettings(count=1, scale=(0.2, 1)))
    for count in counts:
        seconds = _forward_seconds(teacher, batch, batches)
        report = _extract(shards, work / "targets", count, device)
        seconds += _forward_seconds(teacher, batch, batches)
        bare = 2 * batches * BATCH / seconds
        cells = [str(count), str(report.views), f"{bare:.4g}", f"{report.views_per_second:.4g}"]
        cells += [f"{report.views_per_second / bare:.3f}", *(f"{report.phases.get(name, 0.0):.1f}" for name in PHASES)]
        print(f"| {' | '.join((*cells, f'{report.seconds:.1f}'))} |", flush=True)


def workers(work: Path, photos: Path, images: int, device: str) -> None:
    """Two processes against one on the same machine."""
    shards = make_photos(work, photos, images)
    rates = {}
    for count in (1, 2, 1, 2):
        report = _extract(shards, work / "targets", 1, device, workers=count)
        rates.setdefault(count, []).append(report.views_per_second)
    print(json.dumps({"views_per_second": rates, "two workers ÷ one": sum(rates[2]) / sum(rates[1])}))


def _nothing(number: int) -> int:
    return number


def dask_overhead(work: Path, shards: int) -> None:
    """Seconds of a shard in this process, through a scheduler, and of a task that does nothing."""
    images = make_tiny(work, shards)
    views = ViewSettings(count=1)

    def run(**extract: Any) -> float:
        targets = work / "targets-tiny"
        shutil.rmtree(targets, ignore_errors=True)
        began = time.perf_counter()
        extract_targets(
            images,
            targets,
            Params(views=views, extract=ExtractSettings(device="cpu", threads=1, teacher_threads=1, **extract)),
        )
        return time.perf_counter() - began

    result = {"in this process": run() / shards}
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        result["one worker"] = run(scheduler=cluster.scheduler_address) / shards
        began = time.perf_counter()
        client.gather(client.map(_nothing, range(shards), pure=False))
        result["a task that does nothing"] = (time.perf_counter() - began) / shards
    result["overhead"] = result["one worker"] - result["in this process"]
    print(json.dumps({name: f"{1000 * seconds:.2f} ms a shard" for name, seconds in result.items()}))


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--only", choices=("end-to-end", "workers", "dask"))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=4, help="of the bare forward pass, before and after")
    parser.add_argument("--shards", type=int, default=2000)
    arguments = parser.parse_args()
    work: Path = arguments.work
    if arguments.only in (None, "end-to-end"):
        end_to_end(work, arguments.photos, arguments.images, arguments.views, arguments.device, arguments.batches)
    if arguments.only in (None, "workers"):
        workers(work, arguments.photos, min(arguments.images, 1000), arguments.device)
    if arguments.only in (None, "dask"):
        dask_overhead(work, arguments.shards)


if __name__ == "__main__":
    main()
