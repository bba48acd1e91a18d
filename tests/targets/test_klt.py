"""Codec `klt`: quality on unseen features, bytes, and what odd features do to it."""

from __future__ import annotations

import base64
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Zstd

from milan_pipe.config.targets import CodecSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, ShapeError
from milan_pipe.images.scenes import render_scene
from milan_pipe.targets.codec import build_codec, codec_of, mean_cosine
from milan_pipe.targets.klt import KltCodec, fit_klt
from milan_pipe.targets.schema import CodecInfo
from milan_pipe.teacher.clip import load_teacher


def features(seed, shape=(16, 17, 48), offset=1.0):
    """Gaussian of falling spectrum, off centre, in directions of their own; lengths from 5 to 20."""
    width = shape[-1]
    directions = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99)))[0]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) / torch.arange(1, width + 1)
    values[..., 0] += offset
    lengths = 5 + 15 * torch.rand(*shape[:-1], 1, generator=generator)
    return torch.nn.functional.normalize(values @ directions.T, dim=-1) * lengths


def round_trip(codec, values):
    return codec.decode(*codec.encode(values))


def bits_per_dimension(codec, values_pst):
    """Codes in chunks of some images and 32 coefficients, and scales, both after zstd, over (P, S, T)."""
    code, scale = codec.encode(values_pst)
    parts = [part.contiguous().numpy() for band in code.split(32, dim=-1) for part in band.split(32)]
    zstd = Zstd(level=1)
    return 8 * sum(len(zstd.encode(part)) for part in [*parts, scale.numpy()]) / values_pst.numel()


@pytest.fixture(scope="module")
def scenes():
    """Features (P, S, T) of the bundled teacher, of images that it was not trained on."""
    teacher = load_teacher(TeacherSettings(), torch.device("cpu"))
    pixels = np.stack([render_scene(7, index).image for index in range(288)])
    return torch.cat([teacher(batch).features_BST for batch in torch.from_numpy(pixels).split(64)])


@pytest.mark.parametrize(("quality", "most_bits"), [(0.99, 2.0), (0.999, 4.5), (0.9999, 8.0)])
def test_quality_and_bytes_on_the_scenes(scenes, quality, most_bits):
    unseen = scenes[192:]
    codec = fit_klt(scenes[:192], quality)
    decoded = round_trip(codec, unseen)
    assert quality <= mean_cosine(unseen, decoded) < 1 - 0.9 * (1 - quality)
    assert bits_per_dimension(codec, unseen) <= most_bits


@pytest.mark.parametrize("quality", [0.9, 0.99, 0.999, 0.9999])
def test_quality_is_reached_on_unseen_features(quality):
    codec = fit_klt(features(0, (64, 17, 48)), quality)
    unseen = features(1, (64, 17, 48))
    assert mean_cosine(unseen, round_trip(codec, unseen)) >= quality


def test_more_quality_takes_more_bytes():
    sample, unseen = features(0, (32, 17, 48)), features(1, (32, 17, 48))
    codecs = [fit_klt(sample, quality) for quality in (0.9, 0.97, 0.99, 0.995, 0.999, 0.9995, 0.9999)]
    sizes = [bits_per_dimension(codec, unseen) for codec in codecs]
    assert sizes == sorted(set(sizes))
    assert all(wider.step > finer.step for wider, finer in pairwise(codecs))


def test_lengths_survive():
    values = features(2) * torch.logspace(-3, 3, 16)[:, None, None]
    decoded = round_trip(fit_klt(features(0), 0.99), values)
    assert torch.allclose(decoded.norm(dim=-1), values.norm(dim=-1), rtol=1e-3)


