"""timm's towers inside open_clip against a slow, plain forward pass: every attention map whole, rotations by hand."""

from __future__ import annotations

from functools import partial

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from support.towers import sizes_of, tower_outputs
from timm.layers import LayerNorm
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from milan_pipe.errors import SettingError
from milan_pipe.teacher.tower import family_of

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


# --- the plain forward pass ---------------------------------------------------------------------------------------


def rotations(rows, columns, head_width, *, reference, offset=0.0, indexing="ij"):
    """Angle of each pair of channels at each patch: (L, head_width / 2)."""
    bands = [10000.0 ** (-band / (head_width // 4)) for band in range(head_width // 4)]
    angles = []
    for row in range(rows):
        for column in range(columns):
            position = [(row + offset) / rows * reference, (column + offset) / columns * reference]
            if indexing == "xy":
                position = position[::-1]
            angles.append([coordinate * band for coordinate in position for band in bands])
    return torch.tensor(angles)


def rotate(x, angles, half):
    """Turn each pair of channels, neighbours or `half` a head apart, by its angle."""
    x = x.clone()
    pairs = angles.shape[-1]
    first, second = (slice(0, pairs), slice(pairs, None)) if half else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first] = a * angles.cos() - b * angles.sin()
    x[..., second] = b * angles.cos() + a * angles.sin()
    return x


def project_heads(attention, x):
    """Queries, keys and values (B, heads, S, head width), from fused or split projections."""
    heads = attention.num_heads
    if attention.qkv is None:
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    else:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        parts = F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
    width = parts[0].shape[-1] // heads
    query, key, value = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return query, *(t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))


def attend(attention, x, angles):
    """Output, and the whole map (B, S, S), mean over heads."""
    query, key, value = project_heads(attention, x)
    if angles is not None:
        turn = partial(rotate, angles=angles, half=attention.rotate_half)
        patches = x.shape[1] - attention.num_prefix_tokens
        query = torch.cat([query[:, :, :-patches], turn(query[:, :, -patches:])], dim=2)
        key = torch.cat([key[:, :, :-patches], turn(key[:, :, -patches:])], dim=2)
    maps = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)
    out = attention.norm((maps @ value).transpose(1, 2).flatten(2))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj(out), maps.mean(dim=1)


def scaled(block, number, branch):
    """The block's layer scale, under timm's two names for it."""
    gamma = getattr(block, f"gamma_{number}", None)
    return getattr(block, f"ls{number}", torch.nn.Identity())(branch if gamma is None else gamma * branch)


def run_blocks(trunk, x, angles):
    for depth, block in enumerate(trunk.blocks):
        here = angles[depth] if isinstance(angles, list) else angles
        if isinstance(block, EvaBlockPostNorm):
            attended, maps = attend(block.attn, x, here)
            x = x + block.norm1(attended)
            x = x + block.norm2(block.mlp(x))
        else:
            attended, maps = attend(block.attn, block.norm1(x), here)
            x = x + scaled(block, 1, attended)
            x = x + scaled(block, 2, block.mlp(block.norm2(x)))
    return trunk.norm(x), maps


def embed(trunk, pixels, position=None):
    """Tokens that enter the blocks; `position` stands for the trunk's own embedding."""
    side = trunk.patch_embed.patch_size[0]
    conv = trunk.patch_embed.proj
    patches = F.unfold(pixels, side, stride=side).transpose(1, 2) @ conv.weight.flatten(1).T
    if conv.bias is not None:
        patches = patches + conv.bias
    position = trunk.pos_embed if position is None else position
    prefix = [t.expand(len(pixels), -1, -1) for t in (trunk.cls_token, trunk.reg_token) if t is not None]
    if trunk.no_embed_class:
        x = torch.cat([*prefix, patches if position is None else patches + position], dim=1)
    else:
        x = torch.cat([*prefix, patches], dim=1) + position
    return trunk.norm_pre(x)


def pool_by_attention(pool, tokens):
    heads = pool.num_heads
    key, value = pool.kv(tokens).chunk(2, dim=-1)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (pool.q(pool.latent), key, value))
    maps = (pool.q_norm(query) @ pool.k_norm(key).transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)
    out = pool.proj((maps @ value).transpose(1, 2).flatten(2))
    return out + pool.mlp(pool.norm(out)), maps.mean(dim=1)


def plain_outputs(visual, pixels, angles=None, position=None):
    trunk = visual.trunk
    tokens, maps = run_blocks(trunk, embed(trunk, pixels, position), angles)
    prefix = (trunk.cls_token is not None) + (0 if trunk.reg_token is None else trunk.reg_token.shape[1])
    summary, row = tokens[:, :1], maps[:, 0, prefix:]
    if trunk.global_pool == "map":
        # Perception Encoder's pooling attends to the CLS token too, that of timm's plain trunk never does.
        pooled = tokens if isinstance(trunk, Eva) else tokens[:, prefix:]
        summary, maps = pool_by_attention(trunk.attn_pool, pooled)
        row = maps[:, 0, pooled.shape[1] - tokens.shape[1] + prefix :]
    features = torch.cat([summary, tokens[:, prefix:]], dim=1)
    features = visual.head(trunk.head(trunk.fc_norm(features)))
    return features, row


