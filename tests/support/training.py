"""Runs that are broken off: by an error of the listener, and by SIGKILL; a batch to step on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import processes
from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.loader.stream import Batch
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint
from milan_pipe.training.recorder import TrainProgress


def stored_batch(count: int = 10) -> Batch:
    """As of a store of 32 pixels, 16 patches and features 12 wide, codec int8."""
    rng = np.random.default_rng(3)
    return Batch(
        keys=tuple(f"k{row}" for row in range(count)),
        pixels_BHWC=torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)),
        code_BST=torch.from_numpy(rng.integers(-90, 99, (count, 17, 12)).astype(np.int8)),
        scale_BS=torch.from_numpy(rng.random((count, 17)).astype(np.float16) + 0.5),
        attention_BL=torch.from_numpy(rng.random((count, 16)).astype(np.float16)),
    )


class StopAtError(Exception):
    pass


def stop_at(step: int) -> Any:
    def raise_at_step(now: TrainProgress) -> None:
        if now.step >= step:
            raise StopAtError

    return raise_at_step


BATCH = 16


def student_of(head: StoreHeader) -> StudentSettings:
    """The smallest student for a store."""
    side = head.views.size // head.teacher.grid[0]
    return StudentSettings(image_size=head.views.size, patch_size=side, width=16, depth=2, heads=2)


SMALL_DECODER = DecoderSettings(width=16, depth=1, heads=2)


def small_params(head: StoreHeader, **recipe: Any) -> Params:
    """`student_of` with `SMALL_DECODER`, on the CPU; `recipe` is of pretraining."""
    recipe = {"device": "cpu", **recipe}
    return Params(student=student_of(head), decoder=SMALL_DECODER, pretrain=PretrainSettings(**recipe))


def small_settings(head: StoreHeader) -> dict[str, Any]:
    """The same student and decoder as settings by name."""
    parts = {"student": student_of(head), "decoder": SMALL_DECODER}
    return {
        f"{section}.{name}": value
        for section, settings in parts.items()
        for name, value in settings.model_dump(exclude_unset=True).items()
    }


def pretrain_command(store: Path, head: StoreHeader, run: Path, epochs: int, *more: str) -> list[str]:
    """The words that start `pretrain` of `student_of`, with a checkpoint every 11 steps; `more` are settings."""
    settings = {
        **small_settings(head),
        "pretrain.batch_size": BATCH,
        "pretrain.shuffle_blocks": 1,
        "pretrain.epochs": epochs,
        "pretrain.device": "cpu",
        "pretrain.checkpoint_every": 11,
    }
    given = [*(f"{name}={value}" for name, value in settings.items()), *more]
    flags = [word for setting in given for word in ("--set", setting)]
    return [sys.executable, "-m", "milan_pipe", "pretrain", str(store), str(run), *flags]


def weights_of(run: Path) -> dict[str, Tensor]:
    """Student and decoder of a run's last checkpoint, by name."""
    opened = open_checkpoint(run)
    return {**opened.weights("student"), **opened.weights("decoder")}


def same_run(left: Path, right: Path) -> bool:
    """Whether two runs of pretraining have the same losses and weights, to the bit."""
    ours, theirs = weights_of(left), weights_of(right)
    curves = [(run / "metrics" / "plots" / "metrics" / "train" / "loss.tsv").read_text() for run in (left, right)]
    return curves[0] == curves[1] and all(torch.equal(ours[name], theirs[name]) for name in ours)


def killed_until_done(words: list[str], run: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        before = checkpoints_of(run)[-1:]
        with processes.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
            while process.poll() is None and checkpoints_of(run)[-1:] == before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        assert process.returncode == -signal.SIGKILL, "the run was finished before it could be killed"
    processes.run(words, check=True, capture_output=True, env=environment)
