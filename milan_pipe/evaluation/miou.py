"""Scores of a segmentation from its confusion matrix. Shape suffixes are explained in `milan_pipe.evaluation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

_IGNORED = -1


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class; both scores are None where it neither is there nor was predicted (iou), or is not there (acc)."""

    name: str
    iou: float | None
    acc: float | None
    pixels: int


def confusion(predicted_HW: Tensor, truth_HW: Tensor, classes: int) -> Tensor:
    """(G, G) int64 counts: rows are the truth, columns what was predicted; pixels of truth -1 are left out."""
    counted: Tensor = multiclass_confusion_matrix(
        predicted_HW.flatten(), truth_HW.flatten(), num_classes=classes, ignore_index=_IGNORED
    )
    return counted.long()


def segmentation_scores(confusion_GG: Tensor) -> dict[str, float]:
    """mIoU, aAcc and mAcc, 0..1; means are over the classes for which the score is defined.

    Raises:
        ZeroDivisionError: not one pixel has a class.

    Source: as MMSegmentation's IoUMetric: a class that is neither there nor predicted is left out of mIoU.
    """
    right_G, union_G, there_G = _parts(confusion_GG)
    iou_G, acc_G = right_G / union_G, right_G / there_G
    return {
        "miou": float(iou_G.nanmean()),
        "aacc": float(right_G.sum()) / float(confusion_GG.sum()),
        "macc": float(acc_G.nanmean()),
    }


def _parts(confusion_GG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts_GG = confusion_GG.to(torch.float64)
    right_G, there_G = counts_GG.diagonal(), counts_GG.sum(dim=1)
    return right_G, there_G + counts_GG.sum(dim=0) - right_G, there_G


def class_scores(confusion_GG: Tensor, names: Sequence[str]) -> list[ClassScore]:
    """IoU and accuracy of each class."""
    right_G, union_G, there_G = _parts(confusion_GG)
    return [
        ClassScore(
            name=name,
            iou=float(right / union) if union else None,
            acc=float(right / there) if there else None,
            pixels=int(there),
        )
        for name, right, union, there in zip(names, right_G, union_G, there_G, strict=True)
    ]
