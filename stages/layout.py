"""Where the stages of dvc.yaml keep things."""

from pathlib import Path

TRAIN, TEST = "data/images/train-*.tar", "data/images/test-*.tar"
IMAGES, TARGETS = Path("data/images"), Path("data/targets")
RUN = Path("runs/demo")
METRICS = Path("metrics")

SUBJECTS = {"random": "random initialisation", str(RUN): "MILAN student", "teacher": "teacher (upper bound)"}
"""What is evaluated, as the CHECKPOINT argument takes it, and its name in the table."""
