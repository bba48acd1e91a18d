"""A process that has run out of open files says so: what it could not read is not called damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import processes

READ = """
import resource, sys
from contextlib import suppress
from pathlib import Path
from milan_pipe.errors import MilanError
from milan_pipe.interop.timm_layout import load_student
from milan_pipe.pretraining.bad_batch import replay
from milan_pipe.training.metrics import cut_metrics
from milan_pipe.evaluation.features import kept_features
from milan_pipe.weights_file import read_weights

folder = Path(sys.argv[1])
readers = {
    "weights": lambda: read_weights(folder / "model.safetensors"),
    "torch": lambda: read_weights(folder / "a.pth"),
    "features": lambda: kept_features(folder / "kept", {}, None),
    "bad batch": lambda: replay(folder / "model.safetensors"),
    "metrics": lambda: cut_metrics(folder / "metrics", 1),
    "student": lambda: load_student(folder),
}
for read in readers.values():  # everything that they import is open once
    with suppress(MilanError, TypeError):
        read()
files = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with suppress(OSError):
    while True:
        files.append(open("/dev/null"))
for name, read in readers.items():
    try:
        read()
    except MilanError as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


def test_every_reader_says_what_ran_out(tmp_path: Path) -> None:
    save_file({"features": torch.ones(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "f.safetensors")
    kept = tmp_path / "kept" / "0899eaeee76dcfdd3c97f3afd61ce311.safetensors"  # SHA-256 of {"version": 2}
    kept.parent.mkdir()
    (tmp_path / "f.safetensors").rename(kept)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "loss.tsv").write_text("step\tloss\n1\t2\n")
    words = [sys.executable, "-c", READ, str(tmp_path)]
    done = processes.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(errors) == ["weights", "torch", "features", "bad batch", "metrics", "student"]
    assert all(line.startswith("StoreError: ") and "`ulimit -n`" in line for line in errors.values()), errors
    assert (tmp_path / "metrics" / "loss.tsv").is_file()
