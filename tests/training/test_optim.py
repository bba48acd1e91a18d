"""Parameter groups by name against the published rules, and learning rates by hand."""

from __future__ import annotations

import re

import pytest
import timm
from torch import nn

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.evaluation.upernet import UperNet
from milan_pipe.student.model import build_student
from milan_pipe.training.optim import build_adamw, cosine_lr

SIZES = StudentSettings(image_size=32, patch_size=8, width=16, depth=1, heads=2)


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


def groups_by_name(model: nn.Module, layer_decay: float | None) -> list[tuple[str, float, float]]:
    """Name, weight decay and scale of each parameter, in the optimiser's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimiser = build_adamw(model, lr=1.0, betas=(0.9, 0.95), weight_decay=0.05, layer_decay=layer_decay)
    return [
        (names[id(parameter)], group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]


def by_the_rules(model: nn.Module, layer_decay: float | None, depth: int) -> list[tuple[str, float, float]]:
    """BEiT's rule as MAE has it: layer 0 is stem and tokens, then the blocks, then everything else."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or any(part in name for part in ("pos_embed", "cls_token", "mask_token"))
            bare = name.removeprefix("encoder.")
            block = re.match(r"blocks\.(\d+)\.", bare)
            stem = bare.startswith(("cls_token", "pos_embed", "patch_embed"))
            layer = int(block[1]) + 1 if block else 0 if stem else depth + 1
            scale = 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer)
            found.append((name, 0.0 if plain else 0.05, scale))
    return sorted(found, key=lambda row: (row[1] == 0.0, row[2]))  # the order of a gradient's norm, to the last bit


def vit(classes: int = 3, **options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=3, num_classes=classes, **options)  # type: ignore[no-any-return]


def upernet() -> nn.Module:
    encoder = vit(0)
    encoder.norm = nn.Identity()
    return UperNet(encoder, (0, 1, 1, 2), 8, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "depth", "layer_decay"),
    [
        (lambda: vit(), 3, None),
        (lambda: build_student(SIZES, DecoderSettings(width=16, depth=1, heads=2), 8), 1, None),
        (lambda: vit(global_pool="avg"), 3, 0.65),
        (lambda: vit(global_pool="avg"), 3, 1.0),
        (upernet, 3, 0.65),
    ],
    ids=["vit", "student", "classifier", "classifier without layer decay", "UperNet"],
)
def test_groups_by_name_are_those_of_the_rules(model: object, depth: int, layer_decay: float | None) -> None:
    built = model()  # type: ignore[operator]
    assert groups_by_name(built, layer_decay) == by_the_rules(built, layer_decay, depth)


def test_positions_that_are_fixed_are_in_no_group() -> None:
    found = {name for name, _, _ in groups_by_name(build_student(SIZES, DecoderSettings(width=16, heads=2), 8), None)}
    assert "encoder.cls_token" in found
    assert not [name for name in found if "pos_embed" in name]
