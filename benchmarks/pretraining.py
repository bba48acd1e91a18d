"""Stage 2: its step against a plain one, online against offline targets, its loader, its waiting and its memory.

    python -m benchmarks.pretraining WORK PHOTOS [--only step|online|loader|wait|memory ...] [--device cpu]

The student is ViT-B/16 at 224 pixels with the recipe's decoder (512 wide, 8 blocks, 16 heads) unless a part says
otherwise. Stores hold real views of PHOTOS at 224 pixels (JPEG, quality 95) and drawn int8 codes of 197 x 512.

step    forward, backward and AdamW of one batch: ours and `benchmarks.plain` take turns from the same weights, after it
        is checked that both give the same loss. With --compile and --precision on a GPU.
online  the same step with the teacher in it, ours and plain, against the offline step; all take turns.
loader  views read, checksummed, decoded and batched, and webdataset that decodes the originals with the usual random
        crop, flip and conversion to a tensor, pinned to one core and on all. The last column is the thread that puts
        batches together: it alone cannot be multiplied by `pretrain.threads`.
wait    the share of the time that `pretrain` waits for data, over a store that is in the page cache.
memory  resident memory of `pretrain` over 2,000 steps, on 10 and on 200 shards, each in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.plain import PlainStudent, PlainTeacher
from benchmarks.reading import _block, _header, _records
from milan_pipe.attention import choose_attention
from milan_pipe.config.images import ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.devices import resolve_precision
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.views import draw_view, encode_jpeg, render_view
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Batch, Loader
from milan_pipe.pretraining.objective import Objective, build_objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.student.masking import mask_noise
from milan_pipe.targets.schema import BLOCK_SAMPLES, SourceShard, StoreHeader
from milan_pipe.targets.store import TargetStoreWriter, open_targets
from milan_pipe.teacher.clip import load_teacher, load_teacher_of
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.step import Stepper

SIZE, SHUFFLE_BLOCKS = 224, 16
BASE = StudentSettings(model="vit_base_patch16_224", image_size=224, patch_size=16, width=768, depth=12, heads=12)
SMALL = StudentSettings(model="vit_tiny_patch16_224", image_size=224, patch_size=16, width=32, depth=1, heads=1)
DECODER = DecoderSettings(width=512, depth=8, heads=16)
SMALL_DECODER = DecoderSettings(width=32, depth=1, heads=1)


def originals(photos: Path) -> list[bytes]:
    """The files of all photographs."""
    kinds = (".jpg", ".jpeg")
    return [path.read_bytes() for path in sorted(photos.rglob("*")) if path.suffix.lower() in kinds]


def jpegs(work: Path, photos: Path) -> list[bytes]:
    """One view of each photograph at 224 pixels."""
    folder = work / "views-224"
    if not folder.is_dir():
        beside = folder.with_suffix(".making")
        beside.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(originals(photos)):
            image_HWC = decode_pixels(data)
            view = draw_view(ViewSettings(), str(number), 0, *image_HWC.shape[:2])
            (beside / f"{number:05d}.jpg").write_bytes(encode_jpeg(render_view(image_HWC, view, SIZE), 95))
        beside.rename(folder)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def make_store(work: Path, photos: Path, shards: int, samples: int) -> Path:
    """A zarr store of `shards` shards with `samples` samples each."""
    root = work / f"store-{shards}x{samples}"
    if root.is_dir():
        return root
    views = itertools.cycle(jpegs(work, photos))
    beside = root.with_suffix(".making")
    writer = TargetStoreWriter(beside, _header("zarr", 0, shards))
    for shard in range(shards):
        opened = writer.open_shard(f"{shard:06d}")
        for start in range(0, samples, BLOCK_SAMPLES):
            records = _records(min(BLOCK_SAMPLES, samples - start), shard * samples + start)
            block = _block(records, shard * samples + start)
            total = block.attention_KNL.astype(np.float32).sum(-1, keepdims=True)
            block.attention_KNL[:] = (block.attention_KNL / total).astype(np.float16)
            block.jpegs[:] = [[next(views) for _ in range(len(records))]]
            opened.append(block)
        opened.commit(SourceShard(name=f"{shard:06d}.tar", bytes=0, sha256="", samples=samples, bad=()))
    writer.finish()
    return beside.rename(root)


def plan_of(store: Path, batch_size: int) -> tuple[Any, BatchPlan]:
    reader = open_targets(store)
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    order = EpochOrder(samples=samples, views=1, block=BLOCK_SAMPLES, shuffle_blocks=SHUFFLE_BLOCKS, seed=0)
    return reader, BatchPlan(order=order, batch_size=batch_size)


def one_batch(store: Path, size: int) -> tuple[StoreHeader, Batch]:
    reader, plan = plan_of(store, size)
    with Loader(reader, plan, threads=2, with_targets=True) as loader:
        return reader.header, next(loader.batches(0))


def objective_of(header: StoreHeader, device: torch.device, compiled: bool, teach: Any = None) -> Objective:
    return build_objective(
        header,
        Params(student=BASE, decoder=DECODER, pretrain=PretrainSettings(compile=compiled)),
        device,
        teach,
    )


def step_of(objective: Objective, device: torch.device, precision: Any) -> Callable[[Batch], float]:
    """One step of pretraining's own stepper, which ends when the device has done it."""
    choose_attention(objective, device, getattr(torch, resolve_precision(precision, device)))
    optimiser = build_adamw(objective.student, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    stepper = Stepper[Batch](
        optimiser,
        objective,
        split=lambda batch: batch.parts(1),
        device=device,
        precision=precision,
    )
    return lambda batch: float(stepper(batch, 0, 1e-4).loss)


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def bench_step(work: Path, photos: Path, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    precision = resolve_precision(options.precision, device)
    store = make_store(work, photos, 2, 512)
    print("| batch | plain, s | ours, s | plain ÷ ours | ours, images/s | loss, plain | loss, ours |")
    print("|---|---|---|---|---|---|---|")
    for size in options.batches:
        header, batch = one_batch(store, size)
        ours, plain = (objective_of(header, device, options.compile) for _ in range(2))
        plain.student = PlainStudent(objective_of(header, device, False).student)  # type: ignore[assignment]
        losses = [each(batch, 0).item() for each in (plain, ours)]
        if abs(losses[0] - losses[1]) > 1e-4 * losses[0]:
            raise SystemExit(f"plain and ours differ: {losses}")
        fast, slow = step_of(ours, device, precision), step_of(plain, device, precision)
        seconds = in_turns({"plain": lambda: slow(batch), "ours": lambda: fast(batch)}, options.rounds)  # noqa: B023
        ratio = seconds["plain"] / seconds["ours"]
        print(
            f"| {size} | {seconds['plain']:.2f} | {seconds['ours']:.2f} | {ratio:.2f} | {size / seconds['ours']:.2f} | "
            f"{losses[0]:.6f} | {losses[1]:.6f} |",
            flush=True,
        )


def bench_online(work: Path, photos: Path, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    precision = resolve_precision(options.precision, device)
    header, batch = one_batch(make_store(work, photos, 2, 512), options.batches[0])
    print("| teacher | batch | offline, s | online, s | online ÷ offline | plain online, s | plain online ÷ offline |")
    print("|---|---|---|---|---|---|---|")
    for name, side in (("ViT-B-16", 224), ("ViT-L-14", 196)):
        settings = TeacherSettings(model=name, pretrained="random", image_size=side)
        teacher = load_teacher(settings, device, grid=(14, 14))
        own = header.model_copy(update={"teacher": teacher.info})
        teach = load_teacher_of(own, settings, device, "the benchmark").online_targets
        plain_teacher = PlainTeacher(teacher.visual)
        offline = objective_of(header, device, options.compile)
        online = objective_of(own, device, options.compile, teach)

        def plain_teach(pixels_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            images = torch.nn.functional.interpolate(pixels_BHWC.permute(0, 3, 1, 2).float() / 255, side)  # noqa: B023
            features, row = plain_teacher(images)  # noqa: B023
            return features.clone(), row.clone()

        plain = objective_of(own, device, False, plain_teach)
        plain.student = PlainStudent(plain.student)  # type: ignore[assignment]
        steps = {
            what: step_of(each, device, precision)
            for what, each in (("offline", offline), ("online", online), ("plain", plain))
        }
        seconds = in_turns({what: (lambda step=step: step(batch)) for what, step in steps.items()}, options.rounds)
        base = seconds["offline"]
        print(
            f"| {name} at {side} | {len(batch.keys)} | {base:.2f} | {seconds['online']:.2f} | "
            f"{seconds['online'] / base:.2f} | {seconds['plain']:.2f} | {seconds['plain'] / base:.2f} |",
            flush=True,
        )


def loader_rate(store: Path, threads: int, images: int) -> dict[str, float]:
    """Images a second of our loader, after a first batch, and CPU of the one thread that puts batches together."""
    reader, plan = plan_of(store, 64)
    noise = partial(mask_noise, 0, patches=reader.header.patches)
    with Loader(reader, plan, threads=threads, with_targets=True, draw_noise=noise) as loader:
        batches = loader.batches(0, stop=10**6)
        next(batches)
        began, began_cpu, done = time.perf_counter(), time.thread_time(), 0
        while done < images:
            done += len(next(batches).keys)
        seconds, cpu = time.perf_counter() - began, time.thread_time() - began_cpu
        return {"images_per_second": done / seconds, "microseconds": 1e6 * cpu / done}


def webdataset_rate(tar: Path, workers: int, images: int) -> float:
    """Images a second of webdataset on originals: PIL, torchvision's usual transforms, batches of 64."""
    import webdataset as wds
    from torchvision import transforms

    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (0.2, 1), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    data = wds.WebDataset([str(tar)] * 1000, shardshuffle=False, workersplitter=lambda urls: urls)
    data = data.decode("pilrgb").to_tuple("jpg").map_tuple(crop).batched(64)
    loader = iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers))
    for _ in range(max(workers, 1)):
        next(loader)
    began, done = time.perf_counter(), 0
    while done < images:
        done += len(next(loader)[0])
    return done / (time.perf_counter() - began)


def bench_loader(work: Path, photos: Path, options: argparse.Namespace) -> None:
    store = make_store(work, photos, 4, 1024)
    tar = work / "originals.tar"
    if not tar.is_file():
        with tarfile.open(tar, "w") as opened:
            for number, data in enumerate(originals(photos)):
                info = tarfile.TarInfo(f"{number:05d}.jpg")
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    if options.pinned:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
        rates = {"ours": loader_rate(store, 1, 16_384), "webdataset": webdataset_rate(tar, 0, 1_024)}
        print(json.dumps(rates))
        return
    words = [sys.executable, "-m", "benchmarks.pretraining", str(work), str(photos), "--only", "loader", "--pinned"]
    one = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    every = {"ours": loader_rate(store, cores, 32_768), "webdataset": webdataset_rate(tar, cores, 2_048)}
    print(
        "| cores | ours, images/s | webdataset on originals, images/s | ÷ | ours, CPU of the one thread, µs an image |"
    )
    print("|---|---|---|---|---|")
    for count, rates in ((1, one), (cores, every)):
        ours, theirs = rates["ours"], rates["webdataset"]
        cells = [f"{ours['images_per_second']:.0f}", f"{theirs:.0f}", f"{ours['images_per_second'] / theirs:.1f}"]
        print(f"| {count} | {' | '.join(cells)} | {ours['microseconds']:.1f} |")


def bench_wait(work: Path, photos: Path, options: argparse.Namespace) -> None:
    store = make_store(work, photos, 2, 512)
    run = work / f"run-wait-{time.time_ns()}"
    report = pretrain(
        store,
        run,
        Params(
            student=BASE,
            decoder=DECODER,
            pretrain=PretrainSettings(
                epochs=1, batch_size=64, lr=1.5e-4, device=options.device, precision=options.precision, log_every=1
            ),
        ),
    )
    print(
        f"{report.steps} steps of 64, {report.images_per_second:.2f} images/s, data_wait {100 * report.data_wait:.2f} %"
    )


def bench_memory(work: Path, photos: Path, options: argparse.Namespace) -> None:
    if options.pinned:
        reported: list[TrainProgress] = []
        shards = options.shards
        store = make_store(work, photos, shards, 100)
        epochs = -(-2_000 // (shards * 100 // 32))
        pretrain(
            store,
            work / f"run-memory-{time.time_ns()}",
            Params(
                student=SMALL,
                decoder=SMALL_DECODER,
                # Groups of 400 samples, so that the smaller store has more than one of them too.
                pretrain=PretrainSettings(epochs=epochs, batch_size=32, shuffle_blocks=4, device="cpu", log_every=50),
            ),
            on_progress=reported.append,
        )
        print(json.dumps({now.step: now.memory for now in reported}))
        return
    steps = (100, 500, 1_000, 1_500, 2_000)
    print("| shards | samples | " + " | ".join(f"step {step}" for step in steps) + " | most |")
    print("|---" * (len(steps) + 3) + "|")
    for shards in (10, 200):
        make_store(work, photos, shards, 100)
        words = [sys.executable, "-m", "benchmarks.pretraining", str(work), str(photos), "--only", "memory", "--pinned"]
        done = subprocess.run([*words, "--shards", str(shards)], check=True, stdout=subprocess.PIPE, text=True)
        memory = {int(step): value / 1e6 for step, value in json.loads(done.stdout).items()}
        most = max(value for step, value in memory.items() if step <= steps[-1])
        cells = " | ".join(f"{memory[step]:.0f} MB" for step in steps)
        print(f"| {shards} | {shards * 100:,} | {cells} | {most:.0f} MB |", flush=True)


PARTS = {
    "step": bench_step,
    "online": bench_online,
    "loader": bench_loader,
    "wait": bench_wait,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[8, 16, 64], help="batch sizes; online takes the first"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pinned", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=10, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        PARTS[name](options.work, options.photos, options)


if __name__ == "__main__":
    main()
