"""What makes a step fast or small changes how it is computed, not what: values and gradients against the plain way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.targets import header
from support.training import stored_batch
from torch import nn

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.config.training import Precision
from milan_pipe.devices import resolve_device, resolve_precision
from milan_pipe.loader.stream import Batch
from milan_pipe.pretraining.objective import Objective, build_objective
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.step import Stepper

CPU = torch.device("cpu")
HEAD = header(size=32, grid=(4, 4), width=12)


def objective(kind: str = "prompting", **change: Any) -> Objective:
    return build_objective(
        HEAD,
        Params(
            student=StudentSettings(image_size=32, patch_size=8, width=32, depth=2, heads=2),
            decoder=DecoderSettings(kind=kind, width=16, depth=2, heads=2),  # type: ignore[arg-type]
            pretrain=PretrainSettings(**change),
        ),
        CPU,
    )


def stepper(model: Objective, precision: Precision = "float32", **change: Any) -> Stepper[Batch]:
    parts = change.pop("parts", 1)
    optimiser = build_adamw(model.student, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    return Stepper(
        optimiser,
        model,
        split=lambda whole: whole.parts(parts),
        device=CPU,
        precision=precision,
        clip_grad=change.pop("clip_grad", None),
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def losses(step: Stepper[Batch], count: int = 6) -> list[float]:
    return [float(step(stored_batch(), number, 1e-3).loss) for number in range(count)]


@pytest.mark.parametrize("parts", [2, 3, 7, 10, 50])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts: int) -> None:
    whole, cut = objective(), objective()
    first = float(stepper(whole)(stored_batch(), 0, 0.0).loss)
    second = float(stepper(cut, parts=parts)(stored_batch(), 0, 0.0).loss)
    assert second == pytest.approx(first, rel=1e-6)
    left, right = gradients(whole), gradients(cut)
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert torch.allclose(gradient, right[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 11])
def test_parts_are_the_batch_and_shares_are_of_one(count: int) -> None:
    parts = stored_batch().parts(count)
    assert [key for part, _ in parts for key in part.keys] == list(stored_batch().keys)
    assert sum(share for _, share in parts) == pytest.approx(1)
    sizes = [len(part.keys) for part, _ in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == min(count, 10)
    for part, share in parts:
        assert len(part.pixels_BHWC) == len(part.code_BST) == len(part.attention_BL) == len(part.keys)
        assert share == pytest.approx(len(part.keys) / 10)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_activations_computed_again_change_no_bit(kind: str) -> None:
    kept, again = objective(kind), objective(kind, checkpoint_activations=True)
    calls: dict[str, int] = {"blocks": 0}
    for block in [*again.student.encoder.blocks, *again.student.decoder.decoder_blocks]:
        block.register_forward_pre_hook(lambda *_: calls.update(blocks=calls["blocks"] + 1))
    assert float(stepper(kept)(stored_batch(), 0, 0.0).loss) == float(stepper(again)(stored_batch(), 0, 0.0).loss)
    left, right = gradients(kept), gradients(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert calls["blocks"] == 8  # two blocks each, twice


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_the_same_and_keeps_weights_whole(precision: Precision) -> None:
    plain, half = objective(), objective()
    expected, found = losses(stepper(plain)), losses(stepper(half, precision))
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected  # something was computed in another way
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert {g.dtype for g in gradients(half).values()} == {torch.float32}


def test_clipping_bounds_the_norm_and_leaves_the_direction() -> None:
    free, clipped = objective(), objective()
    stepper(free)(stored_batch(), 0, 0.0)
    norm = torch.cat([g.flatten() for g in gradients(free).values()]).norm()
    stepper(clipped, clip_grad=float(norm) / 10)(stored_batch(), 0, 0.0)
    for name, gradient in gradients(clipped).items():
        assert torch.allclose(10 * gradient, gradients(free)[name], rtol=1e-4, atol=1e-7)
    untouched = objective()
    stepper(untouched, clip_grad=float(norm) * 10)(stored_batch(), 0, 0.0)
    assert all(torch.equal(g, gradients(free)[name]) for name, g in gradients(untouched).items())


def test_clipping_sees_gradients_without_the_scale_of_half_precision() -> None:
    half = objective()
    stepper(half, "float16", clip_grad=1e-3)(stored_batch(), 0, 0.0)
    norm = torch.cat([g.flatten() for g in gradients(half).values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("units", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_on_a_processor_with_units_for_it(
    units: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": units}, raising=False)
    assert resolve_precision("auto", resolve_device("cpu")) == expected
    assert resolve_precision("float16", CPU) == "float16"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_a_compiled_student_is_the_same(kind: str) -> None:
    plain, compiled = objective(kind), objective(kind, compile=True)
    assert losses(stepper(compiled)) == pytest.approx(losses(stepper(plain)), rel=1e-5)
    assert list(compiled.student.state_dict()) == list(plain.student.state_dict())