# --- small towers, every variant of the real ones -----------------------------------------------------------------


def shake(module, amount=0.15):
    """Away from the initial values, which leave attention flat and many tensors without any effect."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn_like(parameter)


def wrap(trunk, **head):
    """The trunk inside open_clip's adapter."""
    settings = {"pool": trunk.global_pool, "proj": None, "embed_dim": 20, "image_size": 24, **head}
    trunk.default_cfg = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *_args, **_settings: trunk)
        visual = TimmModel("small", **settings).eval()
    shake(visual)
    return visual


def small(kind, **changes):
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 20}
    return kind(**{**sizes, "global_pool": "token", **changes})


EVA02 = {
    "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "mlp_ratio": 8 / 3,
    "use_rot_pos_emb": True, "ref_feat_shape": (4, 4),
}  # fmt: skip
PE = {
    "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "ref_feat_shape": (3, 3),
    "rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "norm_layer": partial(LayerNorm, eps=1e-5),
}  # fmt: skip
FIRST = {"reference": 4}
PERCEPTION = {"reference": 3, "offset": 1.0, "indexing": "xy"}

CASES = {
    "eva02": (Eva, EVA02, FIRST),
    "eva01": (Eva, {"init_values": 0.5}, None),
    "eva02 enormous": (Eva, {"use_post_norm": True}, None),
    "eva02 with registers": (Eva, {**EVA02, "num_reg_tokens": 2, "no_embed_class": True}, FIRST),
    "eva half rotation": (Eva, {**EVA02, "rope_rotate_half": True}, FIRST),
    "eva rotations of its own": (Eva, {"use_rot_pos_emb": True, "rope_type": "mixed", "num_reg_tokens": 1}, "learned"),
    "grouped queries": (
        Eva,
        {**PE, "num_heads": 6, "num_kv_heads": 2, "qkv_fused": False, "qk_norm": True},
        PERCEPTION,
    ),
    "perception encoder": (Eva, {**PE, "global_pool": "map", "attn_pool_num_heads": 4}, PERCEPTION),
    "plain": (VisionTransformer, {}, None),
    "plain as clip": (VisionTransformer, {"pre_norm": True, "no_embed_class": True, "init_values": 0.3}, None),
    "plain with registers": (VisionTransformer, {"reg_tokens": 4, "qk_norm": True, "fc_norm": True}, None),
    "one block": (VisionTransformer, {"depth": 1}, None),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map", "num_classes": 0}, None),
    "siglip 2 giant": (
        VisionTransformer,
        {"class_token": False, "global_pool": "map", "num_classes": 0, "embed_dim": 60, "mlp_ratio": 2.5},
        None,
    ),
    "map with prefix": (VisionTransformer, {"reg_tokens": 2, "global_pool": "map", "num_heads": 4}, None),
}


def angles_of(trunk, spec):
    """Angles for every block; where frequencies are learned, (heads, L, head width / 2) of each."""
    if spec is None:
        return None
    if spec != "learned":
        return rotations(*trunk.patch_embed.grid_size, trunk.embed_dim // trunk.blocks[0].attn.num_heads, **spec)
    rows, columns = trunk.patch_embed.grid_size
    across = torch.arange(columns).repeat(rows).float()
    down = torch.arange(rows).repeat_interleave(columns).float()
    x_first = trunk.rope.grid_indexing == "xy"
    one, two = trunk.rope.freqs
    axes = (across, down) if x_first else (down, across)
    return [axes[0][:, None] * f[:, None] + axes[1][:, None] * g[:, None] for f, g in zip(one, two, strict=True)]


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_is_the_plain_forward_pass(case):
    kind, changes, spec = CASES[case]
    # With others a first token of the enormous one may look at itself alone.
    torch.manual_seed(9)
    visual = wrap(small(kind, **changes))
    family_of(visual, case)
    pixels = torch.randn(2, 3, 24, 24)
    features, importance = tower_outputs(visual, pixels)
    plain_features, plain_importance = plain_outputs(visual, pixels, angles_of(visual.trunk, spec))
    width = 20 if changes.get("num_classes", 1) else visual.trunk.embed_dim
    assert features.shape == (2, 10, width)
    assert importance.shape == (2, 9)
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)
    # The first token is the image embedding, and the row has something to say.
    assert_close(features[:, 0], visual(pixels), **TOLERANCE)
    assert importance.std() > 3e-3
    total = importance.sum(dim=1)
    if visual.trunk.global_pool == "token" or kind is Eva:
        assert (total < 0.999).all()
    else:
        assert_close(total, torch.ones(2), **TOLERANCE)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@torch.inference_mode()
