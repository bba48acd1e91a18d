"""Settings of the teacher, and of training the bundled one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from milan_pipe.config.base import Settings

DEMO = "demo"
RANDOM = "random"
FOLDER, HUB = "local-dir", "hf-hub"
TIMM = "timm:"


def portable_name(model: str) -> str:
    """A model's name as another machine understands it: a folder goes by its last part alone."""
    if model.startswith(TIMM):
        return TIMM + portable_name(model.removeprefix(TIMM))
    prefix, _, folder = model.partition(":")
    return f"{prefix}:{Path(os.path.normpath(Path(folder).absolute())).name}" if prefix == FOLDER else model


class TeacherSettings(Settings):
    """Which image tower gives the targets."""

    model: str = Field(
        DEMO,
        description="`demo` (ships with the package), a name of open_clip, `hf-hub:ORG/NAME` or `local-dir:PATH`; of "
        "timm `timm:NAME`, `timm:hf-hub:ORG/NAME` or `timm:local-dir:PATH`",
    )
    pretrained: str | None = Field(
        None,
        description="tag of open_clip or timm, path of a local checkpoint, or `random` (untrained weights, for "
        "measurements); none: the weights of `demo`, of the repository, of the folder, or timm's choice",
    )
    normalization: Literal["clip", "imagenet"] = Field(
        "clip", description="clip: the teacher's own mean and std; imagenet: as the published code feeds it"
    )
    image_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="input side in pixels; none: where the teacher has as many patches as the student",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass; auto: bfloat16 autocast on CUDA, float32 elsewhere"
    )

    def header_fields(self) -> dict[str, str | None]:
        """Model and weights as a store's header says them: without folders, as the digest identifies the weights."""
        return {"model": portable_name(self.model), "pretrained": self.pretrained and Path(self.pretrained).name}


class ClipSettings(Settings):
    """How `train-clip` trains a small CLIP; the defaults made the bundled teacher."""

    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, captions and moves")
    image_size: int = Field(64, ge=1, description="height and width of the input in pixels")
    patch_size: int = Field(8, ge=1, description="side of a patch in pixels; must divide `image_size`")
    width: int = Field(128, ge=1, description="of the image tower")
    layers: int = Field(5, ge=2, description="blocks of the image tower")
    head_width: int = Field(32, ge=1, description="of both towers; must divide their widths")
    embed_dim: int = Field(128, ge=1, description="width of the features that both towers give")
    text_width: int = Field(128, ge=1, description="of the text tower")
    text_layers: int = Field(2, ge=1, description="blocks of the text tower")
    context_length: int = Field(20, ge=2, description="most words of a caption, and one to end it")
    vocabulary: int = Field(20_000, ge=1, description="most words that are known, the most frequent ones")
    prompts: tuple[str, ...] = Field(("a {}",), min_length=1, description="captions of a class, `{}` for its name")
    patch_dropout: float = Field(0.5, ge=0, lt=1, description="share of the patches that a step leaves out")
    attended: float = Field(0.2, ge=0, description="weight of telling captions by the patches that CLS attends to")
    local: float = Field(0.8, ge=0, description="weight of the same, patches as the first block leaves them")
    words: float = Field(20.0, ge=0, description="weight of telling the words of captions by single patches")
    peak: float = Field(0.14, ge=0, description="weight of keeping the CLS attention on a patch low")
    peak_from: float = Field(4.5, ge=1, description="attention on a patch that costs nothing, in means of its image")
    shift: int = Field(6, ge=0, description="images are moved by up to this many pixels, edges mirrored")
    flip: float = Field(0.0, ge=0, le=1, description="probability of a mirrored image; 0 where captions know the sides")
    steps: int = Field(700, ge=1, description="of the optimiser")
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0, description="AdamW: embeddings, norms, projections")
    muon_lr: float = Field(0.02, gt=0, description="Muon: the matrices inside the blocks")
    weight_decay: float = Field(0.02, ge=0)
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.4, gt=0, le=1, description="share of the steps over which lr falls to 0, at the end")
    evaluate_every: int = Field(200, ge=1, description="steps between two looks at VAL")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of unreadable images that stops it")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass; auto: bfloat16 on a CPU with units for it (AMX), else float32"
    )
    compile: bool = Field(False, description="compile the training step with torch.compile; takes a minute or more")

    @model_validator(mode="after")
    def _check_sizes_and_prompts(self) -> Self:
        for whole, part in (("image_size", "patch_size"), ("width", "head_width"), ("text_width", "head_width")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} {getattr(self, part)} must divide {whole} {getattr(self, whole)}")
        if wrong := [prompt for prompt in self.prompts if "{}" not in prompt]:
            raise ValueError(f"prompt {wrong[0]!r} has no {{}} for the name of a class")
        return self
