"""Where the stages of dvc.yaml keep things."""

from pathlib import Path

TRAIN, TEST = "data/images/train-*.tar", "data/images/test-*.tar"
IMAGES, TARGETS = Path("data/images"), Path("data/targets")
RUN, MAE_RUN = Path("runs/demo"), Path("runs/mae")
TUNED, SEGMENTED, FEATURES = Path("runs/finetune"), Path("runs/segment"), Path("data/features")
METRICS = Path("metrics")

STUDENTS = {"random": "random initialisation", str(MAE_RUN): "MAE student", str(RUN): "MILAN student"}
SUBJECTS = {**STUDENTS, "teacher": "teacher (upper bound)"}
"""What is evaluated, as the CHECKPOINT argument takes it, and its name in the table."""
