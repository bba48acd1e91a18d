"""What is evaluated: how commands name it, and what it is called in tables."""

from __future__ import annotations

RANDOM, TEACHER = "random", "teacher"
"""Given as a checkpoint: an untrained student, and the teacher."""

UNTRAINED, MAE, MASKFEAT, MILAN = "untrained", "MAE student", "MaskFeat student", "MILAN student"
UNMASKED, MR_MAE, MASKDISTILL = "unmasked-teacher student", "MR-MAE student", "MaskDistill student"

BOUNDS = {RANDOM: UNTRAINED, TEACHER: "teacher"}

METHODS = {
    ("clip", "prompting", "semantic"): MILAN,
    ("pixels", "plain", "random"): MAE,
    ("hog", "plain", "random"): MASKFEAT,
    ("clip-visible", "none", "semantic"): UNMASKED,
    ("clip-visible+pixels", "plain", "random"): MR_MAE,
    ("clip-masked", "plain", "block"): MASKDISTILL,
}
"""What a student is called by its target, decoder and masks."""
