"""The optimiser's state as tensors by name, for safetensors and for another process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from milan_pipe.errors import MismatchError

_SEPARATOR = "/"


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as `parameter/key`, as `encoder.norm.weight/exp_avg`.

    Settings of the groups, as rate and decay, are not in it: they follow from the configuration and the step.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}{_SEPARATOR}{key}": value
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimiser(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: object
) -> None:
    """Put state tensors back; every parameter that is trained must have them.

    Args:
        where: names the source in messages.

    Raises:
        MismatchError: names a parameter without state, or a state without a parameter.
    """
    parameters = dict(model.named_parameters())
    trained = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(_SEPARATOR)
        if name not in parameters:
            raise MismatchError(f"{where}: the optimiser's state has {full!r}, which the model has not")
        found.setdefault(name, {})[key] = _placed(tensor, parameters[name])
    for name, parameter in parameters.items():
        if parameter not in trained:
            continue
        if name not in found:
            raise MismatchError(f"{where}: the optimiser's state lacks {name!r}, which is trained")
        optimiser.state[parameter] = found[name]


def _placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole state tensor as its parameter lies: on its device, and cut as it is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, put together from all ranks where they are sharded; every rank must call it.

    Args:
        keep: False returns nothing, for ranks that only give their shards.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu()
    return whole


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a value that is not finite; None where all are."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return name
    return None
