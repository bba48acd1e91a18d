"""What a GPU reaches, as a Markdown table: the step, extraction, waiting for data, online against offline targets.

    python -m benchmarks.gpu WORK [--batch 512] [--images 4000] [--views 8] [--device cuda] > table.md
    python -m benchmarks.gpu WORK --device cpu --quick

The student is ViT-B/16 at 224 pixels with the recipe's decoder, the teacher ViT-B-16 with random weights; images are
drawn, 500 x 375. A step is forward, backward and AdamW in bfloat16, compiled, of one batch in memory; its share of the
matrix rate counts the products of the step that is not compiled. Waiting is what `pretrain` reports over the last three
quarters of a run on the store that was extracted. --quick takes small models, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.extraction.run import extract_targets
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Batch, Loader
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.targets.schema import BLOCK_SAMPLES
from milan_pipe.targets.store import open_targets
from milan_pipe.teacher.clip import load_teacher, load_teacher_of
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.step import Stepper

SHARD_IMAGES, DISTINCT = 250, 250


@dataclass(frozen=True)
class Job:
    """What is measured, and on what."""

    work: Path
    device: torch.device
    batch: int
    images: int
    views: int
    rounds: int
    matrix: int
    epochs: int
    params: Params


def job_of(options: argparse.Namespace) -> Job:
    quick, device = options.quick, torch.device(options.device)
    size = 64 if quick else 224
    student = StudentSettings(image_size=64, patch_size=8, width=64, depth=2, heads=2)
    decoder = DecoderSettings(width=32, depth=1, heads=2)
    if not quick:
        student = StudentSettings(
            model="vit_base_patch16_224", image_size=size, patch_size=16, width=768, depth=12, heads=12
        )
        decoder = DecoderSettings(width=512, depth=8, heads=16)
    batch = 32 if quick else options.batch
    epochs = 2 if quick else 8
    cores = len(os.sched_getaffinity(0))
    compiled = not (quick and device.type == "cpu")
    recipe = {"batch_size": batch, "epochs": epochs, "precision": "bfloat16", "compile": compiled, "log_every": 1}
    params = Params(
        teacher=TeacherSettings() if quick else TeacherSettings(model="ViT-B-16", pretrained="random"),
        views=ViewSettings(count=2 if quick else options.views, scale=(0.2, 1)),
        student=student,
        decoder=decoder,
        extract=ExtractSettings(batch_size=32 if quick else 256, device=options.device),
        pretrain=PretrainSettings(device=options.device, threads=cores, checkpoint_minutes=None, **recipe),
    )
    return Job(
        work=options.work,
        device=device,
        batch=batch,
        images=128 if quick else options.images,
        views=params.views.count,
        rounds=3 if quick else 20,
        matrix=1024 if quick else 8192,
        epochs=epochs,
        params=params,
    )


def draw_images(job: Job) -> Path:
    """Shards of smooth noise of a photograph's size, so that JPEG finds about as much in it."""
    folder = job.work / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = []
    for _ in range(min(DISTINCT, job.images)):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 62, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        data = io.BytesIO()
        coarse.save(data, "JPEG", quality=90)
        files.append(data.getvalue())
    for shard, start in enumerate(range(0, job.images, SHARD_IMAGES)):
        with tarfile.open(folder / f"images-{shard:06d}.tar", "w") as tar:
            for number in range(start, min(start + SHARD_IMAGES, job.images)):
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(files[number % len(files)])
                tar.addfile(info, io.BytesIO(files[number % len(files)]))
    return folder


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of some rounds, after three that do not count."""
    found = []
    for number in range(rounds + 3):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 2:
            found.append(time.perf_counter() - began)
    return median(found)


def matrix_rate(job: Job) -> float:
    """Operations a second in a product of two bfloat16 matrices."""
    left, right = (torch.randn(job.matrix, job.matrix, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * job.matrix**3 / seconds_of(lambda: left @ right, job.device, job.rounds)


def stepper_of(job: Job, header: Any, teach: Any, compiled: bool) -> Stepper[Batch]:
    recipe = job.params.pretrain.model_copy(update={"compile": compiled})
    objective = build_objective(header, job.params.model_copy(update={"pretrain": recipe}), job.device, teach)
    return Stepper(
        build_adamw(objective.student, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05),
        objective,
        split=lambda batch: batch.parts(1),
        device=job.device,
        precision="bfloat16",
    )


def one_batch(job: Job, reader: Any) -> Batch:
    order = EpochOrder(
        samples=tuple(reader.samples(shard) for shard in reader.shards),
        views=job.views,
        block=BLOCK_SAMPLES,
        shuffle_blocks=1,
        seed=0,
    )
    with Loader(reader, BatchPlan(order=order, batch_size=job.batch), threads=2, with_targets=True) as loader:
        return next(loader.batches(0))


def data_wait(job: Job, targets: Path) -> float:
    """Share of the time that `pretrain` waits for batches, once it is under way."""
    seen: list[TrainProgress] = []
    run = job.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    pretrain(targets, run, job.params, on_progress=seen.append)
    first, last = seen[len(seen) // 4], seen[-1]
    return (last.data_wait * last.seconds - first.data_wait * first.seconds) / (last.seconds - first.seconds)


def measure(job: Job) -> list[tuple[str, str, str]]:
    """What, what it came to, and what it is to reach."""
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU"
    rows = [("device", f"{name}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores", "")]
    rate = matrix_rate(job)
    rows.append(("bfloat16 matrix product", f"{rate / 1e12:.1f} TFLOP/s", ""))

    images, targets = draw_images(job), job.work / "targets"
    shutil.rmtree(targets, ignore_errors=True)
    report = extract_targets(images, targets, job.params)
    reader = open_targets(targets)
    size, batch_size = job.params.student.image_size, job.params.extract.batch_size
    teacher = load_teacher(job.params.teacher, job.device, grid=reader.header.teacher.grid)
    pixels = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8)
    bare = batch_size / seconds_of(lambda: teacher(pixels).features_BST.cpu(), job.device, job.rounds)
    rows.append(("extraction, views/s", f"{report.views_per_second:.0f}", ""))
    rows.append(("bare teacher, views/s", f"{bare:.0f}", ""))
    rows.append(("extraction ÷ bare teacher", f"{report.views_per_second / bare:.2f}", "0.95"))

    batch = one_batch(job, reader)
    with FlopCounterMode(display=False) as counter:
        stepper_of(job, reader.header, None, False)(batch, 0, 1e-4)
    compiled = job.params.pretrain.compile
    offline = stepper_of(job, reader.header, None, compiled)
    seconds = seconds_of(lambda: offline(batch, 0, 1e-4), job.device, job.rounds)
    count = len(batch.keys)
    rows.append((f"step, batch {count}, images/s", f"{count / seconds:.0f}", "5,000"))
    share = counter.get_total_flops() / seconds / rate
    rows.append(("step's share of the matrix rate", f"{100 * share:.0f} %", "40 %"))
    teach = load_teacher_of(reader.header, job.params.teacher, job.device, targets).online_targets
    online = stepper_of(job, reader.header, teach, compiled)
    ratio = seconds_of(lambda: online(batch, 0, 1e-4), job.device, job.rounds) / seconds
    rows.append(("online ÷ offline step", f"{ratio:.2f}", "1.5"))
    rows.append(("pretrain waits for data", f"{100 * data_wait(job, targets):.1f} %", "2 %"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    rows = measure(job_of(parser.parse_args()))
    print("| what | measured | goal |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
