"""Frozen image towers as teachers: raw pixels to features and importance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, ShapeError
from milan_pipe.pretrained.source import MeanStd
from milan_pipe.targets.schema import StoreHeader, TeacherInfo, require_same_header
from milan_pipe.teacher.checkpoint import weights_sha256
from milan_pipe.teacher.family import TowerFamily
from milan_pipe.teacher.normalization import normalization_of
from milan_pipe.teacher.source import find_source
from milan_pipe.teacher.tower import choose_input_size, family_of

FAULTS = (
    "features that are not finite",
    "a token whose feature is all zeros",
    "attention that is not finite",
    "negative attention",
    "attention that is zero for every patch",
)
"""What makes a view's targets useless, in the order of `TeacherOutput.faults_BF`."""


@dataclass(frozen=True)
class TeacherOutput:
    """What `TowerFamily.outputs` gives, as float32."""

    features_BST: Tensor
    importance_BL: Tensor

    def share_BL(self) -> Tensor:
        """Importance as stores hold it, before rounding: each row sums to 1."""
        return self.importance_BL / self.importance_BL.sum(dim=1, keepdim=True)

    def faults_BF(self) -> Tensor:
        """Which of `FAULTS` each view has: bool (B, F) where the features are, computed without waiting for them."""
        largest_BS = self.features_BST.abs().amax(dim=-1)
        total_B = self.importance_BL.sum(dim=1)
        faults = (
            ~largest_BS.isfinite().all(dim=1),
            (largest_BS == 0).any(dim=1),
            ~total_B.isfinite(),
            (self.importance_BL < 0).any(dim=1),
            total_B == 0,
        )
        return torch.stack(faults, dim=1)


def require_sound(faults_BF: Tensor, names: Sequence[str]) -> None:
    """Refuse output with a fault; waits for the device.

    Raises:
        DataError: the first of `names` with a fault, what it is, and what to do.
    """
    faulty = faults_BF.nonzero()
    if len(faulty):
        row, fault = faulty[0].tolist()
        raise DataError(
            f"{names[row]}: the teacher gave {FAULTS[fault]}; check its checkpoint, or set teacher.precision to float32"
        )


class Teacher(nn.Module):
    """A frozen image tower that takes raw pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, family: TowerFamily, info: TeacherInfo, normalization: MeanStd) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.family = family
        self.info = info
        self._outputs = family.outputs
        self.register_buffer("mean", torch.tensor(normalization.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(normalization.std).view(1, 3, 1, 1) * 255)

    def compile_tower(self) -> Teacher:
        """Compile the tower with its outputs at its next use; returns itself."""
        # Shapes may change: a shard ends with a smaller batch.
        self._outputs = torch.compile(self.family.outputs)
        return self

    @torch.inference_mode()
    def forward(self, pixels_BHWC: Tensor) -> TeacherOutput:
        """Features and importance of uint8 pixels.

        Args:
            pixels_BHWC: (B, H, W, 3) uint8 RGB of any size; resized (bicubic, antialiased) where it is not the tower's.

        Raises:
            ShapeError: not (B, H, W, 3) uint8.
        """
        if pixels_BHWC.ndim != 4 or pixels_BHWC.shape[-1] != 3 or pixels_BHWC.dtype != torch.uint8:
            found = f"{tuple(pixels_BHWC.shape)} {pixels_BHWC.dtype}"
            raise ShapeError(f"expected (B, H, W, 3) uint8 pixels, found {found}")
        pixels = pixels_BHWC.to(self.mean.device).permute(0, 3, 1, 2).float()
        side = self.info.image_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)
        normalised = (pixels - self.mean) / self.std
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.info.precision == "bfloat16"):
            features, importance = self._outputs(self.visual, normalised)
        return TeacherOutput(features.float(), importance.float())

    def online_targets(self, pixels_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Features and importance as extraction stores them; where it would refuse them, features are NaN.

        Marked and not raised: to read the faults would wait for the device in every step.
        """
        output = self(pixels_BHWC)
        faulty_B11 = output.faults_BF().any(dim=1)[:, None, None]
        return output.features_BST.masked_fill(faulty_B11, math.nan), output.share_BL().half()


def resolve_teacher_precision(precision: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a CUDA device and float32 elsewhere."""
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    return automatic if precision == "auto" else precision


def load_teacher(
    settings: TeacherSettings, device: str | torch.device = "cpu", *, grid: tuple[int, int] | None = None
) -> Teacher:
    """Load a frozen teacher.

    Args:
        device: with `precision: auto` it decides the precision too.
        grid: the student's patches, down and across; see `choose_input_size`. Position embeddings are interpolated.

    Raises:
        SettingError, MissingError, DataError: as `find_source`; the tower cannot serve, or a size does not fit it.
        MismatchError: a checkpoint of another model.
    """
    source = find_source(settings.model, settings.pretrained)
    visual = source.untrained()
    family = family_of(visual, settings.model)
    if source.checkpoint is not None:
        source.load(visual, source.checkpoint())
    # Over the weights as trained: the same teacher at another input size keeps its identity.
    digest = weights_sha256(visual)
    side = choose_input_size(family.sizes(visual), settings.model, settings.image_size, grid)
    if family.sizes(visual).image_size != (side, side):
        family.resize(visual, side)
    sizes = family.sizes(visual)
    published = source.checkpoint is not None and source.file is None
    normalization = normalization_of(settings.normalization, source, visual)
    info = TeacherInfo(
        **settings.header_fields(),
        weights_sha256=digest,
        normalization=settings.normalization,
        precision=resolve_teacher_precision(settings.precision, torch.device(device)),
        image_size=side,
        grid=sizes.grid,
        width=sizes.width,
        # Of random weights nobody has a licence; of a file, its owner knows.
        license=source.license() if published else None,
        source=source.origin if published else None,
        structure_sha256=sha256_of(json.dumps([source.structure, *normalization]).encode()),
    )
    return Teacher(visual, family, info, normalization).to(device)


def load_teacher_of(
    header: StoreHeader, settings: TeacherSettings | None, device: str | torch.device, where: object
) -> Teacher:
    """Load the teacher that wrote a store, with the store's grid; without `settings`, by the store's header.

    Raises:
        SettingError, MissingError, DataError: as `load_teacher`.
        MismatchError: it is not the one that wrote the store; `where` names the store.
    """
    if settings is None:
        stored = header.teacher.model_dump(include=set(TeacherSettings.model_fields))
        settings = TeacherSettings.parse(stored, f"{where}, teacher")
    teacher = load_teacher(settings, device, grid=header.teacher.grid)
    require_same_header(header, header.model_copy(update={"teacher": teacher.info}), where)
    return teacher
