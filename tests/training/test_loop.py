"""Schedule, weight decay groups and the loop that knows no model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.student.model import build_student
from milan_pipe.training.optim import build_adamw, cosine_lr, decays
from milan_pipe.training.runner import run_steps
from milan_pipe.training.step import Stepper, StepReport


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (8, 1.0), (6, 1.0 + 2**-0.5), (12, 0.0)]
)
def test_cosine_by_hand(step: int, expected: float) -> None:
    assert cosine_lr(step, steps=12, warmup_steps=4, peak=2.0) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_it_starts_at_the_peak_and_ends_at_the_floor() -> None:
    rates = [cosine_lr(step, steps=10, warmup_steps=0, peak=1.0, final=0.1) for step in range(11)]
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)


def test_a_run_that_is_all_warmup_keeps_rising() -> None:
    rates = [cosine_lr(step, steps=3, warmup_steps=6, peak=6.0) for step in range(3)]
    assert rates == [0.0, 1.0, 2.0]
    assert cosine_lr(0, steps=1, warmup_steps=0, peak=1.0) == 1.0


def groups_by_name(model: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimiser = build_adamw(model, lr=1.0, betas=(0.9, 0.95), weight_decay=0.05)
    found: dict[str, float] = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group["weight_decay"]
    return found


def test_decay_of_a_real_vit_goes_to_matrices_only() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    found = groups_by_name(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {name for name, decay in found.items() if decay} == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }
    assert set(found.values()) == {0.0, 0.05}


def test_the_masked_student_has_every_trainable_parameter_in_one_group() -> None:
    sizes = StudentSettings(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    model = build_student(sizes, DecoderSettings(width=16, depth=1, heads=2), 8)
    found = groups_by_name(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "encoder.pos_embed" not in found
    assert found["decoder.mask_token"] == found["encoder.cls_token"] == 0.0
    assert all(decay == 0.0 for name, decay in found.items() if name.endswith("bias") or "norm" in name)
    assert found["decoder.decoder_pred.weight"] == 0.05


def test_a_position_embedding_that_is_trained_does_not_decay() -> None:
    assert not decays("encoder.pos_embed", nn.Parameter(torch.zeros(1, 5, 4)))
    assert decays("encoder.blocks.0.mlp.fc1.weight", nn.Parameter(torch.zeros(5, 4)))


class Weight(nn.Module):
    """One number; its gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, batch: float, epoch: int) -> Tensor:
        return self.w * (batch + epoch)


def step_of(optimiser: torch.optim.Optimizer, loss_of: Any) -> Stepper[float]:
    return Stepper(
        optimiser,
        loss_of,
        split=lambda batch: [(batch, 1.0)],
        device=torch.device("cpu"),
        precision="float32",
        clip_grad=None,
    )


def test_the_loop_counts_steps_and_uses_the_rate_of_each() -> None:
    model = Weight()
    seen: list[tuple[StepReport, float, float]] = []
    done = run_steps(
        step_of(torch.optim.SGD(model.parameters(), lr=99.0), model),
        iter([1.0, 2.0, 3.0, 4.0]),
        steps=3,
        steps_per_epoch=2,
        lr_of=lambda step: 10.0**step,
        on_step=lambda report, batch: seen.append((report, batch, model.w.item())),
    )
    assert done == 3
    assert [(r.step, r.epoch, r.lr, batch) for r, batch, _ in seen] == [
        (1, 0, 1.0, 1.0),
        (2, 0, 10.0, 2.0),
        (3, 1, 100.0, 3.0),
    ]
    # Gradients do not pile up: -1, then -1 - 20, then -21 - 100 * (3 + 1).
    assert [w for _, _, w in seen] == [-1.0, -21.0, -421.0]
    assert [r.result.loss.item() for r, _, _ in seen] == [0.0, -2.0, -84.0]
    assert not seen[0][0].result.loss.requires_grad


def test_waiting_for_data_is_told_apart_from_work() -> None:
    model = Weight()
    reports: list[StepReport] = []

    def slow() -> Iterator[float]:
        for _ in range(2):
            time.sleep(0.05)
            yield 1.0

    def busy(batch: float, epoch: int) -> Tensor:
        time.sleep(0.1)
        return model(batch, epoch)  # type: ignore[no-any-return]

    run_steps(
        step_of(torch.optim.SGD(model.parameters()), busy),
        slow(),
        steps=2,
        steps_per_epoch=2,
        lr_of=lambda _: 0.1,
        on_step=lambda report, _: reports.append(report),
    )
    assert reports[-1].data_wait_seconds >= 0.1
    assert reports[-1].seconds - reports[-1].data_wait_seconds >= 0.2


def test_no_batches_no_steps_and_a_listener_may_stop() -> None:
    model = Weight()
    optimiser = torch.optim.SGD(model.parameters())

    def stop(report: StepReport, _: float) -> None:
        if report.step == 2:
            raise RuntimeError("enough")

    step = step_of(optimiser, model)
    assert run_steps(step, iter([]), steps=3, steps_per_epoch=1, lr_of=lambda _: 1.0, on_step=stop) == 0
    with pytest.raises(RuntimeError, match="enough"):
        run_steps(
            step,
            iter([1.0] * 9),
            steps=9,
            steps_per_epoch=1,
            lr_of=lambda _: 1.0,
            on_step=stop,
        )
