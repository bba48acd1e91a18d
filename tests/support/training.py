"""Runs that are broken off: by an error of the listener, and by SIGKILL; a batch to step on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import processes
from torch import Tensor

from milan_pipe.loader.stream import Batch
from milan_pipe.training.checkpoint import open_checkpoint
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
        process = processes.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        before = len(list((run / "checkpoints").glob("step-*"))) if run.is_dir() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((run / "checkpoints").glob("step-*"))) > min(before, 1):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    processes.run(words, check=True, capture_output=True, env=environment)
