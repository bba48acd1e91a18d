"""How a student is judged: features, neighbours, probes, fine-tuning and segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from milan_pipe.config.base import Settings
from milan_pipe.config.training import Beta, SupervisedSettings

Scale = Annotated[float, Field(gt=0)]
Head = Literal["linear", "knn"]
"""What labels frozen patch features: a linear map that is trained, or the nearest patches of TRAIN."""
Pool = Literal["cls", "mean"]
"""Which tokens stand for the image: the class token, or the mean of the patches."""


class EmbedSettings(Settings):
    """How images become features. `batch_size` changes rounding alone, `threads` nothing."""

    batch_size: int = Field(256, ge=1, description="images in one forward pass")
    threads: int = Field(0, ge=0, description="threads that decode images; 0: one per processor")
    crop: float = Field(1.0, gt=0, le=1, description="side of the centre square over the shorter side")
    pool: Pool = Field("cls", description="cls: the class token; mean: the mean of the patch tokens")
    dtype: Literal["float32", "float16"] = Field("float32", description="of what `milan-pipe embed` writes")
    format: Literal["parquet", "zarr"] = Field("parquet", description="parquet or zarr, of what `embed` writes")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of unreadable images that stops `embed`")


class KnnSettings(Settings):
    """How neighbours vote."""

    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20, 100, 200), min_length=1, description="each number of neighbours to report"
    )
    temperature: float = Field(0.07, gt=0, allow_inf_nan=False, description="a vote is exp(cosine / temperature)")


class LinearProbeSettings(Settings):
    """How the classifier is fitted. Minimised is mean cross-entropy + l2 / 2 * squared weights, the bias left free."""

    l2: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1), min_length=1, description="strengths to choose from; one alone is taken as it is"
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of TRAIN on which the strength is chosen")
    max_iterations: int = Field(1000, ge=1, description="of L-BFGS, for each fit")
    seed: int = Field(0, ge=0, description="draws the images on which the strength is chosen")


class AugmentSettings(Settings):
    """Augmentation of training images; defaults are those of the scenes, the recipes have ImageNet's."""

    scale: tuple[float, float] = Field((0.35, 1.0), description="least and greatest share of the area that is cropped")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a mirrored image")
    auto_augment: str | None = Field(None, description="timm's RandAugment, as rand-m9-mstd0.5-inc1; none: off")
    erasing: float = Field(0.0, ge=0, le=1, description="probability that a rectangle is replaced by noise")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: none")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0: none. With both, each takes half of the batches")
    smoothing: float = Field(0.1, ge=0, lt=1, description="of the labels")


PLAIN = AugmentSettings(smoothing=0.0)
"""Crop and flip alone, as a linear probe takes them."""


class FinetuneSettings(SupervisedSettings):
    """The recipe of fine-tuning; defaults are those of the scenes with all labels."""

    epochs: int = Field(1, ge=1)
    warmup_epochs: float = Field(0.2, ge=0)
    batch_size: int = Field(64, ge=1, description="over all ranks")
    lr: float = Field(8e-3, gt=0, description="for a batch of 256; the rate used is lr x batch_size / 256")
    min_lr: float = Field(1e-6, ge=0, description="at the end of the cosine")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1, description="of the learning rate, from each layer to the one below")
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block; it rises linearly from 0")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a mean of the weights, which is then evaluated")
    image_size: int | None = Field(None, ge=1, description="side of the input; none: the student's")
    crop: float | None = Field(
        1.0, gt=0, le=1, description="as lars_probe.crop; none: 0.875 for inputs of up to 224 pixels, 1 above"
    )
    train_fraction: float = Field(1.0, gt=0, le=1, description="share of the labels that is used, of each class")
    eval_every: int = Field(1, ge=1, description="epochs between two evaluations")


