"""The encoder: timm's names and numbers, visible patches only, settings that cannot work."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.testing import assert_close

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import SettingError, ShapeError
from milan_pipe.student.encoder import build_encoder, encode_all, encode_visible, grid_of, sincos_position_embedding
from milan_pipe.student.masking import MaskSplit, draw_split, mask_noise
from milan_pipe.student.model import MaskedStudent, build_student

SMALL = {"image_size": 24, "patch_size": 6, "width": 32, "depth": 2, "heads": 2}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    built = build_encoder(StudentSettings(**SMALL))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


@pytest.fixture
def images():
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def all_kept(batch, patches):
    return MaskSplit(*torch.arange(patches).expand(batch, patches).tensor_split([patches], dim=1))


def test_state_dict_loads_in_timm_and_gives_the_same_features(encoder, images):
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=24, patch_size=6, embed_dim=32, depth=2, num_heads=2
    )
    model.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        assert_close(encode_all(encoder, images), model.forward_features(images), rtol=0, atol=0)


def test_all_patches_visible_equals_encode_all(encoder, images):
    assert_close(encode_visible(encoder, images, all_kept(3, 16)), encode_all(encoder, images))


def test_visible_equals_the_slow_way_with_gradients(encoder, images):
    """Against timm's own convolution and blocks: embed everything, add positions, then drop the masked."""
    encoder.double()
    images = images.double().requires_grad_()
    split = draw_split(torch.rand(3, 16), mask_noise(0, 0, ["a", "b", "c"], 16), 4)
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    rows = [sample[[0, *(keep + 1).tolist()]] for sample, keep in zip(tokens, split.keep_BV, strict=True)]
    slow = encoder.norm(encoder.blocks(torch.stack(rows)))
    fast = encode_visible(encoder, images, split)
    assert fast.shape == (3, 5, 32)
    assert_close(fast, slow)
    inputs = [images, *(p for p in encoder.parameters() if p.requires_grad)]
    weight = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((slow * weight).sum(), inputs),
        strict=True,
    ):
        assert_close(a, b)


def test_masked_pixels_are_not_seen(encoder, images):
    split = draw_split(None, mask_noise(0, 0, ["a", "b", "c"], 16), 4)
    masked = split.masked_map().reshape(3, 1, 4, 1, 4, 1).expand(3, 3, 4, 6, 4, 6).reshape(3, 3, 24, 24)
    changed = torch.where(masked, torch.randn_like(images), images)
    with torch.no_grad():
        assert_close(encode_visible(encoder, changed, split), encode_visible(encoder, images, split), rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing(encoder, images):
    split = draw_split(None, mask_noise(0, 0, ["a", "b", "c"], 16), 4)
    plain = encode_visible(encoder, images, split)
    encoder.set_grad_checkpointing()
    again = encode_visible(encoder, images, split)
    assert_close(again, plain, rtol=0, atol=0)
    again.sum().backward()


def test_compiles_whole():
    student = build_student(StudentSettings(**SMALL), DecoderSettings(width=16, depth=1), 10)
    images, split = torch.randn(2, 3, 24, 24), draw_split(None, mask_noise(0, 0, ["a", "b"], 16), 4)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    assert_close(compiled(images, split), student(images, split))


def test_position_embedding_against_its_formula():
    width, rows, columns = 16, 3, 5
    table = sincos_position_embedding(width, rows, columns)
    assert table.shape == (1, 1 + rows * columns, width)
    assert float(table[0, 0].abs().max()) == 0
    for row, column, channel in [(0, 0, 0), (2, 4, 1), (1, 3, 5), (2, 1, 9), (1, 4, 14), (2, 3, 15)]:
        place = column if channel < 8 else row
        angle = place / 10000 ** ((channel % 4) / 4)
        wave = math.sin if channel % 8 < 4 else math.cos
        assert float(table[0, 1 + row * columns + column, channel]) == pytest.approx(wave(angle), abs=1e-6)


def test_fresh_weights_are_maes():
    encoder = build_encoder(StudentSettings(**SMALL))
    table = sincos_position_embedding(32, 4, 4)
    assert_close(encoder.pos_embed.detach(), table, rtol=0, atol=0)
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == ["pos_embed"]
    for weight in (encoder.blocks[0].attn.qkv.weight, encoder.patch_embed.proj.weight):
        flat = weight.detach().flatten(1)
        bound = math.sqrt(6 / sum(flat.shape))
        assert 0.9 * bound < float(flat.abs().max()) <= bound
        assert float(flat.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert all(float(p.detach().abs().max()) == 0 for name, p in encoder.named_parameters() if name.endswith("bias"))
    assert 0.01 < float(encoder.cls_token.detach().std()) < 0.03


def test_the_models_own_sizes():
    settings = StudentSettings(
        model="vit_tiny_patch16_224", image_size=32, patch_size=None, width=None, depth=1, heads=None
    )
    assert grid_of(settings) == (2, 2)
    encoder = build_encoder(settings)
    assert (encoder.embed_dim, encoder.blocks[0].attn.num_heads, math.prod(grid_of(settings))) == (192, 3, 4)
    assert encoder.patch_embed.proj.weight.device.type == "cpu"
    assert encoder.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "vit_tiny_patch16_242"}, r"did you mean.*vit_tiny_patch16_224"),
        ({"model": "qqqqqqqq"}, "list_models"),
        ({"image_size": 25}, "no multiple of the patch"),
        ({"patch_size": None}, "no multiple of the patch, 16 x 16"),
        ({"heads": 5}, "heads"),
        ({"width": 30, "heads": 3}, "multiple of 4"),
        ({"model": "resnet18"}, "is a ResNet"),
        ({"model": "deit_tiny_distilled_patch16_224"}, "is a VisionTransformerDistilled"),
        ({"model": "vit_relpos_small_patch16_224"}, "is a VisionTransformerRelPos"),
        ({"model": "vit_intern300m_patch14_448"}, "has no norm after its blocks"),
        ({"model": "vit_pe_spatial_tiny_patch16_512"}, "has no norm after its blocks"),
        ({"model": "vit_small_patch16_rope_224", "width": 28}, "multiples of 4"),
        ({"model": "vit_small_patch16_dinov3", "width": 28}, "width 28 is not divided into 2 multiples of 4"),
        ({"model": "vit_tiny_r_s16_p8_224", "patch_size": 1}, "embeds its patches with a HybridEmbed"),
    ],
)
def test_settings_that_cannot_work(change, match):
    with pytest.raises(SettingError, match=match):
        build_encoder(StudentSettings(**{**SMALL, **change}))


def test_shapes_that_do_not_fit_are_refused(encoder, images):
    for wrong in (images[:, :2], images[..., :18], images[0]):
        with pytest.raises(ShapeError, match=r"expected \(B, 3, 24, 24\)"):
            encode_all(encoder, wrong)
        with pytest.raises(ShapeError, match=r"expected \(B, 3, 24, 24\)"):
            encode_visible(encoder, wrong, all_kept(3, 16))
    for split in (all_kept(3, 9), all_kept(2, 16)):
        with pytest.raises(ShapeError, match="split is for"):
            encode_visible(encoder, images, split)


def test_encoder_and_decoder_must_fit(encoder):
    other = build_student(StudentSettings(**{**SMALL, "patch_size": 8}), DecoderSettings(), 10)
    with pytest.raises(ShapeError, match="decoder is for grid"):
        MaskedStudent(encoder, other.decoder)
