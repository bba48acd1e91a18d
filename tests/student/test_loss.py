"""Losses and the pixel target against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from milan_pipe.errors import ShapeError
from milan_pipe.student.loss import chosen_tokens, feature_loss, mse, pixel_target, smooth_l1
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


def split_of(visible: int, batch: int = 2) -> MaskSplit:
    order = torch.stack([torch.randperm(6) for _ in range(batch)])
    return MaskSplit(*order.tensor_split([visible], dim=1))


@pytest.mark.parametrize("tokens", ["all", "visible", "masked"])
@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize(
    ("distance", "plain"),
    [
        (mse, lambda p, t: ((p - t) ** 2).mean()),
        (smooth_l1, lambda p, t: torch.where((p - t).abs() < 1, (p - t) ** 2 / 2, (p - t).abs() - 0.5).mean()),
        (feature_loss, lambda p, t: (2 - 2 * torch.cosine_similarity(p, t, dim=-1)).mean()),
    ],
)
def test_a_loss_counts_its_tokens_only(tokens, has_cls, distance, plain):
    split = split_of(2)
    prediction = torch.randn(2, 7, 12, requires_grad=True)
    target = 2 * torch.randn(2, 7, 12)[:, 0 if has_cls else 1 :]
    loss = distance(*chosen_tokens(prediction, target, split, tokens))
    hidden = split.masked_map()
    of_patches = {"all": torch.ones_like(hidden), "visible": ~hidden, "masked": hidden}[tokens]
    with_cls = has_cls and tokens != "masked"
    wanted = torch.cat([torch.full((2, 1), with_cls), of_patches], dim=1)
    whole = target if has_cls else torch.cat([torch.zeros(2, 1, 12), target], dim=1)
    assert_close(loss, plain(prediction[wanted], whole[wanted]))
    loss.backward()
    assert torch.equal(prediction.grad.abs().sum(dim=-1) > 0, wanted)


def test_what_does_not_fit_is_refused():
    split = split_of(2)
    for prediction, target in ((6, 6), (7, 5), (7, 8)):
        with pytest.raises(ShapeError, match="CLS in the prediction"):
            chosen_tokens(torch.zeros(2, prediction, 12), torch.zeros(2, target, 12), split, "masked")
    with pytest.raises(ShapeError, match="output width"):
        chosen_tokens(torch.zeros(2, 7, 12), torch.zeros(2, 6, 13), split, "masked")
    with pytest.raises(ShapeError, match="one batch"):
        chosen_tokens(torch.zeros(2, 7, 12), torch.zeros(2, 6, 12), split_of(2, batch=1), "masked")
    with pytest.raises(ShapeError, match="all 6 patches are visible"):
        chosen_tokens(torch.zeros(2, 7, 12), torch.zeros(2, 6, 12), split_of(6), "masked")
