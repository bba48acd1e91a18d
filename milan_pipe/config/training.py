"""Settings of every run; what it learns is in the settings of its task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from milan_pipe.config.base import Settings

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Parallel = Literal["ddp", "fsdp"]
SinkName = Literal["tensorboard", "wandb"]
Beta = Annotated[float, Field(ge=0, lt=1)]

RESUMABLE = {
    *("accumulate", "compile", "checkpoint_activations", "threads", "workers", "device", "parallel"),
    *("sinks", "plot_every", "log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
    *("probe_every", "probe_train", "probe_test", "probe_images"),
}
"""What may change between two parts of a run: where and how fast it runs, and what is written down."""


class RunSettings(Settings):
    """Where and how a run goes; not what it learns."""

    seed: int = Field(0, ge=0, lt=2**63, description="of fresh weights, the order of images and augmentation")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    precision: Precision = Field(
        "auto", description="of the forward pass; auto is bfloat16 on GPUs and on CPUs with AMX, else float32"
    )
    accumulate: int = Field(1, ge=1, description="parts that a batch is computed in, for its memory")
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient; none does not clip")
    compile: bool = Field(False, description="compile the model with torch.compile; takes a minute or more")
    checkpoint_activations: bool = Field(False, description="compute the blocks again going back, for less memory")
    log_every: int = Field(10, ge=1, description="steps between two points of the metrics")
    sinks: tuple[SinkName, ...] = Field((), description="where metrics go beside their files: tensorboard, wandb")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between two checkpoints")
    checkpoint_minutes: float | None = Field(15, gt=0, description="minutes between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="the last ones are kept, beside the best one if there is one")


class SupervisedSettings(RunSettings):
    """Where and how a run on labelled images goes."""

    workers: int = Field(0, ge=0, description="processes that decode and augment; 0: this one does it between steps")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of unreadable images that stops a run")
