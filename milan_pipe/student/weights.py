"""Putting saved tensors into a model, with one clear error where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from milan_pipe.errors import MismatchError

_SHOWN = 3


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
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise MismatchError(f"{where} does not fit the model: {'; '.join(problems[:_SHOWN])}{more}")
    model.load_state_dict(dict(tensors), strict=True)
