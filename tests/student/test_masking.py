"""Masks: their distribution, purity, edge cases, and the record that carries them."""

from __future__ import annotations

from hashlib import blake2b
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from milan_pipe.config.student import MaskSettings
from milan_pipe.errors import DataError, SettingError, ShapeError
from milan_pipe.student.masking import MaskSplit, block_noise, draw_split, mask_noise, noise_for, visible_count

WEIGHTS = [0.4, 0.05, 0.25, 0.1, 0.2]
DRAWS = 12_000


def set_probabilities(weights, visible):
    """Probability of every set of `visible` successive draws without replacement, by enumerating their orders."""
    result = {}
    for chosen in combinations(range(len(weights)), visible):
        total = 0.0
        for order in permutations(chosen):
            left, probability = sum(weights), 1.0
            for item in order:
                probability *= weights[item] / left
                left -= weights[item]
            total += probability
        result[chosen] = total
    return result


def chi_square(split, probabilities):
    rows, counts = np.unique(split.keep_BV.numpy(), axis=0, return_counts=True)
    found = dict(zip(map(tuple, rows.tolist()), counts.tolist(), strict=True))
    assert found.keys() <= probabilities.keys()
    expected = {chosen: probability * split.batch for chosen, probability in probabilities.items()}
    return sum((found.get(chosen, 0) - count) ** 2 / count for chosen, count in expected.items())


@pytest.fixture(scope="module")
def noise():
    return mask_noise(5, 0, [f"sample-{i}" for i in range(DRAWS)], len(WEIGHTS))


# Critical values at p = 0.001: one less degree of freedom than there are sets (4 for 5 sets, 9 for 10 sets).
@pytest.mark.parametrize(("visible", "critical"), [(1, 18.47), (2, 27.88), (3, 27.88), (4, 18.47)])
@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["semantic", "random"])
def test_draws_follow_the_importance(noise, visible, critical, weights):
    importance = None if weights is None else torch.tensor(weights).expand(DRAWS, -1)
    split = draw_split(importance, noise, visible)
    probabilities = set_probabilities(weights or [0.2] * 5, visible)
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert chi_square(split, probabilities) < critical


def test_the_chi_square_test_sees_a_wrong_distribution(noise):
    split = draw_split(torch.tensor(WEIGHTS).expand(DRAWS, -1), noise, 2)
    assert chi_square(split, set_probabilities([0.37, 0.08, 0.25, 0.1, 0.2], 2)) > 27.88


def test_scale_and_type_of_importance_do_not_matter(noise):
    importance = torch.tensor([0.5, 0.25, 1.0, 2.0, 4.0]).expand(DRAWS, -1)
    expected = draw_split(importance, noise, 2)
    for other in (importance * 2**-10, importance.half(), importance.double(), importance.bfloat16()):
        assert torch.equal(draw_split(other, noise, 2).keep_BV, expected.keep_BV)


def test_noise_is_gumbel():
    noise = mask_noise(0, 0, [str(i) for i in range(400)], 196)
    assert noise.dtype == torch.float32
    assert noise.shape == (400, 196)
    # Mean is Euler's constant, variance pi^2 / 6; 78400 values put the standard errors below 0.005 and 0.013.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.05)


def test_noise_is_a_pure_function_of_seed_epoch_and_key():
    keys = ["a", "b", "ü/\U0001f600", "12", ""]
    together = mask_noise(3, 7, keys, 16)
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(mask_noise(3, 7, [key], 16)[0], row)
    assert torch.equal(mask_noise(3, 7, keys[::-1], 16), together.flip(0))
    others = [mask_noise(4, 7, ["a"], 16), mask_noise(3, 8, ["a"], 16), mask_noise(37, 0, ["a"], 16), together[1:2]]
    for other in others:
        assert not torch.equal(other[0], together[0])
    assert not torch.equal(mask_noise(1, 11, ["1"], 16), mask_noise(11, 1, ["1"], 16))


