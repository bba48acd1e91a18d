"""Which device a setting names."""

from __future__ import annotations

import psutil
import torch

from milan_pipe.errors import SettingError


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


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a CUDA device, the most that tensors took so far; else this process's resident memory now.

    Pages of mapped files are not counted: the system takes them back when memory is short.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))
