"""Losses and the pixel target against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from milan_pipe.errors import ShapeError
from milan_pipe.student.loss import feature_loss, masked_loss, pixel_target
from milan_pipe.student.masking import MaskSplit


def test_feature_loss_is_the_distance_of_unit_vectors():
    prediction, target = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    unit_a = prediction / prediction.norm(dim=-1, keepdim=True)
    unit_b = target / target.norm(dim=-1, keepdim=True)
    assert_close(feature_loss(prediction, target), ((unit_a - unit_b) ** 2).sum(dim=-1).mean())


def test_feature_loss_ignores_length_and_spans_0_to_4():
    vectors = torch.randn(2, 5, 7)
    assert float(feature_loss(vectors, 3 * vectors)) == pytest.approx(0, abs=1e-6)
    assert float(feature_loss(vectors, -0.1 * vectors)) == pytest.approx(4, abs=1e-6)


def test_feature_loss_in_half_precision_is_computed_in_full():
    prediction, target = torch.full((1, 2, 8), 300.0, dtype=torch.float16), torch.ones(1, 2, 8)
    loss = feature_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_feature_loss_of_a_zero_vector_is_finite():
    prediction = torch.zeros(1, 2, 8, requires_grad=True)
    loss = feature_loss(prediction, torch.ones(1, 2, 8))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2)
    assert bool(prediction.grad.isfinite().all())


def test_feature_loss_refuses_other_shapes():
    with pytest.raises(ShapeError, match="output width"):
        feature_loss(torch.zeros(1, 2, 8), torch.zeros(1, 2, 9))


def test_pixel_target_patch_by_patch():
    images = torch.rand(2, 3, 4, 6)
    target = pixel_target(images, 2)
    assert target.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            patch = images[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            values = torch.stack([patch[:, y, x] for y in range(2) for x in range(2)]).flatten()
            expected = (values - values.mean()) / torch.sqrt(values.var(unbiased=True) + 1e-6)
            assert_close(target[1, row * 3 + column], expected)


def test_pixel_target_of_a_flat_patch_is_zero():
    assert float(pixel_target(torch.full((1, 3, 4, 4), 0.5), 4).abs().max()) == 0


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 5, 4), (1, 3, 4, 5)])
def test_pixel_target_refuses_other_shapes(shape):
    with pytest.raises(ShapeError, match="multiples of 4"):
        pixel_target(torch.zeros(shape), 4)


def test_masked_loss_counts_masked_patches_only():
    order = torch.stack([torch.randperm(6) for _ in range(2)])
    split = MaskSplit(*order.tensor_split([2], dim=1))
    prediction = torch.randn(2, 7, 12, requires_grad=True)
    target = torch.randn(2, 6, 12)
    loss = masked_loss(prediction, target, split)
    mask = split.masked_map().float()
    per_patch = ((prediction[:, 1:] - target) ** 2).mean(dim=-1)
    assert_close(loss, (per_patch * mask).sum() / mask.sum())
    loss.backward()
    touched = prediction.grad.abs().sum(dim=-1) > 0
    assert torch.equal(touched[:, 1:], split.masked_map())
    assert not bool(touched[:, 0].any())


def test_masked_loss_refuses_what_does_not_fit():
    split = MaskSplit(*torch.arange(6).expand(2, 6).tensor_split([2], dim=1))
    with pytest.raises(ShapeError, match="CLS in the prediction only"):
        masked_loss(torch.zeros(2, 6, 12), torch.zeros(2, 6, 12), split)
    with pytest.raises(ShapeError, match="CLS in the prediction only"):
        masked_loss(torch.zeros(2, 7, 12), torch.zeros(2, 6, 12), MaskSplit(split.keep_BV[:1], split.masked_BM[:1]))
    all_visible = MaskSplit(*torch.arange(6).expand(2, 6).tensor_split([6], dim=1))
    with pytest.raises(ShapeError, match="all 6 patches are visible"):
        masked_loss(torch.zeros(2, 7, 12), torch.zeros(2, 6, 12), all_visible)
