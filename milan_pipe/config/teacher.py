"""Settings of the teacher, and of training the bundled one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from milan_pipe.config.base import Settings

DEMO = "demo"
RANDOM = "random"
FOLDER = "local-dir"


def portable_name(model: str) -> str:
    """A model's name as another machine understands it: a folder goes by its last part alone."""
    prefix, _, folder = model.partition(":")
    return f"{prefix}:{Path(os.path.normpath(Path(folder).absolute())).name}" if prefix == FOLDER else model


class TeacherSettings(Settings):
    """Which CLIP or SigLIP image tower gives the targets."""

    model: str = Field(
        DEMO, description="`demo` (ships with the package), an open_clip name, `hf-hub:ORG/NAME` or `local-dir:PATH`"
    )
    pretrained: str | None = Field(
        None,
        description="open_clip tag, path of a local checkpoint, or `random` (untrained weights, for measurements); "
        "none: the weights of `demo`, of the repository or of the folder",
    )
    normalization: Literal["clip", "imagenet"] = Field(
        "clip", description="clip: the teacher's own mean and std; imagenet: as the published code feeds it"
    )
    image_size: int | None = Field(
        None, ge=1, description="input side in pixels; none: where the teacher has as many patches as the student"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass; auto: bfloat16 autocast on CUDA, float32 elsewhere"
    )

    def header_fields(self) -> dict[str, str | None]:
        """Model and weights as a store's header says them: without folders, as the digest identifies the weights."""
        return {"model": portable_name(self.model), "pretrained": self.pretrained and Path(self.pretrained).name}


class DemoTeacherSettings(Settings):
    """How the bundled teacher is trained, by contrast of images and captions."""

    seed: int = Field(1_000_003, ge=0, description="scenes of this seed are trained on; use none that students see")
    scenes: int = Field(200_000, ge=1, description="scenes rendered once and kept in memory, 12 KB each")
    steps: int = Field(2800, ge=1, description="of the optimiser")
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0, description="AdamW: embeddings, norms, projections")
    muon_lr: float = Field(0.02, gt=0, description="Muon: the matrices inside the blocks")
    weight_decay: float = Field(0.02, ge=0)
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.4, gt=0, le=1, description="share of the steps over which lr falls to 0, at the end")
    keep_word: float = Field(0.5, gt=0, le=1, description="chance to mention size, colour and background, each")
    shift: int = Field(6, ge=0, description="images are moved by up to this many pixels, edges mirrored")
    test_scenes: int = Field(2000, ge=1)
    evaluate_every: int = Field(200, ge=1)
    compile: bool = Field(True, description="compile the training step with torch.compile")
