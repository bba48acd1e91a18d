"""What labels frozen patch features: a linear map that is trained on them, and the nearest patches.

N windows of W x W pixels, each of L patches, h x w in raster order, of D values; G classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.evaluation import SegmentProbeSettings
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.batches import StepPlan
from milan_pipe.evaluation.masks import pixel_losses
from milan_pipe.random_bits import permutation, seed_of
from milan_pipe.student.encoder import Grid
from milan_pipe.training.optim import polynomial_lr

_CHUNK_VALUES = 2**24
"""Similarities that are held at a time: 64 MiB of float32."""

PatchHead = Callable[[Tensor], Tensor]
"""(B, L, D) features to (B, G, h, w) scores of the classes."""


@dataclass(frozen=True, kw_only=True)
class PatchFeatures:
    """Features of N windows, (L, D) float16 each, and their masks, (W, W) int16 each, -1 no class; on the CPU."""

    features: Sequence[Tensor]
    masks: Sequence[Tensor]
    grid: Grid


def as_maps(rows_BLG: Tensor, grid: Grid) -> Tensor:
    """(B, G, h, w) of (B, L, G)."""
    return rows_BLG.view(-1, *grid, rows_BLG.shape[-1]).permute(0, 3, 1, 2)


def to_pixels(maps_BGhw: Tensor, height: int, width: int) -> Tensor:
    """(B, G, `height`, `width`), bilinear."""
    return F.interpolate(maps_BGhw, size=(height, width), mode="bilinear", align_corners=False)


def class_counts(mask_HW: Tensor, grid: Grid, classes: int) -> Tensor:
    """(L, G): pixels of each class in each patch."""
    row_H, column_W = (torch.arange(side) * count // side for side, count in zip(mask_HW.shape, grid, strict=True))
    patch_HW = row_H[:, None] * grid[1] + column_W
    known_HW = mask_HW >= 0
    pairs = patch_HW[known_HW] * classes + mask_HW[known_HW].long()
    return torch.bincount(pairs, minlength=math.prod(grid) * classes).view(-1, classes)


class LinearHead(nn.Module):
    """A batch norm and a linear map of each patch: a 1 x 1 convolution of the map of patches.

    Source: DINOv2, arXiv 2304.07193, section 7.4, with the first weights of MMSegmentation's heads.
    """

    def __init__(self, width: int, classes: int, grid: Grid, seed: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches_BLD: Tensor) -> Tensor:
        """As `PatchHead`: logits."""
        rows_BLD = self.norm(patches_BLD.flatten(0, 1)).view_as(patches_BLD)
        return as_maps(self.linear(rows_BLD), self.grid)


def fit_linear_head(
    train: PatchFeatures,
    classes: int,
    settings: SegmentProbeSettings,
    device: torch.device,
    on_step: Callable[[int, int], None],
) -> LinearHead:
    """Train a linear head, whose logits are resized to the masks; returned as it is evaluated, on `device`.

    Batches are a function of `settings.seed` and the step. Minimised is the mean cross-entropy of the pixels that have
    a class.
    """
    width, seed = train.features[0].shape[1], seed_of(settings.seed, "head") % 2**63
    head = LinearHead(width, classes, train.grid, seed).to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    count = len(train.features)
    plan = StepPlan(
        number_N=np.arange(count), batch_size=min(settings.batch_size, count), seed=settings.seed, rank=0, ranks=1
    )
    for step, requests in enumerate(plan.batches(0, settings.steps)):
        features_BLD, mask_BWW = (
            torch.stack([values[request.number] for request in requests]).to(device)
            for values in (train.features, train.masks)
        )
        logits_BGWW = to_pixels(head(features_BLD.float()), *mask_BWW.shape[1:])
        loss = pixel_losses(logits_BGWW, mask_BWW.long()) / (mask_BWW >= 0).sum().clamp(min=1)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            group["lr"] = polynomial_lr(
                step,
                steps=settings.steps,
                warmup_steps=settings.warmup_steps,
                peak=settings.lr,
                power=settings.power,
            )
        optimiser.step()
        optimiser.zero_grad()
        on_step(step + 1, settings.steps)
    return head.eval()


class NeighbourHead:
    """Patches take the classes of their nearest neighbours in a bank: a mean weighed by softmax(cosine / temperature).

    The bank has patches of TRAIN that hold a labelled pixel, and of each the shares of the classes among those pixels:
    all, or as many as `settings.bank`, drawn by `settings.seed`.

    Raises:
        SettingError: the bank has fewer patches than `settings.neighbours`.

    Source: Hummingbird, arXiv 2306.01667, section 3.
    """

    def __init__(
        self, train: PatchFeatures, classes: int, settings: SegmentProbeSettings, device: torch.device
    ) -> None:
        self._grid, patches = train.grid, math.prod(train.grid)
        labelled = torch.cat([class_counts(mask_WW, train.grid, classes).any(dim=1) for mask_WW in train.masks])
        number_K = labelled.nonzero()[:, 0].numpy()
        number_K = np.sort(number_K[permutation(len(number_K), settings.seed, "bank")[: settings.bank]])
        if len(number_K) < settings.neighbours:
            raise SettingError(
                f"segment_probe.neighbours asks for {settings.neighbours}, the bank has {len(number_K)} patches; give "
                "a smaller number, or a larger segment_probe.bank"
            )
        window_K, patch_K = number_K // patches, number_K % patches
        features, shares = [], []
        for window in np.unique(window_K).tolist():
            chosen = torch.from_numpy(patch_K[window_K == window])
            counts = class_counts(train.masks[window], train.grid, classes)[chosen].float()
            features.append(train.features[window][chosen].float())
            shares.append(counts / counts.sum(dim=1, keepdim=True))
        self._bank_KD = F.normalize(torch.cat(features), dim=1).to(device)
        self._share_KG = torch.cat(shares).to(device)
        self._neighbours, self._temperature = settings.neighbours, settings.temperature

    def __call__(self, patches_BLD: Tensor) -> Tensor:
        """As `PatchHead`: shares, which sum to 1."""
        rows_PD = patches_BLD.flatten(0, 1)
        most = max(1, _CHUNK_VALUES // len(self._bank_KD))
        found = [self._shares(rows_PD[start : start + most]) for start in range(0, len(rows_PD), most)]
        return as_maps(torch.cat(found), self._grid)

    def _shares(self, rows_PD: Tensor) -> Tensor:
        cosine_PN, nearest_PN = (F.normalize(rows_PD, dim=1) @ self._bank_KD.T).topk(self._neighbours, dim=1)
        weight_PN = (cosine_PN / self._temperature).softmax(dim=1)
        return F.embedding_bag(nearest_PN, self._share_KG, per_sample_weights=weight_PN, mode="sum")
