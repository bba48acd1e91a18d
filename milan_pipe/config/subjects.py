"""What is evaluated: how commands name it, and what it is called in tables."""

from __future__ import annotations

RANDOM, TEACHER = "random", "teacher"
"""Given as a checkpoint: an untrained student, and the teacher."""

UNTRAINED, MAE, MASKFEAT, MILAN = "untrained", "MAE student", "MaskFeat student", "MILAN student"

BOUNDS = {RANDOM: UNTRAINED, TEACHER: "teacher"}

METHODS = {
    ("clip", "prompting", "semantic"): MILAN,
    ("pixels", "plain", "random"): MAE,
    ("hog", "plain", "random"): MASKFEAT,
}
"""What a student is called by its target, decoder and masks."""