class LarsProbeSettings(SupervisedSettings):
    """The protocol of the linear probe; defaults are those of the scenes."""

    epochs: int = Field(20, ge=1)
    warmup_epochs: float = Field(2, ge=0)
    batch_size: int = Field(512, ge=1, description="over all ranks")
    lr: float = Field(5.0, gt=0, description="for a batch of 256; the rate used is lr x batch_size / 256")
    momentum: float = Field(0.9, ge=0, lt=1)
    scale: tuple[float, float] = Field((0.08, 1.0), description="least and greatest share of the area that is cropped")
    pool: Pool = Field("cls", description="cls: the class token; mean: the mean of the patch tokens")
    crop: float = Field(1.0, gt=0, le=1, description="at test time: side of the centre square over the shorter side")
    eval_every: int = Field(5, ge=1, description="epochs between two evaluations")


class SegmentSettings(SupervisedSettings):
    """The recipe of segmentation; defaults are those of the scenes."""

    steps: int = Field(240, ge=1)
    warmup_steps: int = Field(25, ge=0)
    batch_size: int = Field(16, ge=1, description="over all ranks")
    lr: float = Field(3e-3, gt=0, description="as it is used, whatever the batch")
    power: float = Field(1.0, gt=0, description="of the polynomial decay")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.75, gt=0, le=1, description="of the learning rate, from each block to the one below")
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block; it rises linearly from 0")
    crop: int | None = Field(None, ge=1, description="side of training crops and of windows; none: the student's input")
    short_side: int | None = Field(None, ge=1, description="of images, at ratio 1 and when tested; none: the crop")
    ratio: tuple[float, float] = Field((1.0, 1.0), description="least and greatest resizing of training images")
    stride: int | None = Field(None, ge=1, description="of windows when tested; none: two thirds of the crop")
    scales: tuple[Scale, ...] = Field((), description="of a last evaluation, each with its mirror; empty: off")
    blocks: tuple[int, ...] | None = Field(None, description="four that make the pyramid; none: 3, 5, 7, 11 of 12")
    channels: int = Field(48, ge=1, description="of UperNet's decoder")
    auxiliary: float = Field(0.4, ge=0, description="weight of the auxiliary head's loss")
    over_all_pixels: bool = Field(False, description="divide the loss by all pixels, those without a class as well")
    classes: int | str | None = Field(None, description="number of classes, or a file with their names, one a line")
    ignore_index: int = Field(255, ge=0, description="value of masks that stands for no class")
    reduce_zero_label: bool | None = Field(None, description="0 is no class, k class k - 1; none: as ADE20K's layout")
    eval_every: int = Field(240, ge=1, description="steps between two evaluations")
    train_fraction: float = Field(1.0, gt=0, le=1, description="share of the images that is trained on")


class SegmentProbeSettings(Settings):
    """How patch features are judged by masks, which segment.classes, .ignore_index and .reduce_zero_label explain.

    Lengths and rates are the linear head's; their defaults are those of the scenes.
    """

    heads: tuple[Head, ...] = Field(
        ("linear", "knn"), min_length=1, description="linear: a linear map; knn: nearest patches of TRAIN"
    )
    images: int | None = Field(1000, ge=1, description="most images of TRAIN that are used, drawn by seed; none: all")
    short_side: int | None = Field(None, ge=1, description="of images; none: the side of the subject's input")
    memory_gb: float = Field(8.0, gt=0, description="most that features and masks of TRAIN may take; more is an error")
    seed: int = Field(0, ge=0, description="draws images, bank and batches, and the linear map's first weights")
    steps: int = Field(200, ge=1)
    warmup_steps: int = Field(8, ge=0)
    batch_size: int = Field(16, ge=1, description="windows in a step")
    lr: float = Field(1e-2, gt=0, description="of AdamW, as it is used, whatever the batch")
    power: float = Field(1.0, gt=0, description="of the polynomial decay")
    weight_decay: float = Field(1e-4, ge=0)
    bank: int = Field(8192, ge=1, description="most patches of TRAIN that are searched, drawn by seed")
    neighbours: int = Field(30, ge=1, description="patches of the bank that each patch of VAL asks")
    temperature: float = Field(0.02, gt=0, allow_inf_nan=False, description="weights are softmax(cosine / temperature)")