def test_noise_equals_a_generator_of_its_own_for_each_sample():
    keys = ["a", "b"]
    for row, key in zip(mask_noise(-1, 2, keys, 7), keys, strict=True):
        digest = blake2b(f"-1:2:{key}".encode(), digest_size=16, person=b"milan-mask-1").digest()
        raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(7)
        uniform = np.array([(int(bits) // 2**12 + 0.5) / 2**52 for bits in raw])
        assert row.tolist() == pytest.approx((-np.log(-np.log(uniform))).tolist(), rel=1e-6)


def test_noise_never_changes_between_versions():
    """Pinned: a resumed run must meet the masks that it began with."""
    expected = [1.2970085, 0.2774118, 0.0332586, -0.9324619]
    assert mask_noise(0, 0, ["pinned"], 4)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_split_does_not_depend_on_neighbours():
    keys = [f"k{i}" for i in range(6)]
    importance = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    whole = draw_split(importance, mask_noise(0, 1, keys, 16), 4)
    for row in range(6):
        alone = draw_split(importance[row : row + 1], mask_noise(0, 1, [keys[row]], 16), 4)
        assert torch.equal(alone.keep_BV[0], whole.keep_BV[row])
        assert torch.equal(alone.masked_BM[0], whole.masked_BM[row])


def require_partition(split: MaskSplit) -> None:
    found = torch.cat([split.keep_BV, split.masked_BM], dim=1).sort(dim=1).values
    assert torch.equal(found, torch.arange(split.patches).expand_as(found))


def test_zeros_come_last_and_evenly(noise):
    importance = torch.zeros(DRAWS, 5, dtype=torch.float16)
    importance[:, 3] = 6e-8  # the smallest number that half precision holds
    split = draw_split(importance, noise, 2)
    require_partition(split)
    assert bool((split.keep_BV == 3).any(dim=1).all())
    partners = split.keep_BV[split.keep_BV != 3].bincount(minlength=5).float()
    kept = partners[[0, 1, 2, 4]]
    expected = DRAWS / 4
    assert float(((kept - expected) ** 2 / expected).sum()) < 16.27  # 3 degrees of freedom, p = 0.001


def test_all_zeros_are_drawn_as_random(noise):
    zeros = draw_split(torch.zeros(DRAWS, 5), noise, 2)
    even = draw_split(None, noise, 2)
    assert float((zeros.keep_BV == even.keep_BV).all(dim=1).float().mean()) > 0.999  # but for rounding


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_importance_that_is_no_weight_is_refused(bad):
    importance = torch.ones(1, 4)
    importance[0, 2] = bad
    with pytest.raises(DataError, match="importance"):
        draw_split(importance, mask_noise(0, 0, ["a"], 4), 2)


def test_shapes_that_do_not_fit_are_refused():
    noise = mask_noise(0, 0, ["a", "b"], 4)
    with pytest.raises(ShapeError, match="same grid"):
        draw_split(torch.ones(2, 9), noise, 2)
    for visible in (0, 5):
        with pytest.raises(ShapeError, match=f"V = {visible}"):
            draw_split(None, noise, visible)
    with pytest.raises(ShapeError, match="noise"):
        draw_split(None, noise[0], 2)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), batch=st.integers(0, 3), patches=st.integers(1, 30), seed=st.integers(-(2**70), 2**70))
def test_split_is_a_partition(data, batch, patches, seed):
    visible = data.draw(st.integers(1, patches))
    rows = st.lists(st.floats(0, 1, width=16), min_size=patches, max_size=patches)
    values = data.draw(st.none() | st.lists(rows, min_size=batch, max_size=batch))
    importance = None if values is None else torch.tensor(values, dtype=torch.float16).reshape(batch, patches)
    keys = data.draw(st.lists(st.text(), min_size=batch, max_size=batch))
    split = draw_split(importance, mask_noise(seed, 2, keys, patches), visible)
    require_partition(split)
    assert (split.batch, split.visible, split.patches) == (batch, visible, patches)
    for index in (split.keep_BV, split.masked_BM):
        assert bool((index.diff(dim=1) > 0).all())
    both = torch.cat([split.keep_BV, split.masked_BM], dim=1)
    assert torch.equal(both.gather(1, split.restore_index()), torch.arange(patches).expand(batch, patches))
    assert torch.equal(split.masked_map().sum(dim=1), torch.full((batch,), patches - visible))


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        (196, 0.75, 49),
        (16, 0.75, 4),
        (10, 0.9, 1),
        (10, 0.7, 3),
        (100, 0.93, 7),
        (64, 0.75, 16),
        (9, 2 / 3, 3),
        (7, 0.5, 3),
    ],
)
def test_visible_count(patches, ratio, visible):
    assert visible_count(patches, ratio) == visible


