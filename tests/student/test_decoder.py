"""The fast decoders against slow ones written out: un-shuffling in every block, attention as a matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from milan_pipe.config.student import DecoderSettings
from milan_pipe.errors import SettingError, ShapeError
from milan_pipe.student.decoder import PlainDecoder, PromptingDecoder, build_decoder
from milan_pipe.student.encoder import sincos_position_embedding
from milan_pipe.student.masking import draw_split, mask_noise

WIDTH, HEADS, GRID, OUT = 16, 4, (3, 4), 10
PATCHES = GRID[0] * GRID[1]


def perturbed(kind, depth=2):
    """A float64 decoder in which no bias is zero and no norm is one, so that each of them shows."""
    torch.manual_seed(1)
    decoder = build_decoder(DecoderSettings(kind=kind, width=WIDTH, depth=depth, heads=HEADS), 20, GRID, OUT).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder


@pytest.fixture
def case():
    torch.manual_seed(2)
    split = draw_split(torch.rand(3, PATCHES), mask_noise(0, 0, ["a", "b", "c"], PATCHES), 5)
    return torch.randn(3, 6, 20, dtype=torch.float64, requires_grad=True), split


def norm(x, layer):
    return F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, 1e-6)


def mlp(x, layer):
    return F.gelu(x @ layer.fc1.weight.T + layer.fc1.bias) @ layer.fc2.weight.T + layer.fc2.bias


def attend(query, key, value):
    """Attention of one sample, head by head, with the whole matrix."""
    size = WIDTH // HEADS
    mixed = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        weights = (query[:, part] @ key[:, part].T / math.sqrt(size)).softmax(dim=-1)
        mixed.append(weights @ value[:, part])
    return torch.cat(mixed, dim=-1)


def slow(decoder, latent, split):
    """Sample by sample, always in raster order; the masked rows are replaced in every block."""
    results = []
    for row in range(latent.shape[0]):
        embedded = latent[row] @ decoder.decoder_embed.weight.T + decoder.decoder_embed.bias
        raster = [decoder.mask_token[0, 0]] * (PATCHES + 1)
        raster[0] = embedded[0]
        for place, patch in enumerate(split.keep_BV[row].tolist()):
            raster[1 + patch] = embedded[1 + place]
        tokens = torch.stack(raster) + decoder.decoder_pos_embed[0]
        is_masked = F.pad(split.masked_map()[row], (1, 0))[:, None]
        for block in decoder.decoder_blocks:
            if isinstance(decoder, PromptingDecoder):
                context = torch.where(is_masked, norm(tokens, block.norm1), tokens)
                query = norm(tokens, block.norm1) @ block.attn.q.weight.T + block.attn.q.bias
                key, value = (context @ block.attn.kv.weight.T + block.attn.kv.bias).split(WIDTH, dim=-1)
            else:
                both = norm(tokens, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
                query, key, value = both.split(WIDTH, dim=-1)
            new = tokens + attend(query, key, value) @ block.attn.proj.weight.T + block.attn.proj.bias
            new = new + mlp(norm(new, block.norm2), block.mlp)
            tokens = torch.where(is_masked, new, tokens) if isinstance(decoder, PromptingDecoder) else new
        final = norm(tokens, decoder.decoder_norm)
        results.append(final @ decoder.decoder_pred.weight.T + decoder.decoder_pred.bias)
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_fast_equals_slow_with_gradients(kind, case):
    latent, split = case
    decoder = perturbed(kind)
    inputs = [latent, *(p for p in decoder.parameters() if p.requires_grad)]
    fast_value, slow_value = decoder(latent, split), slow(decoder, latent, split)
    assert fast_value.shape == (3, PATCHES + 1, OUT)
    assert_close(fast_value, slow_value)
    weight = torch.randn_like(fast_value)
    fast_gradients = torch.autograd.grad((fast_value * weight).sum(), inputs)
    slow_gradients = torch.autograd.grad((slow_value * weight).sum(), inputs)
    for fast, slow_one in zip(fast_gradients, slow_gradients, strict=True):
        assert float(slow_one.abs().max()) > 0
        assert_close(fast, slow_one)


def test_prompts_pass_unchanged_and_do_not_see_each_other(case):
    latent, split = case
    decoder = perturbed("prompting")
    with torch.no_grad():
        prompt, _ = decoder._embed(latent, split)
        expected = decoder.decoder_pred(decoder.decoder_norm(prompt))
        prediction = decoder(latent, split)
        assert_close(prediction[:, 0], expected[:, 0])
        index = (split.keep_BV + 1).unsqueeze(-1).expand(-1, -1, OUT)
        assert_close(prediction.gather(1, index), expected[:, 1:])


def test_every_prompt_reaches_every_masked_token(case):
    latent, split = case
    decoder = perturbed("prompting", depth=1)
    prediction = decoder(latent, split)
    first_masked = int(split.masked_BM[0, 0])
    (gradient,) = torch.autograd.grad(prediction[0, 1 + first_masked].sum(), latent)
    assert bool((gradient[0].abs().sum(dim=-1) > 0).all())
    assert float(gradient[1:].abs().max()) == 0


def test_positions_are_fixed_and_named_as_published():
    decoder = build_decoder(DecoderSettings(), 20, GRID, OUT)
    assert not decoder.decoder_pos_embed.requires_grad
    assert_close(decoder.decoder_pos_embed.detach(), sincos_position_embedding(64, *GRID))
    heads = {name.split(".")[0] for name in decoder.state_dict()}
    published = {"mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert heads == published
    assert isinstance(decoder, PromptingDecoder)
    assert isinstance(build_decoder(DecoderSettings(kind="plain"), 20, GRID, OUT), PlainDecoder)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_shapes_that_do_not_fit_are_refused(kind, case):
    latent, split = case
    decoder = build_decoder(DecoderSettings(kind=kind, width=WIDTH), 20, GRID, OUT)
    for wrong in (latent[:, 1:], latent[:2], latent[..., :19], latent[0]):
        with pytest.raises(ShapeError, match="latent"):
            decoder(wrong.float(), split)
    with pytest.raises(ShapeError, match="3 x 3 = 9"):
        build_decoder(DecoderSettings(kind=kind, width=WIDTH), 20, (3, 3), OUT)(latent.float(), split)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_sizes_that_do_not_fit_are_refused(kind):
    with pytest.raises(SettingError, match="heads 3"):
        build_decoder(DecoderSettings(kind=kind, heads=3), 20, GRID, OUT)
    with pytest.raises(SettingError, match="multiple of 4"):
        build_decoder(DecoderSettings(kind=kind, width=6, heads=3), 20, GRID, OUT)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_half_precision_autocast_runs(kind, case):
    latent, split = case
    decoder = build_decoder(DecoderSettings(kind=kind, width=WIDTH), 20, GRID, OUT)
    plain = decoder(latent.float(), split)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = decoder(latent.float(), split)
    assert_close(half.float(), plain, rtol=0.1, atol=0.1)
