"""Weights of an image tower: where they come from, how a file is read, and the digest that identifies them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from milan_pipe.errors import DataError, MismatchError
from milan_pipe.weights_file import is_torchscript, load_weights, read_weights

_TOWER = "visual."


def _tower_keys(keys: list[str]) -> dict[str, str]:
    """The image tower's names, as the tower has them, of a whole CLIP model's or of a tower's own names."""
    plain = {key.removeprefix("module."): key for key in keys}
    tower = {name.removeprefix(_TOWER): key for name, key in plain.items() if name.startswith(_TOWER)}
    return tower or plain


def read_tower_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of the image tower in a checkpoint of a CLIP model, or of a tower alone; see `read_weights`.

    Raises:
        MissingError, DataError: the file is not there, cannot be read, or holds no tensors.
    """
    try:
        weights = read_weights(path, nested=("state_dict",))
    except DataError as error:
        if is_torchscript(path):
            raise DataError(f"{error}; for OpenAI's weights set teacher.pretrained to openai") from error
        raise
    return {name: weights[key] for name, key in _tower_keys(list(weights)).items()}


def load_tower_weights(visual: nn.Module, weights: dict[str, Tensor], name: str, where: str) -> None:
    """Put weights into an image tower, all of them and no others.

    A learned position embedding of another grid is interpolated, as open_clip does on loading.

    Raises:
        MismatchError: names what is missing, what is too many, and what has another shape.
    """
    # open_clip knows this tensor by the name that it has in a whole model.
    whole = {_TOWER + key: value for key, value in weights.items()}
    resize_pos_embed(whole, SimpleNamespace(visual=visual))
    weights = {key.removeprefix(_TOWER): value for key, value in whole.items()}
    try:
        load_weights(visual, weights, f"checkpoint {where}", f"the image tower of {name!r}")
    except MismatchError as error:
        raise MismatchError(f"{error}. Set teacher.model to the model that it was trained as") from None


def weights_sha256(visual: nn.Module) -> str:
    """Digest over names, shapes, types and bytes of all tensors of an image tower."""
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
