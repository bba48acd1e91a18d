"""Where the stages of dvc.yaml keep things."""

import json
from pathlib import Path
from typing import Any

from milan_pipe.config.subjects import BOUNDS, MAE, MILAN, RANDOM, TEACHER, UNTRAINED

TRAIN, TEST = "data/images/train-*.tar", "data/images/test-*.tar"
IMAGES, TARGETS = Path("data/images"), Path("data/targets")
RUN, MAE_RUN = Path("runs/demo"), Path("runs/mae")
TUNED, SEGMENTED, FEATURES = Path("runs/finetune"), Path("runs/segment"), Path("data/features")
METRICS, EVALUATIONS, REPORT = Path("metrics"), Path("evaluations"), Path("report.html")

STUDENTS = {RANDOM: UNTRAINED, str(MAE_RUN): MAE, str(RUN): MILAN}
SUBJECTS = {**STUDENTS, TEACHER: BOUNDS[TEACHER]}
"""What is evaluated, as the CHECKPOINT argument takes it, and its name in the table."""


def write_metrics(path: Path, values: dict[str, Any]) -> None:
    """Write a metrics file for DVC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
