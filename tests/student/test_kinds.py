"""Students of every kind that timm's VisionTransformer and Eva build, against timm's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.testing import assert_close

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.student.encoder import Encoder, encode_all, encode_visible, sincos_position_embedding, timm_options
from milan_pipe.student.masking import MaskSplit, draw_split, mask_noise
from milan_pipe.student.model import MaskedStudent, build_student

KINDS = {
    "plain": "vit_tiny_patch16_224",
    "registers, SwiGLU, layer scale": "vit_small_patch14_reg4_dinov2",
    "class token without position": "deit3_small_patch16_224",
    "norm before the blocks": "vit_base_patch32_clip_224",
    "no class token": "vit_medium_patch16_gap_240",
    "no class token, a register, norm after the mean": "vit_little_patch16_reg1_gap_256",
    "attention pooling": "vit_base_patch16_siglip_224",
    "parallel blocks": "vit_dpwee_patch16_reg1_gap_256",
    "rotary and absolute, SwiGLU, norm after the mean": "eva02_tiny_patch14_224",
    "rotary, registers": "vit_small_patch16_dinov3",
    "rotary, a register, no class token": "vit_medium_patch16_rope_reg1_gap_256",
    "rotary of each block": "vit_small_patch16_rope_mixed_224",
    "rotary of each block and absolute": "vit_small_patch16_rope_mixed_ape_224",
    "rotary, attention pooling": "vit_pe_core_tiny_patch16_384",
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> tuple[StudentSettings, MaskedStudent]:
    settings = StudentSettings(model=request.param, image_size=16, patch_size=4, width=32, depth=2, heads=2)
    torch.manual_seed(0)
    student = build_student(settings, DecoderSettings(width=16, depth=1, heads=2), 5)
    with torch.no_grad():
        for parameter in student.encoder.parameters():  # zeros and tiny layer scales would hide what is mixed up
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return settings, student.eval().double()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masked(ratio_kept: int = 5) -> MaskSplit:
    return draw_split(None, mask_noise(0, 0, ["a", "b", "c"], 16), ratio_kept)


def of_timm(encoder: Encoder, output_BSD: Tensor) -> Tensor:
    """The token that stands for the image, and patches, from what timm's `forward_features` gives."""
    patches = output_BSD[:, encoder.num_prefix_tokens :]
    first = patches.mean(1, keepdim=True) if encoder.cls_token is None else output_BSD[:, :1]
    return torch.cat([first, patches], dim=1)


class Keep(nn.Module):
    """timm's patch dropout, with given patches."""

    def __init__(self, encoder: Encoder, keep_BV: Tensor) -> None:
        super().__init__()
        self.prefix, self.keep, self.says_which = encoder.num_prefix_tokens, keep_BV, isinstance(encoder, Eva)

    def forward(self, tokens_BSD: Tensor) -> Any:
        rows = [torch.cat([t[: self.prefix], t[self.prefix :][k]]) for t, k in zip(tokens_BSD, self.keep, strict=True)]
        return (torch.stack(rows), self.keep) if self.says_which else torch.stack(rows)


def test_everything_visible_is_timms_own_forward(kind: tuple[StudentSettings, MaskedStudent], images: Tensor) -> None:
    settings, student = kind
    encoder = student.encoder
    model: Any = timm.create_model(settings.model, num_classes=0, **timm_options(settings)).eval().double()
    model.load_state_dict(encoder.state_dict(), strict=True)
    everything = MaskSplit(torch.arange(16).expand(3, 16), torch.empty(3, 0, dtype=torch.long))
    with torch.no_grad():
        expected = of_timm(encoder, model.forward_features(images))
        assert_close(encode_all(encoder, images), expected, rtol=0, atol=0)
        assert_close(encode_visible(encoder, images, everything), expected, rtol=0, atol=1e-6)
        # What timm gives for the image as a whole is what the student's first token was trained as.
        if settings.model != "vit_small_patch16_dinov3":
            assert_close(model(images), expected[:, 0], rtol=0, atol=1e-6)


def test_masked_is_timms_own_patch_dropout_with_gradients(
    kind: tuple[StudentSettings, MaskedStudent], images: Tensor
) -> None:
    encoder, split = kind[1].encoder, masked()
    fast = encode_visible(encoder, images, split)
    before, encoder.patch_drop = encoder.patch_drop, Keep(encoder, split.keep_BV)
    try:
        slow = of_timm(encoder, encoder.forward_features(images))
    finally:
        encoder.patch_drop = before
    assert fast.shape == (3, 6, 32)
    assert_close(fast, slow)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    weight = torch.randn_like(fast)
    grads = [torch.autograd.grad((tokens * weight).sum(), trained) for tokens in (fast, slow)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


def test_a_step_reaches_every_weight(kind: tuple[StudentSettings, MaskedStudent], images: Tensor) -> None:
    """Also with activations computed again; a weight without gradient would stop training on several ranks."""
    student, found = kind[1], []
    for again in (False, True):
        student.checkpoint_activations(again)
        student.zero_grad()
        prediction = student(images, masked())
        assert prediction.shape == (3, 17, 5)
        prediction.square().sum().backward()
        assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
        found.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    student.checkpoint_activations(False)
    for first, second in zip(*found, strict=True):
        assert_close(first, second)


def test_fresh_weights(kind: tuple[StudentSettings, MaskedStudent]) -> None:
    settings = kind[0]
    torch.manual_seed(0)
    encoder = build_student(settings, DecoderSettings(width=16, depth=1, heads=2), 5).encoder
    torch.manual_seed(0)
    theirs = dict(timm.create_model(settings.model, num_classes=0, **timm_options(settings)).named_parameters())
    for name, own in encoder.named_parameters():
        if name in ("cls_token", "reg_token"):
            assert 0.01 < float(own.detach().std()) < 0.03
        elif "gamma" in name or "rope" in name:
            assert_close(own, theirs[name], rtol=0, atol=0)
        assert own.requires_grad == (name != "pos_embed")
    if encoder.pos_embed is not None:
        table = sincos_position_embedding(32, 4, 4)[:, 1:]
        prefix = encoder.pos_embed.shape[1] - 16
        assert_close(encoder.pos_embed[:, prefix:].detach(), table, rtol=0, atol=0)
        assert not encoder.pos_embed[:, :prefix].any()
