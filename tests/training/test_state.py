"""The optimiser's state by name: restored to the bit, and refused where it does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from milan_pipe.errors import MismatchError
from milan_pipe.training.state import first_not_finite, gathered, load_optimiser, optimiser_tensors


def stepped(steps: int, state: dict[str, Tensor] | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    optimiser = torch.optim.AdamW(model[0].parameters(), lr=0.1, fused=True)
    if state is not None:
        load_optimiser(model, optimiser, state, "here")
    for _ in range(steps):
        model(torch.ones(2, 3)).pow(3).sum().backward()
        optimiser.step()
    return model, optimiser


def test_a_restored_state_makes_the_same_next_step() -> None:
    first = stepped(3)
    tensors = gathered(optimiser_tensors(*first), keep=True)
    keys = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(tensors) == [f"0.{name}/{key}" for name in ("bias", "weight") for key in keys]
    second = stepped(0, {name: tensor.clone() for name, tensor in tensors.items()})
    second[0].load_state_dict(first[0].state_dict())
    for model, optimiser in (first, second):
        optimiser.zero_grad()
        model(torch.ones(2, 3)).pow(3).sum().backward()
        optimiser.step()
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_that_does_not_fit_is_refused_with_its_name() -> None:
    tensors = gathered(optimiser_tensors(*stepped(1)), keep=True)
    with pytest.raises(MismatchError, match=r"here.*also has gone\.weight"):
        stepped(0, {**tensors, "gone.weight/step": torch.ones(())})
    with pytest.raises(MismatchError, match=r"lacks 0\.weight"):
        stepped(0, {name: tensor for name, tensor in tensors.items() if "weight" not in name})


def test_a_rank_that_does_not_write_keeps_nothing() -> None:
    assert gathered({"w": torch.ones(2)}, keep=False) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(value: float) -> None:
    good = {"steps": torch.arange(3), "w": torch.ones(2)}
    assert first_not_finite(good) is None
    assert first_not_finite({**good, "b": torch.tensor([0.0, value]), "c": torch.tensor(value)}) == "b"
