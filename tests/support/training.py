"""Runs that are broken off: by an error of the listener, and by SIGKILL."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from support import processes

from milan_pipe.training.recorder import TrainProgress


class StopAtError(Exception):
    pass


def stop_at(step: int) -> Any:
    def raise_at_step(now: TrainProgress) -> None:
        if now.step >= step:
            raise StopAtError

    return raise_at_step


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
