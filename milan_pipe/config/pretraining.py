"""The recipe of pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from milan_pipe.config.training import Beta, Parallel, RunSettings


class PretrainSettings(RunSettings):
    """The recipe of pretraining; defaults are those of the scenes."""

    renamed: ClassVar[Mapping[str, str]] = {
        "window": "shuffle_blocks",
        "lanes": "canonical_streams",
        "picture_every": "plot_every",
    }

    epochs: int = Field(6, ge=1)
    warmup_epochs: float = Field(1, ge=0)
    batch_size: int = Field(128, ge=1, description="over all ranks")
    lr: float = Field(1e-2, gt=0, description="for a batch of 256; the rate used is lr x batch_size / 256")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor on the rate from each block of the student to the one below, for weights that were trained "
        "before; the decoder has the full rate",
    )
    shuffle_blocks: int = Field(16, ge=1, description="blocks of 128 samples that are shuffled together")
    canonical_streams: int = Field(
        1,
        ge=1,
        description="parts of the order that are read side by side: as many as ranks, times `workers`, or a multiple",
    )
    threads: int = Field(1, ge=1, description="threads that decode stored views; as many, and at least two, read")
    workers: int = Field(
        0,
        ge=0,
        description="processes that read and decode, each with `threads`; 0: this one does, whose threads slow the "
        "step down where a GPU is fast",
    )
    parallel: Parallel = Field("ddp", description="how ranks share the student: ddp copies it, fsdp shards it")
    targets: Literal["stored", "online"] = Field(
        "stored", description="online: the teacher runs in every step, on the stored views; the baseline"
    )
    plot_every: int | None = Field(None, ge=1, description="epochs between two plots of masks and predictions")
    probe_every: int | None = Field(
        None, ge=1, description="epochs between two k-NN probes of the student; none: off. The last step has one too"
    )
    probe_train: str | None = Field(None, description="labelled images that vote, as TRAIN of `knn`")
    probe_test: str | None = Field(None, description="labelled images that are judged, as TEST of `knn`")
    probe_images: int = Field(
        2000, ge=1, description="most images of each of the two; their views stay in memory, uint8: 3 bytes a pixel"
    )

    @model_validator(mode="after")
    def _both_sets(self) -> Self:
        if self.probe_every is not None and (self.probe_train is None or self.probe_test is None):
            found = f"probe_train {self.probe_train!r} and probe_test {self.probe_test!r}"
            raise ValueError(f"probe_every needs labelled images to vote and to judge, found {found}; name both")
        return self
