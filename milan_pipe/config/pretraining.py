"""The recipe of pretraining."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from milan_pipe.config.base import Settings
from milan_pipe.config.training import Beta, Parallel, Precision, SinkName

Target = Literal["clip", "pixels", "hog"]


class PretrainSettings(Settings):
    """The recipe of pretraining; defaults are those of the scenes."""

    epochs: int = Field(10, ge=1)
    warmup_epochs: float = Field(1, ge=0)
    batch_size: int = Field(64, ge=1, description="over all ranks")
    lr: float = Field(5e-3, gt=0, description="for a batch of 256; the rate used is lr x batch_size / 256")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the order of samples")
    window: int = Field(16, ge=1, description="blocks of 128 samples that are shuffled together")
    lanes: int = Field(
        1, ge=1, description="parts of the data that are read side by side; as many as ranks, or a multiple of them"
    )
    threads: int = Field(1, ge=1, description="threads that decode stored views")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    parallel: Parallel = Field("ddp", description="how ranks share the student: ddp copies it, fsdp shards it")
    targets: Literal["stored", "online"] = Field(
        "stored", description="online: the teacher runs in every step, on the stored views; the baseline"
    )
    precision: Precision = Field("auto", description="of the forward pass; auto is bfloat16 on GPUs, else float32")
    accumulate: int = Field(1, ge=1, description="parts that a batch is computed in, for its memory")
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient; none does not clip")
    compile: bool = Field(False, description="compile the student with torch.compile; takes a minute or more")
    checkpoint_activations: bool = Field(False, description="compute the blocks again going back, for less memory")
    log_every: int = Field(10, ge=1, description="steps between two points of the metrics")
    sinks: tuple[SinkName, ...] = Field((), description="where metrics go beside dvclive: tensorboard, wandb")
    picture_every: int | None = Field(None, ge=1, description="epochs between two pictures of masks and predictions")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between two checkpoints")
    checkpoint_minutes: float | None = Field(15, gt=0, description="minutes between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="the last ones are kept")


# What may change between two parts of a run: where and how fast it runs, and what is written down.
FREE = {
    "accumulate",
    "compile",
    "checkpoint_activations",
    "threads",
    "device",
    "parallel",
    "sinks",
    "picture_every",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
}
