"""What a GPU reaches, as OUT/gpu.json and OUT/gpu.md.

    python -m benchmarks.gpu OUT [--minutes 14] [--images 16000] [--views 8]
    python -m benchmarks.gpu OUT --quick --device cpu

On one card, with the package's own dependencies and `distributed`, and no network: teachers have random weights, images
are drawn, 500 x 375. Students are ViT-B/16 and ViT-L/16 at 224 pixels with the recipe's decoder. A step is forward,
backward and AdamW in bfloat16 on one batch in memory, one after another without waiting in between, as in a run; its
share of the matrix rate counts the products of the step that is not compiled. Rows come in the order of their weight;
what has not begun when the minutes are over is left out and said so, and a row that fails says why. --quick takes small
models, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.objectives import MILAN, OTHERS, with_objective_of
from benchmarks.plain import PlainStudent
from milan_pipe.attention import choose_attention
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.extraction.run import extract_targets
from milan_pipe.extraction.worker import process_count
from milan_pipe.loader.order import Block
from milan_pipe.loader.stream import Batch, read_batch
from milan_pipe.pretraining.objective import Objective, build_objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.targets.store import TargetStore, open_targets
from milan_pipe.teacher.clip import load_teacher, load_teacher_of
from milan_pipe.training.checkpoint import checkpoints_of, save_checkpoint
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.step import Stepper

SHARD_IMAGES, LOSS_STEPS = 1000, 50
DECODER = DecoderSettings(width=512, depth=8, heads=16)
STUDENTS = {
    "ViT-B/16": StudentSettings(
        model="vit_base_patch16_224", image_size=224, patch_size=16, width=768, depth=12, heads=12
    ),
    "ViT-L/16": StudentSettings(
        model="vit_large_patch16_224", image_size=224, patch_size=16, width=1024, depth=24, heads=16
    ),
}
TEACHERS = {
    "ViT-B-16": TeacherSettings(model="ViT-B-16", pretrained="random"),
    "ViT-L-14": TeacherSettings(model="ViT-L-14", pretrained="random", image_size=196),
}
QUICK_STUDENT = StudentSettings(image_size=64, patch_size=8, width=64, depth=2, heads=2)
Values = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what."""

    out: Path
    device: torch.device
    quick: bool
    images: int
    views: int

    @property
    def students(self) -> dict[str, StudentSettings]:
        return {"small": QUICK_STUDENT} if self.quick else STUDENTS

    @property
    def teachers(self) -> dict[str, TeacherSettings]:
        return {"demo": TeacherSettings()} if self.quick else TEACHERS

    @property
    def batches(self) -> tuple[int, ...]:
        return (16, 32) if self.quick else (256, 512, 1024)

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 6

    def params(self, student: StudentSettings | None = None, **pretraining: Any) -> Params:
        """Settings of a run of a student, the first by default, and of the extraction for it."""
        cores = len(os.sched_getaffinity(0))
        fixed = {"precision": "bfloat16", "device": str(self.device), "threads": cores, "checkpoint_minutes": None}
        recipe: Any = {**fixed, **pretraining}
        return Params(
            teacher=next(iter(self.teachers.values())),
            views=ViewSettings(count=self.views, scale=(0.2, 1)),
            student=student or next(iter(self.students.values())),
            decoder=DecoderSettings(width=32, depth=1, heads=2) if self.quick else DECODER,
            extract=ExtractSettings(batch_size=32 if self.quick else 256, device=str(self.device), workers="auto"),
            pretrain=PretrainSettings(**recipe),
        )

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, in a row of some of them; the median of three rows, after three calls that do not count."""
        found = []
        for _ in range(3):
            call()
        for _ in range(3):
            self.sync()
            began = time.perf_counter()
            for _ in range(self.rounds):
                call()
            self.sync()
            found.append((time.perf_counter() - began) / self.rounds)
        return median(found)

    @cached_property
    def matrix_rate(self) -> float:
        """Operations a second in a product of two bfloat16 matrices."""
        side = 1024 if self.quick else 8192
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: left @ right)

    @cached_property
    def shards(self) -> Path:
        """Image shards of smooth noise of a photograph's size, so that JPEG finds about as much in it."""
        folder = self.out / "images"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        files = []
        for _ in range(min(250, self.images)):
            coarse = Image.fromarray(rng.integers(0, 256, (47, 62, 3), np.uint8))
            data = io.BytesIO()
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            files.append(data.getvalue())
        for shard, start in enumerate(range(0, self.images, SHARD_IMAGES)):
            with tarfile.open(folder / f"images-{shard:06d}.tar", "w") as tar:
                for number in range(start, min(start + SHARD_IMAGES, self.images)):
                    info = tarfile.TarInfo(f"{number:06d}.jpg")
                    info.size = len(files[number % len(files)])
                    tar.addfile(info, io.BytesIO(files[number % len(files)]))
        return folder

    def bare(self, name: str) -> float:
        """Views a second of a teacher alone, at extraction's size of a batch."""
        params = self.params()
        teacher = load_teacher(self.teachers[name], self.device, grid=grid_of(params.student))
        size, batch = teacher.info.image_size, params.extract.batch_size
        pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=self.device)
        return batch / self.seconds(lambda: teacher(pixels))

    @cached_property
    def extraction(self) -> Values:
        """All of an extraction against its teacher alone, on the same number of views at a time."""
        targets = self.out / "targets"
        shutil.rmtree(targets, ignore_errors=True)
        params = self.params()
        seen: list[tuple[float, int]] = []
        report = extract_targets(
            self.shards, targets, params, on_progress=lambda now: seen.append((time.perf_counter(), now.views))
        )
        # Of its middle: processes take some 20 seconds to start, and the last shards do not use all of them.
        first, last = (next(at for at in seen if at[1] >= share * report.views) for share in (0.15, 0.85))
        rate, bare = (last[1] - first[1]) / (last[0] - first[0]), self.bare(next(iter(self.teachers)))
        return {
            "processes": process_count(params.extract),
            "views/s": rate,
            "bare teacher, views/s": bare,
            "extraction ÷ bare teacher": rate / bare,
            **{f"{phase}, s": seconds for phase, seconds in report.phases.items()},
            "in all, s": report.seconds,
        }

    @cached_property
    def store(self) -> TargetStore:
        """The targets that the extraction wrote."""
        assert self.extraction
        return open_targets(self.out / "targets")

    def batch(self, size: int) -> Batch:
        """Stored samples on the device, over and over."""
        count = min(128, self.store.samples(self.store.shards[0]))
        some = read_batch(self.store, Block(0, 0, 0, count))
        row_B = torch.arange(size) % count
        return Batch(
            keys=tuple(some.keys[row] for row in row_B.tolist()), **some.each(lambda values: values[row_B])
        ).to(self.device)

    def stepper(self, objective: Objective, precision: Any = "bfloat16") -> Stepper[Batch]:
        """Pretraining's own steps."""
        choose_attention(objective, self.device, getattr(torch, precision))
        return Stepper(
            build_adamw(objective.student, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05),
            objective,
            split=lambda batch: batch.parts(1),
            device=self.device,
            precision=precision,
        )

    def objective(
        self, student: StudentSettings, *, compiled: bool = False, header: Any = None, teach: Any = None
    ) -> Any:
        """A fresh student with its loss."""
        return build_objective(header or self.store.header, self.params(student, compile=compiled), self.device, teach)

    def step_seconds(self, objective: Objective, batch: Batch) -> float:
        step = self.stepper(objective)
        return self.seconds(lambda: step(batch, 0, 1e-4))


