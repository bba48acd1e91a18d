"""Small models of timm with random weights, in its own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

_SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", _SMALL_VIT),
    "registers": ("vit_small_patch14_reg4_dinov2", _SMALL_VIT),
    "rotary": ("vit_small_patch16_dinov3", _SMALL_VIT),
    "no class token": ("vit_wee_patch16_reg1_gap_256", _SMALL_VIT),
    "attention pooling": ("vit_base_patch16_siglip_224", _SMALL_VIT),
    "two tokens": ("deit_tiny_distilled_patch16_224", _SMALL_VIT),
    "map": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 16]}),
    "map, channels last": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]},
    ),
    "no patches": ("pit_ti_224", {"img_size": 32, "depth": (1, 1, 1), "base_dims": (8, 8, 8), "heads": (1, 1, 1)}),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def timm_folder(folder: Path, kind: str = "plain", side: int = 32) -> Path:
    """Write a model with mean and std of its own, as timm writes it."""
    name, arguments = MODELS[kind]
    torch.manual_seed(5)
    model: Any = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.pretrained_cfg |= {"mean": MEAN, "std": STD, "input_size": (3, side, side)}
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder
