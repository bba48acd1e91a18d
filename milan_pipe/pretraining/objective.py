"""A batch as it is stored becomes a loss. Shape suffixes are explained in `milan_pipe.pretraining`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import MismatchError
from milan_pipe.loader.stream import Batch
from milan_pipe.student.encoder import grid_of
from milan_pipe.student.hog import hog_target, hog_width
from milan_pipe.student.loss import feature_loss, masked_loss, pixel_target
from milan_pipe.student.masking import MaskSplit, draw_split, mask_noise, visible_count
from milan_pipe.student.model import MaskedStudent, build_student
from milan_pipe.student.pixels import normalise
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import StoreHeader

Teach = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels (B, H, W, 3) uint8 to features (B, S, T) and importance (B, L), float16 as in a store."""


@dataclass(frozen=True)
class Prediction:
    """Prediction and target; the target is (B, S, T), of pixels and HOG (B, L, T)."""

    split: MaskSplit
    prediction_BST: Tensor
    target: Tensor


class Objective(nn.Module):
    """Student, masking and loss: a stored batch becomes a scalar, all of it on the training device.

    Args:
        teach: makes targets of the pixels; None takes the stored ones.
    """

    def __init__(self, student: MaskedStudent, header: StoreHeader, params: Params, teach: Teach | None = None) -> None:
        super().__init__()
        self.student, self.codec, self.teach = student, codec_of(header.codec), teach
        self.masking, self.target, self.patch_size = params.masking, params.target, _patch_size(params)
        self.patches = header.patches
        self.visible = visible_count(header.patches, params.masking.ratio)

    def draw_noise(self, epoch: int, keys: Sequence[str]) -> Tensor:
        """Noise of the samples' masks in an epoch, (B, L), on the CPU."""
        return mask_noise(self.masking.seed, epoch, keys, self.patches)

    def predict(self, batch: Batch, epoch: int) -> Prediction:
        """Prediction and target of one batch, with the masks of an epoch."""
        device = next(self.student.parameters()).device
        if batch.noise_BL is None:
            batch = replace(batch, noise_BL=self.draw_noise(epoch, batch.keys))
        batch = batch.to(device)
        assert batch.noise_BL is not None
        images_BCHW = normalise(batch.pixels_BHWC)
        taught = self.teach(batch.pixels_BHWC) if self.teach is not None else None
        attention_BL = batch.attention_BL if taught is None else taught[1]
        importance_BL = attention_BL.float() if self.masking.kind == "semantic" else None
        split = draw_split(importance_BL, batch.noise_BL, self.visible)
        prediction_BST = self.student(images_BCHW, split)
        if self.target != "clip":
            own_target = pixel_target if self.target == "pixels" else hog_target
            return Prediction(split, prediction_BST, own_target(images_BCHW, self.patch_size))
        if taught is not None:
            return Prediction(split, prediction_BST, taught[0])
        return Prediction(split, prediction_BST, self.codec.decode(batch.code_BST, batch.scale_BS))

    def forward(self, batch: Batch, epoch: int) -> Tensor:
        """Loss of one batch. A sample's mask depends on (seed, epoch, key), not on its neighbours."""
        found = self.predict(batch, epoch)
        if self.target != "clip":
            return masked_loss(found.prediction_BST, found.target, found.split)
        return feature_loss(found.prediction_BST, found.target)

    @torch.no_grad()
    def cosine(self, batch: Batch, epoch: int) -> tuple[MaskSplit, Tensor]:
        """The masks of a batch, and the cosine (B, L) between prediction and target of each patch."""
        found = self.predict(batch, epoch)
        target_BLT = found.target[:, 1:] if self.target == "clip" else found.target
        return found.split, F.cosine_similarity(found.prediction_BST[:, 1:].float(), target_BLT.float(), dim=-1)


def require_fit(header: StoreHeader, student: StudentSettings, where: object) -> None:
    """Refuse targets that do not fit this student.

    Raises:
        MismatchError: view size or grid differ; says both.
    """
    if header.views.size != student.image_size:
        raise MismatchError(
            f"{where} has views of {header.views.size} pixels, the student reads {student.image_size}; set "
            f"student.image_size={header.views.size}, or extract with student.image_size={student.image_size}"
        )
    theirs, ours = header.teacher.grid, grid_of(student)
    if tuple(theirs) != tuple(ours):
        raise MismatchError(
            f"{where} has a grid of {theirs[0]} x {theirs[1]} patches (teacher {header.teacher.model!r} at "
            f"{header.teacher.image_size} pixels), the student has {ours[0]} x {ours[1]}; change student.patch_size, "
            "or extract with another teacher.image_size"
        )


def build_objective(header: StoreHeader, params: Params, device: torch.device, teach: Teach | None = None) -> Objective:
    """A fresh student with its loss, on its device.

    Raises:
        SettingError: there is no such student or decoder.
    """
    settings, patch_size = params.pretrain, _patch_size(params)
    widths = {"clip": header.teacher.width, "pixels": 3 * patch_size**2, "hog": hog_width(patch_size)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_student(params.student, params.decoder, widths[params.target]).to(device)
    model.checkpoint_activations(settings.checkpoint_activations)
    if settings.compile:
        # What FSDP gathers one at a time is compiled one at a time.
        for module in model.units() if settings.parallel == "fsdp" else [model]:
            module.compile(dynamic=False)
    return Objective(model, header, params, teach)


def _patch_size(params: Params) -> int:
    return params.student.image_size // grid_of(params.student)[0]
