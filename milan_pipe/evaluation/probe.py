"""k-NN of a student that is still learning, on a few images whose views stay in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.config.subjects import RANDOM
from milan_pipe.devices import memory_for
from milan_pipe.errors import DataError, SettingError
from milan_pipe.evaluation.backbone import Backbone, backbone_of, pooled
from milan_pipe.evaluation.features import LabelledFeatures, embedded, labelled_samples, tokens_of
from milan_pipe.evaluation.knn import knn_accuracy
from milan_pipe.images.labelled import class_names, require_same_names, warn_if_shared

_Views = list[tuple[Tensor, list[int]]]
"""Batches as they are embedded: pixels (B, H, W, 3) uint8, and B labels."""


def _labels(views: _Views) -> list[int]:
    return [label for _, labels in views for label in labels]


def _without(views: _Views, classes: set[int]) -> _Views:
    kept = []
    for pixels_BHWC, labels in views:
        numbers = [number for number, label in enumerate(labels) if label not in classes]
        if numbers:
            kept.append((pixels_BHWC[numbers], [labels[number] for number in numbers]))
    return kept


class Probe:
    """k-NN accuracy of encoders that differ in their weights alone, as `milan-pipe knn` gives it for the same images.

    Images are read and decoded once. No random number is drawn from a generator of the caller.

    Args:
        params: `pretrain` says which images, `student` which encoder, `embed` and `knn` how.

    Attributes:
        facts: for a checkpoint's record: numbers of images, and bytes of their views in memory.
        bad: images that could not be read.

    Raises:
        MissingError, DataError, StoreError: as `labelled_samples`, no image can be read, or a class is to be found that
            no image of `probe_train` has.
        SettingError: `probe_train` has fewer images than any of `knn.neighbours`, or `embed.pool` asks for a token that
            the student lacks.
    """

    def __init__(self, params: Params, device: torch.device) -> None:
        self._params, self._device, self.bad = params, device, 0
        voting, judged = params.pretrain.probe_train, params.pretrain.probe_test
        assert voting is not None
        assert judged is not None
        layout = backbone_of(RANDOM, params.student, 0).layout
        layout.require(params.embed.pool, "embed.pool", params.student.model)
        require_same_names(voting, class_names(voting), judged, class_names(judged))
        train, whole = self._read(voting)
        test, _ = self._read(judged)
        warn_if_shared(voting, judged)
        count, classes = len(_labels(train)), {*_labels(test)}
        lacking = classes - {*_labels(train)}
        if lacking and (whole or lacking == classes):
            todo = "prepare both from folders of the same class names" if whole else "raise pretrain.probe_images"
            raise DataError(
                f"{len(lacking)} of {len(classes)} classes of pretrain.probe_test {judged} are of no image among the "
                f"{count} of pretrain.probe_train {voting}; {todo}"
            )
        if count < (fewest := min(params.knn.neighbours)):
            raise SettingError(
                f"knn.neighbours asks for {fewest} and more, pretrain.probe_train {voting} has {count} images; give a "
                "smaller number"
            )
        # A few images do not show all of many classes.
        self._train, self._test = train, _without(test, lacking) if lacking else test
        held = sum(pixels_BHWC.nbytes for pixels_BHWC, _ in self._train + self._test)
        self.facts = {"train": count, "test": len(_labels(self._test)), "bytes": held}

    def _read(self, images: str) -> tuple[_Views, bool]:
        """Views, and whether they are of all images."""
        bad, most, size = 0, self._params.pretrain.probe_images, self._params.student.image_size

        def skip(*_: object) -> None:
            nonlocal bad
            bad += 1

        samples = labelled_samples(images, skip, most)
        params = self._params
        read = embedded(samples, lambda pixels_BHWC: pixels_BHWC, size, params.embed, params.images, skip)
        views = [(batch.value, batch.labels) for batch in read]
        self.bad += bad
        if not views:
            raise DataError(f"none of the {bad} images of {images} can be read; prepare the shards again")
        return views, len(_labels(views)) + bad < most

    def _features(self, views: _Views, backbone: Backbone) -> LabelledFeatures:
        settings = self._params.embed
        try_instead = f"try embed.batch_size={max(1, settings.batch_size // 2)}"
        # An encoder is built with weights that are drawn, and then replaced.
        with torch.random.fork_rng(devices=[]):
            tokens = tokens_of(backbone, self._device)
        found = []
        for pixels_BHWC, _ in views:
            with torch.inference_mode(), memory_for(f"embed.batch_size {settings.batch_size}", try_instead):
                features_BF = pooled(tokens(pixels_BHWC), settings.pool, backbone.layout)
            found.append(features_BF.to("cpu", torch.float32))
        return LabelledFeatures(features_NF=torch.cat(found), label_N=torch.tensor(_labels(views)))

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """The best accuracy of `knn.neighbours`; DataError where features are all zero or not finite."""
        backbone = Backbone(name="the student", settings=self._params.student, weights=weights)
        train, test = (self._features(views, backbone) for views in (self._train, self._test))
        return max(knn_accuracy(train, test, self._params.knn).values())