def step(bench: Bench, name: str, size: int, compiled: bool) -> Values:
    """One kind of step."""
    student, batch = bench.students[name], bench.batch(size)
    plain = bench.stepper(bench.objective(student))
    with FlopCounterMode(display=False) as counter:
        plain(batch, 0, 1e-4)
    del plain
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = bench.step_seconds(bench.objective(student, compiled=compiled), batch)
    found = {
        "images/s": size / seconds,
        "share of the matrix rate, %": 100 * counter.get_total_flops() / seconds / bench.matrix_rate,
    }
    if bench.device.type == "cuda":
        found["peak memory, GiB"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
    return found


def published(bench: Bench) -> Values:
    """The published structure's step ÷ ours, neither compiled."""
    name, student = next(iter(bench.students.items()))
    batch = bench.batch(bench.batches[0])
    theirs = bench.objective(student)
    theirs.student = PlainStudent(theirs.student)
    seconds = bench.step_seconds(theirs, batch), bench.step_seconds(bench.objective(student), batch)
    return {"student": name, "batch": len(batch.keys), "published ÷ ours": seconds[0] / seconds[1]}


def objectives(bench: Bench) -> Values:
    """Each objective's step ÷ MILAN's, neither compiled."""
    student, batch = next(iter(bench.students.values())), bench.batch(bench.batches[0])
    seconds = {}
    for recipe in (MILAN, *OTHERS):
        params = with_objective_of(recipe, bench.params(student))
        seconds[recipe] = bench.step_seconds(build_objective(bench.store.header, params, bench.device), batch)
    return {"batch": len(batch.keys), **{f"{name} ÷ MILAN": seconds[name] / seconds[MILAN] for name in OTHERS}}


def online(bench: Bench, name: str) -> Values:
    """The step with the teacher in it ÷ the step on stored targets."""
    settings, student = bench.teachers[name], next(iter(bench.students.values()))
    compiled = bench.device.type == "cuda"
    loaded = load_teacher(settings, bench.device, grid=bench.store.header.teacher.grid)
    header: StoreHeader = bench.store.header.model_copy(update={"teacher": loaded.info})
    teach = load_teacher_of(header, settings, bench.device, "the benchmark").online_targets
    batch = bench.batch(bench.batches[0])
    offline = bench.step_seconds(bench.objective(student, compiled=compiled), batch)
    with_teacher = bench.objective(student, compiled=compiled, header=header, teach=teach)
    ratio = bench.step_seconds(with_teacher, batch) / offline
    return {"batch": len(batch.keys), "online ÷ offline": ratio, "bare teacher, views/s": bench.bare(name)}


def _run(bench: Bench, run: str, stop: int | None = None, **recipe: Any) -> list[TrainProgress]:
    class StopError(Exception):
        pass

    seen: list[TrainProgress] = []

    def on_progress(now: TrainProgress) -> None:
        seen.append(now)
        if now.step == stop:
            raise StopError

    with suppress(StopError):
        pretrain(bench.out / "targets", bench.out / run, bench.params(**recipe), on_progress=on_progress)
    return seen


def waiting(bench: Bench) -> Values:
    """Real pretraining on the real store: the share of the time that it waits, over its last two thirds."""
    assert bench.extraction
    size, epochs, workers = bench.batches[-2], 4 if bench.quick else 12, 1 if bench.quick else 4
    shutil.rmtree(bench.out / "run", ignore_errors=True)
    fed = {"workers": workers, "canonical_streams": workers, "threads": 1, "log_every": 2 if bench.quick else 10}
    seen = _run(bench, "run", batch_size=size, epochs=epochs, compile=bench.device.type == "cuda", **fed)
    first, last = seen[len(seen) // 3], seen[-1]
    seconds = last.seconds - first.seconds
    return {
        "batch": size,
        "workers": workers,
        "data_wait, %": 100 * (last.data_wait * last.seconds - first.data_wait * first.seconds) / seconds,
        "images/s": size * (last.step - first.step) / seconds,
    }


def checkpoint(bench: Bench) -> Values:
    """A checkpoint of student, decoder and optimiser, to OUT."""
    objective = bench.objective(next(iter(bench.students.values())))
    weights = objective.student.state_dict()
    folder = bench.out / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    parts = {
        name: {key: value.cpu() for key, value in weights.items()} for name in ("student", "mean", "mean of squares")
    }
    save_checkpoint(folder, 1, parts, {"finished": False})
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in checkpoints_of(folder)[0].iterdir())
    return {"s": seconds, "GB": size / 1e9, "GB/s": size / 1e9 / seconds}


def precisions(bench: Bench) -> Values:
    """Losses of 50 steps on one batch, in each type."""
    student, batch = next(iter(bench.students.values())), bench.batch(min(bench.batches[0], 64))
    curves = {}
    for precision in ("float32", "bfloat16", "float16"):
        step = bench.stepper(bench.objective(student), precision)
        curves[precision] = [float(step(batch, 0, 1e-4).loss) for _ in range(5 if bench.quick else LOSS_STEPS)]
    reference = curves["float32"]
    apart = {
        f"{name}, farthest from float32": max(abs(a - b) for a, b in zip(curve, reference, strict=True))
        for name, curve in curves.items()
        if name != "float32"
    }
    return {"first loss": reference[0], "last loss": reference[-1], **apart, "curves": curves}


def resume(bench: Bench) -> Values:
    """A run that is broken off and goes on, against one that is not."""
    assert bench.extraction
    size = bench.batches[-1]
    epochs = max(1, 12 * size // bench.images)
    recipe = {"batch_size": size, "epochs": epochs, "checkpoint_every": 2, "log_every": 1, "threads": 4}
    for run in ("whole", "broken"):
        shutil.rmtree(bench.out / run, ignore_errors=True)
    whole = [now.loss for now in _run(bench, "whole", **recipe)]
    _run(bench, "broken", stop=5, **recipe)
    rest = [now.loss for now in _run(bench, "broken", **recipe)]
    expected = whole[-len(rest) :]
    return {"steps": len(rest), "farthest apart": max(abs(a - b) for a, b in zip(rest, expected, strict=True))}


def rows_of(bench: Bench) -> dict[str, tuple[Callable[[], Values], str]]:
    """What to measure by name, with the goal, in the order of weight."""
    rows: dict[str, tuple[Callable[[], Values], str]] = {
        "extraction": (lambda: bench.extraction, "÷ bare teacher 0.95 with 16 cores"),
        "waiting for data": (partial(waiting, bench), "2 %"),
    }
    students, teachers, cuda = list(bench.students), list(bench.teachers), bench.device.type == "cuda"

    def add_step(name: str, size: int, compiled: bool) -> None:
        title = f"step, {name}, batch {size}, {'compiled' if compiled else 'eager'}"
        goal = "5,000 images/s, 40 %" if name == "ViT-B/16" and compiled and size >= 512 else ""
        rows.setdefault(title, (partial(step, bench, name, size, compiled), goal))

    for size in bench.batches:
        add_step(students[0], size, cuda)
    for name in students:
        for compiled in (cuda, False):
            add_step(name, bench.batches[-2], compiled)
    rows["objectives"] = (partial(objectives, bench), "")
    for name in teachers:
        rows[f"online, {name}"] = (partial(online, bench, name), "1.5" if name == "ViT-B-16" else "")
    rows["published structure"] = (partial(published, bench), "")
    rows["losses by precision"] = (partial(precisions, bench), "")
    rows["checkpoint"] = (partial(checkpoint, bench), "")
    rows["resume"] = (partial(resume, bench), "")
    for name in students:
        for compiled in (cuda, False):
            for size in bench.batches:
                add_step(name, size, compiled)
    return rows


def _told(values: Values) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if name != "curves"
    )


def main() -> int:
    """Measure, and write after each row, so that nothing is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    began, device = time.monotonic(), torch.device(options.device)
    bench = Bench(
        options.out,
        device,
        options.quick,
        128 if options.quick else options.images,
        2 if options.quick else options.views,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = {"card": card, "torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    report: dict[str, Any] = {**machine, "rows": {}}
    lines = [
        f"{card}, torch {machine['torch']}, {machine['cores']} cores",
        "",
        "| what | measured | goal |",
        "|---|---|---|",
    ]
    failed = 0
    rows = {"bfloat16 matrix product": (lambda: {"TFLOP/s": bench.matrix_rate / 1e12}, ""), **rows_of(bench)}
    for name, (measure, goal) in rows.items():
        if time.monotonic() - began > 60 * options.minutes:
            values: Values = {"left out": "no time left"}
        else:
            try:
                values = measure()
            # Each row stands for itself: what one fails of is its result.
            except Exception as error:
                failed += 1
                values = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report["rows"][name] = {**values, "goal": goal}
        lines.append(f"| {name} | {_told(values)} | {goal} |")
        print(lines[-1], flush=True)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
