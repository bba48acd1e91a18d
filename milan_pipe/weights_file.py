"""Files of weights, tensors by name; of other people's files nothing that would have to be trusted is read."""

from __future__ import annotations

import errno
import hashlib
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from milan_pipe.errors import (
    DataError,
    MismatchError,
    MissingError,
    SettingError,
    StoreError,
    resource_hint,
    system_reason,
)
from milan_pipe.storage.local import is_utf8, make_folder, whole_file
from milan_pipe.units import some

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Names and shapes: a hundred bytes a tensor.
_MOST_PICKLED = 2**24
_EXPECTED = "expected safetensors, or tensors by name as torch.save writes them"


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; makes the folder. Raises StoreError."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    make_folder(path.parent)
    try:
        with whole_file(path) as partial:
            save_file(whole, partial, None if metadata is None else dict(metadata))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be written: {system_reason(error)}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU; raises StoreError where it cannot be read, DataError if damaged."""
    try:
        require_opens(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) or resource_hint(error):
            raise StoreError(f"{path} cannot be read: {system_reason(error)}") from error
        raise DataError(f"{path} is damaged ({error})") from error


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file that was read says beside its tensors; values are strings."""
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def require_opens(path: Path) -> None:
    """Raise what keeps a safetensors file from being opened, as OSError with the system's reason."""
    if not is_utf8(str(path)):
        raise OSError(errno.EILSEQ, "its path is no UTF-8, which safetensors does not open; rename it")
    # The library opens a file twice, and calls every failure "No such file".
    with path.open("rb"), path.open("rb"):
        pass


def require_folder_name(path: Path, holds: str) -> None:
    """Raise SettingError for the name of a weights file where a folder is written, which will hold `holds`."""
    if path.suffix.lower() in _SUFFIXES:
        raise SettingError(
            f"{path} has the name of a file, and a folder is written: name one without {path.suffix!r}, as "
            f"{path.with_suffix('')}; it will hold {holds}"
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript program."""
    return any(member.filename.endswith("/constants.pkl") for member in _members(path))


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """What a zip archive lists; nothing where the file is none, or damaged."""
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return []


def read_weights(path: Path, nested: Sequence[str] = ("state_dict", "model")) -> dict[str, Tensor]:
    """Tensors of a file, by name, on the CPU.

    Args:
        path: a safetensors file, by its suffix, or a file of `torch.save`, of which only tensors are read: Python
            objects are refused and never unpickled.
        nested: keys under which a file of `torch.save` may hold its weights.

    Raises:
        MissingError: there is no such file.
        DataError: the file cannot be read, or holds no tensors; names the objects that were refused.
        StoreError: the machine has run out of a resource, as open files.
    """
    if not path.is_file():
        raise MissingError(f"checkpoint {path} is not there; {_EXPECTED}")
    try:
        if path.suffix == ".safetensors":
            require_opens(path)
            weights = load_file(path)
        else:
            weights = _read_torch(path, nested)
    except DataError:
        raise
    # Readers of damaged files raise UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError and more. Their
    # words are left out: torch advises to unpickle what it refused.
    except Exception as error:
        if hint := resource_hint(error):
            raise StoreError(f"checkpoint {path} cannot be read: {hint}") from error
        # A file that was cut short sends its reader before its beginning, which the system calls an invalid argument.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise DataError(f"checkpoint {path} cannot be read: {error.strerror or type(error).__name__}") from error
        if objects := _objects_in(path):
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


def _read_torch(path: Path, nested: Sequence[str]) -> dict[str, Tensor]:
    # Checked first, as torch.load goes on to its loader of programs.
    if is_torchscript(path):
        raise DataError(f"checkpoint {path} is a TorchScript program, {_EXPECTED}")
    # Small files would become gigabytes of Python objects.
    for member in _members(path):
        if member.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"checkpoint {path} is compressed, which torch.save never does; {_EXPECTED}")
        if member.filename.endswith("/data.pkl") and member.file_size > _MOST_PICKLED:
            raise DataError(
                f"checkpoint {path} has {member.file_size >> 20} MiB of objects beside the values of its tensors, at "
                f"most {_MOST_PICKLED >> 20} MiB are read; {_EXPECTED}"
            )
    content: Any = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    for key in nested:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise DataError(f"checkpoint {path} holds a {type(content).__name__}, {_EXPECTED}")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _objects_in(path: Path) -> str:
    """Names of the Python objects that a file of `torch.save` would have unpickled, as far as torch names them."""
    try:
        return some(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    # It fails for a damaged file in as many ways as loading does.
    except Exception:
        return ""


def mismatch(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How names and shapes of tensors differ from the expected ones, with the first names; empty if not at all."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = ("it lacks ", missing), ("it also has ", extra), ("", shapes)
    return "; ".join(text + some(names) for text, names in kinds if names)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def vouched(identity: str, tensors: Mapping[str, Tensor]) -> str:
    """What tensors are of, which has no blank, and their digest.

    For one value of a file's metadata: safetensors writes several in any order.
    """
    return f"{identity} {weights_digest(tensors)}"


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str, name: str = "the model") -> None:
    """Load all tensors, in place; `where` and `name` are the source and the model, for the message.

    Raises:
        MismatchError: names the first tensors that are missing, not expected, or of another shape.
    """
    if problems := mismatch(tensors, model.state_dict()):
        raise MismatchError(f"{where} does not fit {name}: {problems}")
    model.load_state_dict(dict(tensors))
