"""Codecs: how far a decoded feature may be off, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_pipe.config.targets import CodecSettings
from milan_pipe.errors import DataError, ShapeError
from milan_pipe.targets.codec import Float16Codec, Int8Codec, build_codec, codec_of, mean_cosine
from milan_pipe.targets.schema import CodecInfo


def features(seed, shape=(4, 17, 64), spread=1.0):
    """Gaussian, with a few strong dimensions, as CLIP features have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * spread
    values[..., :2] *= 3
    return values


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-1, 5), width=st.integers(1, 40))
def test_int8_is_within_half_a_step(seed, exponent, width):
    values = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    code, scale = Int8Codec().encode(values)
    assert code.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert code.shape == values.shape
    assert scale.shape == (3, 5)
    assert code.min() >= -127
    error = (Int8Codec().decode(code, scale) - values).abs()
    assert (error <= scale.float()[..., None] * 0.5 * (1 + 1e-4)).all()


def test_int8_uses_the_whole_range():
    code, _ = Int8Codec().encode(features(0))
    assert (code.abs().amax(dim=-1) >= 126).all()


@pytest.mark.parametrize("codec", [Int8Codec(), Float16Codec()], ids=["int8", "float16"])
def test_zero_token_stays_zero(codec):
    values = features(1)
    values[0, 3] = 0
    decoded = codec.decode(*codec.encode(values))
    assert torch.equal(decoded[0, 3], torch.zeros(64))
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("codec", [Int8Codec(), Float16Codec()], ids=["int8", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e8])
def test_unfit_features_are_refused(codec, bad):
    values = features(2)
    values[1, 2, 3] = bad
    with pytest.raises(DataError):
        codec.encode(values)


def test_float16_overflow_names_value_and_remedy():
    with pytest.raises(DataError, match="float16"):
        Float16Codec().encode(torch.full((1, 1, 4), 70000.0))
    code, _ = Float16Codec().encode(torch.full((1, 1, 4), 65504.0))
    assert torch.isfinite(code).all()
    assert torch.isfinite(Int8Codec().decode(*Int8Codec().encode(torch.full((1, 1, 4), 70000.0)))).all()


@pytest.mark.parametrize(("codec", "least"), [(Int8Codec(), 0.9999), (Float16Codec(), 0.999999)])
@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
def test_fidelity(codec, least, spread):
    values = features(3, (8, 65, 512), spread)
    decoded = codec.decode(*codec.encode(values))
    assert least <= mean_cosine(values, decoded) < 1


def test_mean_cosine_sees_the_seventh_digit():
    left = torch.tensor([[1.0, 0.0]])
    right = torch.tensor([[1.0, 1e-3]])
    assert mean_cosine(left, right) == pytest.approx(1 - 5e-7, abs=1e-9)


@pytest.mark.parametrize("name", ["int8", "float16"])
def test_found_again_by_its_header(name):
    codec = build_codec(CodecSettings(name=name))
    assert type(codec_of(codec.info)) is type(codec)
    code, scale = codec.encode(features(4))
    assert np.dtype(codec.dtype) == code.numpy().dtype
    assert codec.has_scale == (scale is not None)


@pytest.mark.parametrize("name", ["int8", "float16"])
def test_header_says_only_what_concerns_the_codec(name):
    settings = CodecSettings(name=name, quality=0.9, fit_samples=7, zstd_level=3)
    info = build_codec(settings).info
    assert info == CodecInfo(name=name, zstd_level=3)
    assert codec_of(info).info == info
    assert info.model_copy(update=settings.header_fields()) == info


def test_header_fields_tell_settings_apart():
    klt = CodecSettings(name="klt", quality=0.99).header_fields()
    assert klt == {"name": "klt", "zstd_level": 1, "quality": 0.99}
    assert CodecSettings(name="int8", quality=0.99).header_fields() == CodecSettings().header_fields()


def test_refusals():
    with pytest.raises(DataError, match="int3"):
        codec_of(CodecInfo(name="int3"))
    code, scale = Int8Codec().encode(features(5))
    with pytest.raises(ShapeError, match="found none"):
        Int8Codec().decode(code, None)
    with pytest.raises(ShapeError, match="found one"):
        Float16Codec().decode(code, scale)
