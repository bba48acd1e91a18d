"""The optimiser's state as tensors by name, for safetensors and for another process.

By hand, because torch.distributed.checkpoint.state_dict takes an optimiser step to make room for the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from milan_pipe.errors import MismatchError


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as `parameter/key`, for example `encoder.norm.weight/exp_avg`.

    Settings of the groups are not in it: they follow from configuration and step.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimiser(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: object
) -> None:
    """Restore state tensors; every trained parameter must have them.

    Args:
        where: names the source in messages.

    Raises:
        MismatchError: names a parameter without state, or a state without a parameter.
    """
    parameters = dict(model.named_parameters())
    trained = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in parameters:
            raise MismatchError(f"{where}: the optimiser's state has {full!r}, which the model has not")
        parameter = parameters[name]
        value = tensor.to(parameter.device)
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        found.setdefault(name, {})[key] = value
    for name, parameter in parameters.items():
        if parameter in trained:
            if name not in found:
                raise MismatchError(f"{where}: the optimiser's state lacks {name!r}, which is trained")
            optimiser.state[parameter] = found[name]


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU; every rank must call it, as each holds shards.

    Args:
        keep: False returns nothing, for ranks that do not write.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu()
    return whole


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a value that is not finite; None where all are."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
