"""Where the stages of dvc.yaml keep things."""

import json
from pathlib import Path
from typing import Any

TRAIN, TEST = "data/images/train-*.tar", "data/images/test-*.tar"
IMAGES, TARGETS = Path("data/images"), Path("data/targets")
RUN, MAE_RUN = Path("runs/demo"), Path("runs/mae")
TUNED, SEGMENTED, FEATURES = Path("runs/finetune"), Path("runs/segment"), Path("data/features")
METRICS, EVALUATIONS, REPORT = Path("metrics"), Path("evaluations"), Path("report.html")

STUDENTS = {"random": "untrained", str(MAE_RUN): "MAE student", str(RUN): "MILAN student"}
SUBJECTS = {**STUDENTS, "teacher": "teacher"}
"""What is evaluated, as the CHECKPOINT argument takes it, and its name in the table."""


def write_metrics(path: Path, values: dict[str, Any]) -> None:
    """Write a metrics file for DVC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
