"""Neighbours against a plain loop over all pairs."""

from __future__ import annotations

import math

import pytest
import torch

from milan_pipe.config.evaluation import KnnSettings
from milan_pipe.errors import DataError, SettingError
from milan_pipe.evaluation import knn
from milan_pipe.evaluation.features import LabelledFeatures
from milan_pipe.evaluation.knn import knn_accuracy


def draw(seed: int, samples: int, classes: int = 4, width: int = 6) -> LabelledFeatures:
    """Noisy classes under labels with gaps between them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    label = torch.arange(samples) % classes
    features = centres[label] + 1.2 * torch.randn(samples, width, generator=generator)
    return LabelledFeatures(features_NF=features, label_N=label * 5 + 2)


def slow_accuracy(train: LabelledFeatures, test: LabelledFeatures, count: int, temperature: float) -> float:
    right = 0
    for x, label in zip(test.features_NF.double(), test.label_N.tolist(), strict=True):
        pairs = [
            (float(x @ y) / float(x.norm() * y.norm()), other)
            for y, other in zip(train.features_NF.double(), train.label_N.tolist(), strict=True)
        ]
        votes: dict[int, float] = {}
        for cosine, other in sorted(pairs, reverse=True)[:count]:
            votes[other] = votes.get(other, 0.0) + math.exp(cosine / temperature)
        right += min(votes, key=lambda name: (-votes[name], name)) == label
    return right / len(test.label_N)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 300, 2**24])
def test_agrees_with_the_plain_loop(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_CHUNK_VALUES", chunk)
    train, test = draw(1, 60), draw(2, 41)
    found = knn_accuracy(train, test, KnnSettings(neighbours=(20, 1, 7, 60, 7), temperature=temperature))
    assert found == {count: slow_accuracy(train, test, count, temperature) for count in (1, 7, 20, 60)}
    assert list(found) == [1, 7, 20, 60]
    assert 0.3 < found[7] < 1


def test_separable_classes_are_all_right() -> None:
    label = torch.arange(40) % 4
    features = torch.eye(4)[label] + 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    data = LabelledFeatures(features_NF=features, label_N=label)
    # A temperature at which exp(cosine / temperature) itself is infinite.
    for temperature in (0.07, 1e-4):
        assert knn_accuracy(data, data, KnnSettings(neighbours=(1, 10), temperature=temperature)) == {1: 1.0, 10: 1.0}


def test_length_does_not_matter() -> None:
    train, test = draw(1, 60), draw(2, 30)
    longer = LabelledFeatures(features_NF=train.features_NF * torch.arange(1, 61)[:, None], label_N=train.label_N)
    assert knn_accuracy(longer, test, KnnSettings(neighbours=(5,))) == knn_accuracy(
        train, test, KnnSettings(neighbours=(5,))
    )


@pytest.mark.parametrize("order", [[8, 3], [3, 8]])
def test_of_equal_votes_the_lowest_class_wins(order: list[int]) -> None:
    train = LabelledFeatures(features_NF=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), label_N=torch.tensor(order))
    test = LabelledFeatures(features_NF=torch.tensor([[1.0, 1.0]]), label_N=torch.tensor([3]))
    assert knn_accuracy(train, test, KnnSettings(neighbours=(2,))) == {2: 1.0}


def test_more_neighbours_than_images() -> None:
    train, test = draw(1, 12), draw(2, 8)
    assert list(knn_accuracy(train, test, KnnSettings(neighbours=(3, 12, 13)))) == [3, 12]
    with pytest.raises(SettingError, match="the train set has 12"):
        knn_accuracy(train, test, KnnSettings(neighbours=(20, 100)))


def test_classes_that_train_lacks() -> None:
    with pytest.raises(DataError, match="17"):
        knn_accuracy(draw(1, 12, classes=3), draw(2, 12, classes=4), KnnSettings(neighbours=(3,)))


@pytest.mark.parametrize("values", [{"neighbours": []}, {"neighbours": [0]}, {"temperature": 0}, {"k": 3}])
def test_settings_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        KnnSettings.parse(values, "knn")