def test_decoding_agrees_with_its_formula():
    codec = fit_klt(features(0), 0.999)
    code, scale = codec.encode(features(1))
    basis, mean = codec.basis_CT.astype(np.float64), codec.mean_T.astype(np.float64)
    expected = np.empty(code.shape)
    for place in np.ndindex(*code.shape[:-1]):
        unit = mean.copy()
        for number, row in zip(code[place].tolist(), basis, strict=True):
            unit += number * codec.step * row
        expected[place] = float(scale[place]) * unit
    np.testing.assert_allclose(codec.decode(code, scale).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_encoding_rounds_the_coefficients():
    codec = fit_klt(features(0), 0.999)
    values = features(1)
    unit = torch.nn.functional.normalize(values.double(), dim=-1) - torch.from_numpy(codec.mean_T).double()
    basis = torch.from_numpy(codec.basis_CT.astype(np.float64))
    exact = unit @ basis.T / basis.square().sum(dim=1) / codec.step
    assert exact.abs().max() < 127
    assert (codec.encode(values)[0] - exact).abs().max() < 0.501


def test_a_sample_in_batches_gives_the_same_codec():
    sample = features(0, (24, 150, 32))
    whole = fit_klt(sample, 0.999).info
    assert fit_klt(sample.split(7), 0.999).info == whole
    assert fit_klt(sample.clone(), 0.999).info == whole


def test_found_again_by_its_header():
    codec = build_codec(CodecSettings(name="klt", quality=0.995, zstd_level=3), features(0))
    again = codec_of(CodecInfo.model_validate_json(codec.info.model_dump_json()))
    assert again.info == codec.info
    assert (again.info.quality, again.info.zstd_level) == (0.995, 3)
    code, scale = codec.encode(features(1))
    assert code.dtype == torch.int8
    assert np.dtype(codec.dtype) == np.int8
    assert codec.has_scale
    assert codec.coefficient_major
    for ours, theirs in zip((code, scale), again.encode(features(1)), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(codec.decode(code, scale), again.decode(code, scale))


def test_the_neighbours_in_a_batch_do_not_matter():
    codec = fit_klt(features(0), 0.9999)
    values = features(1, (12, 17, 48))
    # A token out of range must not change how the others are coded.
    values[0, 0] = -torch.from_numpy(codec.mean_T)
    code, scale = codec.encode(values)
    alone = [codec.encode(image) for image in values]
    apart = torch.stack([code for code, _ in alone]).int() - code.int()
    assert apart.abs().max() <= 1
    assert (apart != 0).float().mean() < 1e-3
    assert torch.allclose(torch.stack([scale for _, scale in alone]).float(), scale.float(), rtol=2e-3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), quality=st.sampled_from([0.9, 0.99, 0.999, 0.9999]), offset=st.floats(-3, 3))
def test_directions_that_the_sample_never_had_survive(seed, quality, offset):
    """Codes end at 127; a vector that lies further out is coarser, never wrapped or cut off."""
    codec = fit_klt(features(0, offset=offset), quality)
    wild = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))
    wild[:48] = wild[:48] * 0.01 - torch.eye(48) * torch.sign(wild.diagonal())[:, None]
    code, _ = codec.encode(wild)
    assert code.min() >= -127
    decoded = round_trip(codec, wild)
    cosine = torch.nn.functional.cosine_similarity(wild, decoded, dim=-1)
    assert cosine.min() > 1 - 64 * (1 - quality)
    assert torch.allclose(decoded.norm(dim=-1), wild.norm(dim=-1), rtol=1e-3)


def test_out_of_range_vectors_point_where_they_should():
    # All of the sample in a narrow cone, so that the opposite direction is far out of range.
    codec = fit_klt(features(0, offset=20.0), 0.9999)
    opposite = -torch.from_numpy(codec.mean_T)[None]
    assert codec.encode(opposite)[0].abs().max() == 127
    assert mean_cosine(opposite, round_trip(codec, opposite)) > 0.99


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 2, 7), (1, 3, 40), (2, 1, 3), (3, 5, 33), (5, 300, 8), (1, 1, 1)])
def test_small_samples(shape):
    sample = features(0, shape)
    codec = fit_klt(sample, 0.999)
    assert mean_cosine(sample, round_trip(codec, sample)) > 0.995
    unseen = features(1, (4, 5, shape[-1]))
    # Where the sample told next to nothing, the step is still at most twice the one of a flat spectrum.
    assert mean_cosine(unseen, round_trip(codec, unseen)) > 0.99


@pytest.mark.parametrize("kind", ["constant", "one direction", "low rank", "dead dimensions", "some zero vectors"])
def test_degenerate_features(kind):
    sample = features(0)
    if kind == "constant":
        sample = sample[:1, :1].expand(16, 17, -1)
    elif kind == "one direction":
        sample = sample[:1, :1] * torch.linspace(-2, 2, 16 * 17).reshape(16, 17, 1)
    elif kind == "low rank":
        sample = sample[..., :3] @ features(5, (1, 3, 48))[0]
    elif kind == "dead dimensions":
        sample[..., 5:40] = 0
    else:
        sample[3:9, 2:] = 0
    codec = fit_klt(sample, 0.999)
    decoded = round_trip(codec, sample)
    known = sample.norm(dim=-1) > 0
    assert mean_cosine(sample[known], decoded[known]) >= 0.9985
    assert not decoded[~known].any()
    assert torch.isfinite(decoded).all()


def test_zero_and_very_small_vectors():
    codec = fit_klt(features(0), 0.999)
    values = features(1)
    values[0, 0] = 0
    values[1] *= 1e-6
    values[2] *= 1e-20
    values[3] *= 1e20
    values[3] *= 1e-18
    decoded = round_trip(codec, values)
    assert not decoded[0, 0].any()
    assert not codec.encode(values)[0][0, 0].any()
    for small in (1, 2, 3):
        assert mean_cosine(values[small], decoded[small]) > 0.995


