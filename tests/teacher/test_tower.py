"""The image tower: against the published reference, and against open_clip's own forward pass with full maps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from safetensors import safe_open
from support.towers import sizes_of, tower_outputs
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from milan_pipe.teacher.tower import family_of

SHARED = Path(__file__).parents[2].parent / "shared" / "oracle"
ORACLES = sorted(SHARED.glob("milan_oracle_*.safetensors"))
NO_ORACLE = f"no milan_oracle_*.safetensors under {SHARED}"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(
    "path",
    ORACLES or [pytest.param(None, marks=pytest.mark.skip(reason=NO_ORACLE))],
    ids=lambda path: path.stem if path else "none",
)
@torch.inference_mode()
def test_agrees_with_published_reference(path):
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = "teacher/visual."
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    width = weights["class_embedding"].shape[0]
    tower = VisionTransformer(
        image_size=int(meta["image_size"]),
        patch_size=weights["conv1.weight"].shape[-1],
        width=width,
        layers=int(meta["teacher_layers"]),
        heads=int(meta["teacher_heads"]),
        mlp_ratio=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        output_dim=weights["proj"].shape[1],
        act_layer=QuickGELU,
        norm_layer=partial(LayerNorm, eps=float(meta["layer_norm_eps_teacher"])),
    ).eval()
    tower.load_state_dict(weights)
    family_of(tower, "oracle")
    features, importance = tower_outputs(tower, tensors["io/images"])
    assert_close(features, tensors["io/teacher_features"], **TOLERANCE)
    assert_close(importance, tensors["io/importance"], **TOLERANCE)


def plain_outputs(tower, pixels):
    """open_clip's own forward pass; the last block's map from `multi_head_attention_forward` with all its weights."""
    seen = {}
    last = tower.transformer.resblocks[-1]
    hooks = [
        last.ln_1.register_forward_hook(lambda *call: seen.update(inside=call[-1])),
        tower.transformer.register_forward_hook(lambda *call: seen.update(tokens=call[-1])),
    ]
    tower(pixels)
    for hook in hooks:
        hook.remove()
    attn, x = last.attn, seen["inside"].transpose(0, 1)
    _, maps = F.multi_head_attention_forward(
        x, x, x, attn.embed_dim, attn.num_heads, attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0,
        attn.out_proj.weight, attn.out_proj.bias, training=False, need_weights=True, average_attn_weights=True,
    )  # fmt: skip
    return tower.ln_post(seen["tokens"]) @ tower.proj, maps[:, 0, 1:]


def small_tower(**changes):
    torch.manual_seed(3)
    sizes = {"image_size": 24, "patch_size": 8, "width": 48, "layers": 3, "heads": 3, "mlp_ratio": 4.0}
    tower = VisionTransformer(**{**sizes, "output_dim": 20, **changes}).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return tower


@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.3}, {"act_layer": QuickGELU}, {"layers": 1}], ids=str)
@torch.inference_mode()
def test_fast_path_is_the_plain_one_small(changes):
    tower = small_tower(**changes)
    pixels = torch.randn(3, 3, 24, 24)
    features, importance = tower_outputs(tower, pixels)
    plain_features, plain_importance = plain_outputs(tower, pixels)
    assert features.shape == (3, 10, 20)
    assert importance.shape == (3, 9)
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)
    assert_close(features[:, 0], tower(pixels), **TOLERANCE)
    assert importance.std() > 1e-3
    assert (importance.sum(dim=1) < 1).all()


@torch.inference_mode()
def test_fast_path_is_the_plain_one_vit_b_32():
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-32")
    # One block is as another, and twelve take seconds to fill with numbers.
    tower = _build_vision_tower(config["embed_dim"], {**config["vision_cfg"], "layers": 2}).eval()
    family_of(tower, "ViT-B-32")
    pixels = torch.randn(1, 3, 224, 224)
    features, importance = tower_outputs(tower, pixels)
    plain_features, plain_importance = plain_outputs(tower, pixels)
    assert features.shape == (1, 50, 512)
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)


def custom_outputs(tower, pixels):
    """By hand, for the one block of `tower`, of open_clip's own attention with all its norms."""
    block = tower.transformer.resblocks[0]
    attn = block.attn
    x = tower._embeds(pixels)
    query, key, value = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    query, key, value = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    maps = (attn.ln_q(query) @ attn.ln_k(key).transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)
    heads = maps @ value if attn.head_scale is None else maps @ value * attn.head_scale
    x = x + block.ln_attn(attn.out_proj(attn.ln_inner(heads.transpose(1, 2).flatten(2))))
    x = x + block.mlp(block.ln_2(x))
    return tower.ln_post(x) @ tower.proj, maps.mean(dim=1)[:, 0, 1:]


@pytest.mark.parametrize(
    "changes",
    [
        {"block_type": "custom"},
        {"qk_norm": True},
        {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
    ],
    ids=str,
)
@torch.inference_mode()
def test_custom_blocks(changes):
    tower = small_tower(layers=1, **changes)
    family_of(tower, "custom")
    pixels = torch.randn(3, 3, 24, 24)
    features, importance = tower_outputs(tower, pixels)
    plain_features, plain_importance = custom_outputs(tower, pixels)
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)
    assert_close(features[:, 0], tower(pixels), **TOLERANCE)
    assert importance.std() > 1e-3


@torch.inference_mode()
def test_norm_after_pooling_is_the_same_norm():
    before, after = small_tower(), small_tower(final_ln_after_pool=True)
    family_of(after, "after")
    pixels = torch.randn(2, 3, 24, 24)
    assert_close(tower_outputs(before, pixels)[0], tower_outputs(after, pixels)[0])
    assert_close(tower_outputs(after, pixels)[0][:, 0], after(pixels), **TOLERANCE)


class ShapesMade(TorchDispatchMode):
    """Shapes of all tensors that any operation gives."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        del types
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}], ids=str)
@torch.no_grad()
def test_no_map_of_all_tokens_is_made(changes):
    # 37 tokens: no other size of this tower.
    tower = small_tower(image_size=48, **changes)
    with ShapesMade() as made:
        tower_outputs(tower, torch.randn(2, 3, 48, 48))
    assert (2, 3, 1, 37) in made.shapes
    assert not [shape for shape in made.shapes if shape[-2:] == (37, 37)]


def test_sizes_are_read_from_the_tower():
    sizes = sizes_of(small_tower(image_size=32, output_dim=12))
    assert (sizes.image_size, sizes.patch_size, sizes.grid, sizes.width) == ((32, 32), (8, 8), (4, 4), 12)
    assert sizes_of(small_tower(image_size=(32, 24))).image_size == (32, 24)
