"""Scores of a segmentation from its confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def confusion(predicted_HW: Tensor, truth_HW: Tensor, classes: int) -> Tensor:
    """(G, G) int64 counts: rows are the truth, columns what was predicted; pixels of truth -1 are left out."""
    # By hand: torchmetrics takes two seconds to import, and scikit-learn's looks each pixel up by its name.
    known_HW = truth_HW >= 0
    pairs = truth_HW[known_HW] * classes + predicted_HW[known_HW]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def _shares(confusion_GG: Tensor) -> tuple[Tensor, Tensor]:
    counts_GG = confusion_GG.to(torch.float64)
    right_G, truth_G = counts_GG.diagonal(), counts_GG.sum(dim=1)
    return right_G / (truth_G + counts_GG.sum(dim=0) - right_G), right_G / truth_G


def segmentation_scores(confusion_GG: Tensor) -> dict[str, float]:
    """mIoU, aAcc and mAcc, 0..1; means are over the classes for which the score is defined.

    Raises:
        ZeroDivisionError: not one pixel has a class.

    Source: as MMSegmentation's IoUMetric: a class that neither occurs nor is predicted is left out of mIoU.
    """
    iou_G, acc_G = _shares(confusion_GG)
    right = float(confusion_GG.diagonal().sum()) / float(confusion_GG.sum())
    return {"miou": float(iou_G.nanmean()), "aacc": right, "macc": float(acc_G.nanmean())}


def class_scores(confusion_GG: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class: name, iou, acc and pixels; a score that is not defined is None."""
    rows = zip(names, *(share_G.tolist() for share_G in _shares(confusion_GG)), confusion_GG.sum(dim=1), strict=True)

    def known(share: float) -> float | None:
        return None if math.isnan(share) else share

    return [
        {"name": name, "iou": known(iou), "acc": known(acc), "pixels": int(pixels)} for name, iou, acc, pixels in rows
    ]