def test_projection_of_open_clip_is_applied_to_all_tokens(projection):
    visual = wrap(small(VisionTransformer), proj=projection, embed_dim=28)
    pixels = torch.randn(2, 3, 24, 24)
    features, _ = tower_outputs(visual, pixels)
    assert features.shape == (2, 10, 28)
    assert sizes_of(visual).width == 28
    assert_close(features, plain_outputs(visual, pixels)[0], **TOLERANCE)


# --- the towers that people name ----------------------------------------------------------------------------------


def by_name(name):
    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # One block is as another, and twelve take seconds to fill with numbers.
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"]).eval()
    assert len(visual.trunk.blocks) == 2
    with torch.no_grad():
        # Fresh projections leave attention flat, and EVA's head is scaled down to nothing.
        for key, parameter in visual.named_parameters():
            if "q_proj.weight" in key or "k_proj.weight" in key or "attn_pool.q." in key or "attn_pool.kv." in key:
                parameter *= 3
            if key == "trunk.head.weight":
                parameter *= 500
    return visual


@torch.inference_mode()
def test_eva02_b_16():
    visual = by_name("EVA02-B-16")
    family_of(visual, "EVA02-B-16")
    pixels = torch.randn(1, 3, 224, 224)
    features, importance = tower_outputs(visual, pixels)
    assert features.shape == (1, 197, 512)
    plain_features, plain_importance = plain_outputs(visual, pixels, rotations(14, 14, 64, reference=16))
    assert features.abs().mean() > 0.1
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)
    assert importance.std() > 1e-4


@torch.inference_mode()
def test_vit_b_16_siglip():
    visual = by_name("ViT-B-16-SigLIP")
    family_of(visual, "ViT-B-16-SigLIP")
    pixels = torch.randn(1, 3, 224, 224)
    features, importance = tower_outputs(visual, pixels)
    assert features.shape == (1, 197, 768)
    plain_features, plain_importance = plain_outputs(visual, pixels)
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)
    assert_close(importance.sum(dim=1), torch.ones(1), **TOLERANCE)
    assert importance.std() > 1e-4


# --- other input sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "spec"),
    [
        (Eva, {**EVA02, "ref_feat_shape": (16, 16)}, {"reference": 16}),
        (VisionTransformer, {"class_token": False, "global_pool": "map", "num_classes": 0}, None),
    ],
    ids=["eva02", "siglip"],
)
@torch.inference_mode()
def test_grid_of_16_becomes_14(kind, changes, spec):
    visual = wrap(small(kind, img_size=224, patch_size=14, depth=2, **changes), image_size=224)
    assert (sizes_of(visual).grid, sizes_of(visual).patch_size) == ((16, 16), (14, 14))
    trained = visual.trunk.pos_embed.clone()
    family_of(visual, "x").resize(visual, 196)
    assert sizes_of(visual).grid == (14, 14)
    prefix = visual.trunk.num_prefix_tokens
    square = trained[:, prefix:].unflatten(1, (16, 16)).permute(0, 3, 1, 2)
    square = F.interpolate(square, (14, 14), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    position = torch.cat([trained[:, :prefix], square], dim=1)
    angles = spec and rotations(14, 14, 16, **spec)
    pixels = torch.randn(1, 3, 196, 196)
    features, importance = tower_outputs(visual, pixels)
    plain_features, plain_importance = plain_outputs(visual, pixels, angles, position)
    assert features.shape[1] == 197
    assert_close(features, plain_features, **TOLERANCE)
    assert_close(importance, plain_importance, **TOLERANCE)


# --- what is never done -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("case", ["eva02", "eva02 enormous", "plain", "siglip"])
@torch.no_grad()
def test_no_map_of_all_tokens_is_made(case):
    kind, changes, _ = CASES[case]
    # 37 or 36 tokens: no other size of these towers.
    visual = wrap(small(kind, img_size=48, **changes), image_size=48)
    tokens = 36 + visual.trunk.num_prefix_tokens
    with ShapesMade() as made:
        tower_outputs(visual, torch.randn(2, 3, 48, 48))
    assert (2, 3, 1, tokens) in made.shapes
    assert not [shape for shape in made.shapes if shape[-2:] == (tokens, tokens)]


# --- what is refused ----------------------------------------------------------------------------------------------


class OtherTrunk(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("trunk", "why"),
    [
        (partial(small, VisionTransformer, global_pool="avg"), "pools by avg"),
        (partial(small, Eva, global_pool="avg"), "pools by avg"),
        (partial(small, VisionTransformer, global_pool="prr"), "pools by prr"),
        (partial(small, OtherTrunk), "OtherTrunk"),
        (partial(small, VisionTransformer, block_fn=ParallelScalingBlock), " ParallelScalingBlock"),
        (partial(small, VisionTransformer, block_fn=DiffParallelScalingBlock), "DiffParallelScalingBlock"),
        (partial(small, VisionTransformer, attn_layer="diff"), "DiffAttention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(trunk, why):
    visual = wrap(trunk())
    with pytest.raises(SettingError, match=why):
        family_of(visual, "thing")
