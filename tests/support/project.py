"""A small project of scenes: its settings and where its parts lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from milan_pipe.config.params import Params

SETTINGS = [
    "prepare.seed=2",  # its few scenes are of all classes
    "prepare.train_scenes=48",
    "prepare.test_scenes=16",
    "prepare.samples_per_shard=24",
    "views.count=2",
    "student.width=32",
    "student.depth=2",
    "student.heads=2",
    "decoder.width=16",
    "decoder.depth=1",
    "pretrain.batch_size=16",
    "pretrain.epochs=2",
    "pretrain.log_every=1",
    "knn.neighbours=[1, 5]",
    "finetune.batch_size=16",
    "finetune.epochs=1",
    "finetune.train_fraction=1.0",
    "finetune.eval_every=1",
    "segment.steps=4",
    "segment.batch_size=4",
    "segment.eval_every=4",
    "segment.channels=8",
    "segment_probe.steps=4",
    # A weak penalty takes hundreds of iterations.
    "linear_probe.l2=[0.1, 1.0]",
]


def params_file(**more: dict[str, Any]) -> str:
    """The same settings as a `params.yaml`."""
    values: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        name, _, value = setting.partition("=")
        section, _, key = name.partition(".")
        values.setdefault(section, {})[key] = yaml.safe_load(value)
    return yaml.safe_dump({**values, **more})


@dataclass(frozen=True)
class Project:
    root: Path
    params: Params
    images: tuple[str, str]
    targets: Path
    runs: tuple[Path, ...]
