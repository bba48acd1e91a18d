"""The command line: reads settings, shows progress, prints what a function of the same name returns.

Each command returns its report as well, for the scripts in `stages/`. It is annotated as `Any`, because typer evaluates
annotations and the report classes live behind imports that take seconds.
"""

from __future__ import annotations

# In the order in which `--help` lists their commands.
from milan_pipe.cli.base import app, main

from milan_pipe.cli.images import plan, prepare, recipes  # isort: skip
from milan_pipe.cli.targets import convert_targets, extract_targets, train_clip, verify_targets  # isort: skip
from milan_pipe.cli.pretraining import pretrain, replay  # isort: skip
from milan_pipe.cli.evaluation import finetune, knn, linear_probe, segment, segment_probe  # isort: skip
from milan_pipe.cli.embeddings import embed  # isort: skip
from milan_pipe.cli.reports import inspect_student, inspect_targets, report  # isort: skip
from milan_pipe.cli.demo import demo  # isort: skip
from milan_pipe.cli.doctor import doctor  # isort: skip
from milan_pipe.cli.interop import export, import_published, push  # isort: skip

__all__ = [
    "app", "convert_targets", "demo", "doctor", "embed", "export", "extract_targets", "finetune", "import_published",
    "inspect_student", "inspect_targets", "knn", "linear_probe", "main", "plan", "prepare", "pretrain", "push",
    "recipes", "replay", "report", "segment", "segment_probe", "train_clip", "verify_targets",
]  # fmt: skip
