"""The optimiser's state as tensors by name, for safetensors and for another process.

By hand, because torch.distributed.checkpoint.state_dict takes an optimiser step to make room for the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from milan_pipe.errors import MismatchError
from milan_pipe.weights_file import mismatch


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

    Raises:
        MismatchError: names `where`, parameters without state, state without a parameter, and state of another shape.
    """
    trained = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter in trained}
    states: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        states.setdefault(name, {})[key] = tensor
    # A parameter's state has tensors of its shape, and counters.
    largest = {
        name: max(state.values(), key=lambda tensor: (tensor.numel(), tensor.ndim)) for name, state in states.items()
    }
    if problems := mismatch(largest, parameters):
        raise MismatchError(f"{where}: the optimiser's state does not fit the trained parameters: {problems}")
    for name, parameter in parameters.items():
        optimiser.state[parameter] = {key: _placed(value, parameter) for key, value in states[name].items()}


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.to(parameter.device)
    if value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    # With the parameter's strides: fused AdamW goes through the memory of both side by side.
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, none where not `keep`; every rank must call it, as each holds shards."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu()
    return whole


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a value that is not finite; None where all are."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
