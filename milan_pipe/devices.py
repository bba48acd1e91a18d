"""Which device a setting names, and its queues of work."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import psutil
import torch
from torch import Tensor

from milan_pipe.config.training import Precision
from milan_pipe.errors import DeviceFullError, SettingError, one_line, system_number


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; other names are torch's. Raises SettingError if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"device {name!r} cannot be used ({reason}); expected auto, cpu or cuda") from error
    return device


def cards() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """`auto` is bfloat16 on what has units for it, a CUDA device or a CPU with AMX, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    # Older versions of torch do not tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if device.type == "cpu" and capabilities.get("amx_bf16") else "float32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Passes in it run in a resolved precision; in float32, as they are."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


@contextmanager
def memory_for(what: str, try_instead: str) -> Iterator[None]:
    """Run what may need more memory than a device has.

    Args:
        what, try_instead: for the message: what was computed, and the settings that need less.

    Raises:
        DeviceFullError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        # What torch raises on a CPU has no type of its own.
        if not isinstance(error, torch.OutOfMemoryError) and system_number(error) != errno.ENOMEM:
            raise
        raise DeviceFullError(
            f"the device has too little memory for {what} ({one_line(error)}); {try_instead}"
        ) from error


class SideStream:
    """A second queue of work on a CUDA device, beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[torch.cuda.Stream]:
        """Work inside goes to this queue, which waits for nothing of the others."""
        assert self._stream is not None, "a CPU has no queues"
        with torch.cuda.stream(self._stream):
            yield self._stream

    def hand_over(self, *made: Tensor) -> None:
        """Have the current queue wait for what this one has so far; it may then use `made`."""
        assert self._stream is not None, "a CPU has no queues"
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(current)


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a CUDA device, the most that tensors took so far; else this process's resident memory now.

    Pages of mapped files are not counted: the system takes them back when memory is short.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))
