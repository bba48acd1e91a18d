"""The linear probe on data of which the best possible accuracy is known."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from milan_pipe.config.evaluation import LinearProbeSettings
from milan_pipe.errors import DataError, SettingError
from milan_pipe.evaluation.features import LabelledFeatures
from milan_pipe.evaluation.linear_probe import _held_out, linear_probe_accuracy


def two_gaussians(seed: int, samples: int, width: int = 5, distance: float = 2.0) -> LabelledFeatures:
    """Unit normals `distance` apart along the diagonal; the best classifier is right in Phi(distance / 2)."""
    label = torch.arange(samples) % 2
    noise = torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))
    return LabelledFeatures(features_NF=noise + label[:, None] * distance / math.sqrt(width), label_N=label)


def changed(data: LabelledFeatures, scale: torch.Tensor, shift: torch.Tensor) -> LabelledFeatures:
    return LabelledFeatures(features_NF=data.features_NF * scale + shift, label_N=data.label_N)


def test_reaches_nearly_the_best_possible() -> None:
    result = linear_probe_accuracy(two_gaussians(0, 1000), two_gaussians(1, 4000), LinearProbeSettings())
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert result.accuracy == pytest.approx(best, abs=0.02)
    assert result.train_accuracy == pytest.approx(best, abs=0.04)
    assert result.l2 in LinearProbeSettings().l2
    assert result.converged


def test_separable_classes_are_all_right() -> None:
    label = torch.arange(60) % 3
    features = torch.eye(3)[label] + 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    data = LabelledFeatures(features_NF=features, label_N=label * 10)
    result = linear_probe_accuracy(data, data, LinearProbeSettings())
    assert (result.accuracy, result.train_accuracy) == (1.0, 1.0)
    assert result.l2 == max(LinearProbeSettings().l2)  # the strongest of equals


def test_scale_and_shift_of_a_feature_do_not_matter() -> None:
    train, test = two_gaussians(0, 300), two_gaussians(1, 500)
    # Powers of two and small whole numbers: the changed features are nearly exact.
    scale, shift = torch.tensor([1 / 1024, 1.0, 4.0, 2048.0, -8.0]), torch.tensor([0.0, 3.0, -7.0, 64.0, 1.0])
    plain = linear_probe_accuracy(train, test, LinearProbeSettings())
    other = linear_probe_accuracy(changed(train, scale, shift), changed(test, scale, shift), LinearProbeSettings())
    assert other.l2 == plain.l2
    assert other.accuracy == pytest.approx(plain.accuracy, abs=1 / 500)


def test_constant_features_are_harmless() -> None:
    train, test = two_gaussians(0, 300), two_gaussians(1, 500)

    def padded(data: LabelledFeatures, value: float) -> LabelledFeatures:
        constant = torch.full((len(data.label_N), 1), value)
        return LabelledFeatures(features_NF=torch.cat([data.features_NF, constant], dim=1), label_N=data.label_N)

    plain = linear_probe_accuracy(train, test, LinearProbeSettings())
    other = linear_probe_accuracy(padded(train, 0.1), padded(test, 0.1), LinearProbeSettings())
    assert other.accuracy == pytest.approx(plain.accuracy, abs=1 / 500)


def test_random_labels_give_chance() -> None:
    generator = torch.Generator().manual_seed(3)
    train, test = (
        LabelledFeatures(
            features_NF=torch.randn(samples, 4, generator=generator),
            label_N=torch.randint(0, 4, (samples,), generator=generator),
        )
        for samples in (800, 2000)
    )
    assert linear_probe_accuracy(train, test, LinearProbeSettings()).accuracy == pytest.approx(0.25, abs=0.05)


def test_a_stop_before_the_end_is_told_and_raises_no_warning() -> None:
    train = two_gaussians(0, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = linear_probe_accuracy(train, train, LinearProbeSettings(max_iterations=1, l2=(1e-4,)))
    assert not result.converged
    assert result.l2 == 1e-4


def test_same_arguments_same_result() -> None:
    train, test = two_gaussians(0, 100), two_gaussians(1, 100)
    assert linear_probe_accuracy(train, test, LinearProbeSettings()) == linear_probe_accuracy(
        train, test, LinearProbeSettings()
    )


def test_classes_that_train_lacks_are_named() -> None:
    train = two_gaussians(0, 20)
    test = LabelledFeatures(features_NF=train.features_NF, label_N=train.label_N * 6)
    with pytest.raises(DataError, match="no train image has"):
        linear_probe_accuracy(train, test, LinearProbeSettings())


def test_too_little_to_fit() -> None:
    one_class = LabelledFeatures(features_NF=torch.ones(3, 2), label_N=torch.tensor([4, 4, 4]))
    with pytest.raises(DataError, match="of class 4"):
        linear_probe_accuracy(one_class, one_class, LinearProbeSettings())
    singles = LabelledFeatures(features_NF=torch.eye(3), label_N=torch.arange(3))
    with pytest.raises(DataError, match="give one l2"):
        linear_probe_accuracy(singles, singles, LinearProbeSettings())
    assert linear_probe_accuracy(singles, singles, LinearProbeSettings(l2=(1e-2,))).accuracy == 1.0


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.95])
def test_held_out_part(fraction: float) -> None:
    label = np.random.default_rng(0).permutation(np.repeat([0, 3, 4, 9], [100, 40, 59, 1]))
    held = _held_out(label, fraction, seed=0)
    assert held.sum() == round(fraction * 200)
    assert set(label[~held]) == {0, 3, 4, 9}
    shares = [held[label == name].mean() for name in (0, 3, 4)]
    assert max(shares) - min(shares) < 0.04
    np.testing.assert_array_equal(held, _held_out(label, fraction, seed=0))
    assert (held != _held_out(label, fraction, seed=1)).any()


@pytest.mark.parametrize("values", [{"l2": []}, {"l2": [0]}, {"validation_fraction": 1}, {"max_iterations": 0}])
def test_settings_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        LinearProbeSettings.parse(values, "linear_probe")
