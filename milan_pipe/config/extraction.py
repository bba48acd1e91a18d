"""Settings of stage 1."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from milan_pipe.config.base import Settings
from milan_pipe.config.targets import StoreFormat
from milan_pipe.errors import SettingError


def _number_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("expected auto, or a number of at least 1")


class ExtractSettings(Settings):
    """How stage 1 runs; only format, batch_size, teacher_threads and compile can change a byte of what it writes."""

    format: StoreFormat = Field("zarr", description="zarr or webdataset, of the store")
    batch_size: int = Field(
        64, ge=1, description="views in one forward pass of the teacher, at most all of 128 images; changes rounding"
    )
    threads: int = Field(0, ge=0, le=65536, description="of a worker, for images; 0: its share of the processors")
    teacher_threads: int = Field(
        0,
        ge=0,
        le=65536,
        description="of a worker's teacher on a CPU; 0: its share of the processors; changes rounding",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1, for the teacher")
    compile: bool = Field(False, description="torch.compile for the teacher; changes rounding")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of unreadable images that stops a run")
    workers: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = Field(
        1,
        description="processes of a Dask cluster on this machine, in turn on its GPUs; 1: no cluster; auto: one for "
        "every two processors, at most 8 a GPU, as one alone cannot feed a fast GPU",
    )
    scheduler: str | None = Field(None, description="address of a Dask scheduler that runs already; overrides workers")


def parse_share(text: str) -> tuple[int, int]:
    """`i/n` to (i, n), i from 0 to n - 1: shards whose number leaves i when divided by n. Raises SettingError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise SettingError(f"--shards {text!r} is not understood, expected i/n with i from 0 to n - 1, as 0/8")
    return int(match[1]), int(match[2])
