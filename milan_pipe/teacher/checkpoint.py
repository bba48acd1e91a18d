"""Weights of an image tower: read from a file, and the digest that identifies them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

from open_clip.model import resize_pos_embed
from torch import nn

from milan_pipe.errors import DataError, MismatchError, one_line
from milan_pipe.weights_file import is_torchscript, load_weights, read_weights

_TOWER = "visual."


def load_tower_weights(visual: nn.Module, path: Path, name: str) -> None:
    """Load an image tower from a checkpoint of a CLIP model, or of a tower alone: all its tensors and no others.

    A learned position embedding of another grid is interpolated, as open_clip does on loading.

    Raises:
        MissingError, DataError: the file is not there, cannot be read, or holds no tensors.
        MismatchError: names tensors that are missing, too many, or of another shape.
    """
    try:
        weights = read_weights(path, nested=("state_dict",))
    except DataError as error:
        if is_torchscript(path):
            raise DataError(f"{error}; for OpenAI's weights set teacher.pretrained to openai") from error
        raise
    plain = {key.removeprefix("module."): tensor for key, tensor in weights.items()}
    whole = {key: tensor for key, tensor in plain.items() if key.startswith(_TOWER)}
    # open_clip knows the position embedding by the name that it has in a whole model.
    whole = whole or {_TOWER + key: tensor for key, tensor in plain.items()}
    try:
        resize_pos_embed(whole, SimpleNamespace(visual=visual))
    # Of a shape that is no position embedding's.
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise MismatchError(
            f"checkpoint {path} does not fit the image tower of {name!r}: its position embedding cannot be resized "
            f"({one_line(error)}). Set teacher.model to the model that it was trained as"
        ) from error
    tower = {key.removeprefix(_TOWER): tensor for key, tensor in whole.items()}
    try:
        load_weights(visual, tower, f"checkpoint {path}", f"the image tower of {name!r}")
    except MismatchError as error:
        raise MismatchError(f"{error}. Set teacher.model to the model that it was trained as") from None


def weights_sha256(visual: nn.Module) -> str:
    """Digest over names, shapes, types and bytes of all tensors of an image tower."""
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
