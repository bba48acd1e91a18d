"""Files of weights: tensors by name, and of those that others wrote nothing that would have to be trusted."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoreError, resource_hint
from milan_pipe.storage.local import whole_file

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_EXPECTED = "expected safetensors, or tensors by name as torch.save writes them"
_MOST_NAMED = 3


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(whole, partial, None if metadata is None else dict(metadata))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        OSError: it cannot be opened.
        SafetensorError: it is damaged.
    """
    require_opens(path)
    return load_file(path)


def require_opens(path: Path) -> None:
    """Have what keeps a safetensors file from being opened said as it is.

    Raises:
        OSError: with the system's reason.
    """
    # The library opens a file twice, and calls whatever keeps it from that "No such file".
    with path.open("rb"), path.open("rb"):
        pass


def require_folder_name(path: Path, holds: str) -> None:
    """Refuse the name of a weights file where a folder is to be written.

    Args:
        holds: what the folder will hold, for the message.

    Raises:
        SettingError: the name has a suffix of weights files.
    """
    if path.suffix.lower() in _SUFFIXES:
        raise SettingError(
            f"{path} has the name of a file, and a folder is written: name one without {path.suffix!r}, as "
            f"{path.with_suffix('')}; it will hold {holds}"
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _objects_in(path: Path) -> str:
    """Names of the Python objects that the file would have unpickled, as far as torch names them."""
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
        StoreError: the machine has run out of what reading takes, as open files.
    """
    if not path.is_file():
        raise MissingError(f"checkpoint {path} is not there; {_EXPECTED}")
    try:
        weights = load_tensors(path) if path.suffix == ".safetensors" else _read_torch(path, nested)
    except DataError:
        raise
    except OSError as error:
        if hint := resource_hint(error):
            raise StoreError(f"checkpoint {path} cannot be read: {hint}") from error
        raise DataError(f"checkpoint {path} cannot be read: {error.strerror or type(error).__name__}") from error
    # Readers of damaged files raise UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError and more. Their
    # words are left out: torch advises to unpickle what it refused.
    except Exception as error:
        if hint := resource_hint(error):
            raise StoreError(f"checkpoint {path} cannot be read: {hint}") from error
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


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load all tensors, in place; names and shapes must be the model's, every one.

    Args:
        where: names the source in messages.

    Raises:
        MismatchError: names the first tensors that are missing, not expected, or of another shape.
    """
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise MismatchError(f"{where} does not fit the model: {'; '.join(problems[:_MOST_NAMED])}{more}")
    model.load_state_dict(dict(tensors), strict=True)