@pytest.mark.parametrize(
    ("bad", "what"),
    [(float("nan"), "not finite"), (-float("inf"), "not finite"), (1e8, "use codec int8"), (3e38, "use codec int8")],
)
def test_unfit_features_are_refused(bad, what):
    codec = fit_klt(features(0), 0.99)
    values = features(1)
    values[1, 2, 3] = bad
    with pytest.raises(DataError, match=what):
        codec.encode(values)
    if what == "not finite":
        with pytest.raises(DataError, match=what):
            fit_klt(values, 0.99)


def test_a_sample_that_says_nothing_is_refused():
    with pytest.raises(DataError, match=r"zeros.*int8"):
        fit_klt(torch.zeros(4, 5, 6), 0.99)
    with pytest.raises(DataError, match="no features"):
        fit_klt([], 0.99)
    with pytest.raises(DataError, match="found none"):
        build_codec(CodecSettings(name="klt"))
    with pytest.raises(ShapeError, match=r"\(5, 6\)"):
        fit_klt(torch.ones(5, 6), 0.99)
    with pytest.raises(ShapeError, match="several"):
        fit_klt([torch.ones(2, 5, 6), torch.ones(2, 5, 7)], 0.99)


def test_quality_out_of_reach_says_what_was_reached():
    with pytest.raises(DataError, match=r"reaches .* 0\.9999\d+ "):
        fit_klt(features(0), 0.9999999)


@pytest.mark.parametrize("quality", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_quality_is_refused(quality):
    with pytest.raises(DataError, match="above 0 and below 1"):
        fit_klt(features(0), quality)
    with pytest.raises(ValueError, match="quality"):
        CodecSettings(name="klt", quality=quality)


@pytest.mark.parametrize("change", [{"mean": None}, {"basis": None}, {"step": None}, {"quality": None}])
def test_incomplete_header_is_refused(change):
    info = fit_klt(features(0), 0.99).info
    with pytest.raises(DataError, match="must all be"):
        codec_of(info.model_copy(update=change))


def test_damaged_header_is_refused():
    info = fit_klt(features(0), 0.99).info
    nan, zeros = np.full(48, np.nan, "<f4"), np.zeros(48 * 48, "<f2")
    for change, what in [
        ({"mean": "not base64!"}, "mean is not base64"),
        ({"basis": info.basis[:-3]}, "basis is not base64"),
        ({"basis": "ä" + info.basis[1:]}, "basis is not base64"),
        ({"mean": ""}, "mean has 0 bytes"),
        ({"mean": "AAAA"}, "mean has 3 bytes"),
        ({"mean": base64.b64encode(nan.tobytes()).decode()}, "not finite"),
        ({"basis": base64.b64encode(zeros.tobytes()).decode()}, "row of the basis is zero"),
        ({"mean": info.mean[: 4 * 16]}, "a mean of 12 needs 144"),
        ({"step": 0.0}, "out of range"),
        ({"step": float("nan")}, "out of range"),
        ({"quality": 1.5}, "out of range"),
    ]:
        with pytest.raises(DataError, match=what) as caught:
            codec_of(info.model_copy(update=change))
        assert len(str(caught.value)) < 200


def test_shapes_that_do_not_fit_are_refused():
    codec = fit_klt(features(0), 0.99)
    code, scale = codec.encode(features(1))
    with pytest.raises(ShapeError, match="found none"):
        codec.decode(code, None)
    with pytest.raises(ShapeError, match=r"48 wide"):
        codec.encode(torch.ones(2, 3, 47))
    with pytest.raises(ShapeError, match=r"48 wide"):
        codec.decode(code[..., :5], scale)


def test_half_precision_regions_leave_it_alone():
    codec = fit_klt(features(0), 0.9999)
    values = features(1)
    code, scale = codec.encode(values)
    with torch.autocast("cpu", torch.bfloat16):
        inside = codec.encode(values)
        decoded = codec.decode(code, scale)
    assert torch.equal(inside[0], code)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, codec.decode(code, scale))


def test_any_leading_shape():
    codec = fit_klt(features(0), 0.99)
    values = features(1, (2, 3, 4, 48))
    code, scale = codec.encode(values)
    assert code.shape == values.shape
    assert scale.shape == (2, 3, 4)
    assert codec.decode(code, scale).shape == values.shape
    assert codec.decode(*codec.encode(values[0, 0, 0])).shape == (48,)
    assert codec.decode(*codec.encode(values[:0])).shape == (0, 3, 4, 48)


def test_info_makes_the_same_codec_directly():
    codec = fit_klt(features(0), 0.99)
    again = KltCodec.of(codec.info)
    assert np.array_equal(again.mean_T, codec.mean_T)
    assert np.array_equal(again.basis_CT, codec.basis_CT)
    assert (again.step, len(again.mean_T)) == (codec.step, 48)
