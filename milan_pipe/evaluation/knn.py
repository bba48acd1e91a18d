"""Weighted nearest neighbours on frozen features."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from milan_pipe.config.evaluation import KnnSettings
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.features import LabelledFeatures, check_same_task

_CHUNK_VALUES = 2**24
"""Similarities (or votes) that are held at a time: 64 MiB of float32."""


def knn_accuracy(train: LabelledFeatures, test: LabelledFeatures, settings: KnnSettings) -> dict[int, float]:
    """Share of test images whose nearest train images vote for the right class, by rising number of neighbours.

    Similarity is the cosine in float32, over all pairs; votes are summed in float64, and of equal classes the lowest
    index wins. Numbers of neighbours above the number of train images are left out.

    Raises:
        SettingError: all of `settings.neighbours` are above the number of train images.
        ShapeError, DataError: as `check_same_task`.

    Source: arXiv 1805.01978, section 3.4, as arXiv 2104.14294 (DINO) evaluates.
    """
    # By hand: scikit-learn's classifier holds all pairs, and searches again for each number of neighbours.
    check_same_task(train, test)
    samples = len(train.label_N)
    counts = sorted({count for count in settings.neighbours if count <= samples})
    if not counts:
        raise SettingError(
            f"knn.neighbours asks for {min(settings.neighbours)} and more, the train set has {samples} images; "
            "give a smaller number"
        )
    # Sorted, so that the first of equal votes is the lowest class.
    class_G, train_class_N = torch.unique(train.label_N, return_inverse=True)
    train_NF = F.normalize(train.features_NF, dim=1)
    rows = max(1, _CHUNK_VALUES // max(samples, len(class_G)))
    right = dict.fromkeys(counts, 0)
    for start in range(0, len(test.label_N), rows):
        features_BF, label_B = test.features_NF[start : start + rows], test.label_N[start : start + rows]
        cosine_BK, nearest_BK = (F.normalize(features_BF, dim=1) @ train_NF.T).topk(counts[-1], dim=1)
        # Relative to the nearest neighbour: the same winner, and no overflow at a low temperature.
        weight_BK = ((cosine_BK.double() - cosine_BK[:, :1].double()) / settings.temperature).exp()
        class_BK = train_class_N[nearest_BK]
        votes_BG = torch.zeros(len(label_B), len(class_G), dtype=torch.float64)
        for first, count in zip([0, *counts[:-1]], counts, strict=True):
            votes_BG.scatter_add_(1, class_BK[:, first:count], weight_BK[:, first:count])
            right[count] += int((class_G[votes_BG.argmax(dim=1)] == label_B).sum())
    return {count: hits / len(test.label_N) for count, hits in right.items()}