@given(patches=st.integers(2, 4096), hundredths=st.integers(1, 99))
def test_visible_count_is_the_exact_floor(patches, hundredths):
    exact = patches * (100 - hundredths) // 100
    if 0 < exact < patches:
        assert visible_count(patches, hundredths / 100) == exact
    else:
        with pytest.raises(SettingError, match="mask ratio"):
            visible_count(patches, hundredths / 100)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 16),
    columns=st.integers(1, 16),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 500),
)
@example(rows=6, columns=5, share=1.0, seed=2, epoch=0)
def test_block_masks_hide_as_many_in_every_sample_and_are_arithmetic(rows, columns, share, seed, epoch):
    patches = rows * columns
    masked = min(int(share * patches), patches - 1)
    keys = [f"k{number}" for number in range(3)]
    noise_BL = block_noise(seed, epoch, keys, (rows, columns), masked)
    assert torch.equal(noise_BL[[2, 0]], block_noise(seed, epoch, [keys[2], keys[0]], (rows, columns), masked))
    split = draw_split(None, noise_BL, patches - masked)
    assert torch.equal(split.masked_map(), noise_BL < 0)
    assert split.masked_BM.shape == (3, masked)


def test_block_masks_are_rectangles():
    count, masked = 4000, 78
    keys = [str(number) for number in range(count)]
    hidden_BRC = (block_noise(0, 0, keys, (14, 14), masked) < 0).reshape(count, 14, 14)
    # Of the patches beside a hidden one, nearly all are hidden too: far more than the 40 % of even masks.
    beside = (hidden_BRC[:, :, 1:] & hidden_BRC[:, :, :-1]).float().sum() / hidden_BRC[:, :, 1:].float().sum()
    assert 0.75 < float(beside) < 0.98
    share_RC = hidden_BRC.float().mean(dim=0)
    assert float(share_RC.mean()) == pytest.approx(masked / 196)
    # Rectangles inside the image reach its corners least.
    assert float(share_RC[0, 0]) < 0.1 < 0.5 < float(share_RC[7, 7])
    assert_close(share_RC, share_RC.flip(0, 1), atol=0.06, rtol=0)
    assert not torch.equal(block_noise(0, 1, keys, (14, 14), masked) < 0, hidden_BRC.flatten(1))


def test_all_patches_are_seen_at_ratio_0():
    masking = MaskSettings(kind="block", ratio=0)
    split = draw_split(None, noise_for(masking, 0, ["a"], (4, 4)), visible_count(16, 0))
    assert (split.visible, split.masked_BM.shape) == (16, (1, 0))


@pytest.mark.parametrize("ratio", [1.0, -1.0, float("nan")])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(SettingError, match="mask ratio"):
        visible_count(16, ratio)
    with pytest.raises(SettingError, match=r"params, mask\.ratio"):
        MaskSettings.parse({"ratio": ratio}, "params, mask")


def test_unknown_mode_and_key_are_refused():
    with pytest.raises(SettingError, match="kind"):
        MaskSettings.parse({"kind": "semantics"}, "mask")
    with pytest.raises(SettingError, match="did you mean 'ratio'"):
        MaskSettings.parse({"ration": 0.5}, "mask")


def test_the_record_checks_itself():
    good = torch.arange(4).reshape(1, 4)
    with pytest.raises(ShapeError, match="keep_BV"):
        MaskSplit(good.int(), good)
    with pytest.raises(ShapeError, match="masked_BM"):
        MaskSplit(good, good[0])
    with pytest.raises(ShapeError, match="rows"):
        MaskSplit(good, good.expand(2, 4))
    with pytest.raises(ShapeError, match="device"):
        MaskSplit(good, good.to("meta"))
