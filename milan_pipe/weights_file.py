"""Files of weights that others wrote: tensors by name, and nothing that would have to be trusted."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from milan_pipe.errors import DataError, MissingError

_EXPECTED = "expected safetensors, or tensors by name as torch.save writes them"
_MOST_NAMED = 3


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _objects_in(path: Path) -> str:
    """Names of the Python objects that the file would have unpickled, as far as torch tells them."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # Of a damaged file this fails in as many ways as loading does.
    except Exception:
        return ""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _read_torch(path: Path, nested: Sequence[str]) -> dict[str, Tensor]:
    # Asked first, as torch.load goes on to its loader of programs.
    if is_torchscript(path):
        raise DataError(f"checkpoint {path} is a TorchScript program, {_EXPECTED}")
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in nested:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise DataError(f"checkpoint {path} holds a {type(content).__name__}, {_EXPECTED}")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def read_weights(path: Path, nested: Sequence[str] = ("state_dict", "model")) -> dict[str, Tensor]:
    """Tensors of a file, by name, on the CPU.

    Args:
        path: a safetensors file, by its suffix, or a file of `torch.save`, of which tensors alone are read: Python
            objects are refused and never unpickled.
        nested: where a file of `torch.save` is a dict of more than weights, keys under which they may lie.

    Raises:
        MissingError: there is no such file.
        DataError: the file cannot be read, or holds no tensors; names the objects that were refused.
    """
    if not path.is_file():
        raise MissingError(f"checkpoint {path} is not there; {_EXPECTED}")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else _read_torch(path, nested)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"checkpoint {path} cannot be read: {error.strerror or type(error).__name__}") from error
    # Readers of damaged files raise UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError and more. Their
    # words are left out: torch advises to unpickle what it refused.
    except Exception as error:
        objects = _objects_in(path) if path.suffix != ".safetensors" else ""
        if objects:
            raise DataError(
                f"checkpoint {path} holds Python objects beside its tensors ({objects}), which are never unpickled "
                f"here; {_EXPECTED}. If you trust its author, load it with torch.load yourself and save the state dict "
                "alone"
            ) from error
        raise DataError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is damaged; {_EXPECTED}"
        ) from error
    if not weights:
        raise DataError(f"checkpoint {path} holds no tensors; {_EXPECTED}")
    return weights
