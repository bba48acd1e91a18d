"""k-NN and quick linear probe of what does not change: a student, an untrained student or the teacher."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milan_pipe.config.command import TEACHER, command_of, student_sections
from milan_pipe.config.evaluation import EmbedSettings
from milan_pipe.config.params import Params
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.devices import resolve_device
from milan_pipe.errors import StoreError
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.features import Embedder, LabelledFeatures, embed_shards, kept_features, student_embedder
from milan_pipe.evaluation.knn import knn_accuracy
from milan_pipe.evaluation.linear_probe import linear_probe_accuracy
from milan_pipe.evaluation.results import FOLDER, Evaluation, keep_evaluation, make_folder
from milan_pipe.images.files import files_under
from milan_pipe.images.labelled import is_class_folder
from milan_pipe.images.shards import expand_shards
from milan_pipe.storage import local_folder
from milan_pipe.student.encoder import build_encoder, grid_of
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.training.checkpoint import run_of
from milan_pipe.weights_file import load_weights


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a name to print, the side of its input in pixels, and the function that embeds.

    `identity` is a digest of weights and settings, the same for the same features.
    """

    name: str
    identity: str
    size: int
    embed: Embedder


def _teacher_embedder(
    config: TeacherSettings, grid: tuple[int, int], pool: str, device: torch.device
) -> tuple[str, Embedder]:
    teacher = load_teacher(config, device, grid=grid)

    def embed(pixels_BHWC: Tensor) -> Tensor:
        features_BST: Tensor = teacher(pixels_BHWC).features_BST
        return features_BST[:, 0] if pool == "cls" else features_BST[:, 1:].mean(dim=1)

    return json.dumps(teacher.info.model_dump(mode="json"), sort_keys=True), embed


def subject_of(checkpoint: str | Path, params: Params) -> Subject:
    """What a CHECKPOINT argument names.

    Args:
        checkpoint: a checkpoint folder, a run folder (its last checkpoint), `random` (the configured student with
            fresh weights) or `teacher` (the configured teacher: the upper bound).

    Raises:
        MissingError, DataError, MismatchError: see `open_checkpoint`.
        SettingError: the teacher or student that the settings name does not exist.
    """
    student, pool = params.student, params.embed.pool
    device = resolve_device(params.pretrain.device)
    if str(checkpoint) == TEACHER:
        identity, embedder = _teacher_embedder(params.teacher, grid_of(student), pool, device)
        return Subject(name=TEACHER, identity=identity, size=student.image_size, embed=embedder)
    backbone = backbone_of(checkpoint, student, params.pretrain.seed)
    encoder = build_encoder(backbone.config)
    load_weights(encoder, backbone.weights, backbone.name)
    return Subject(
        name=backbone.name,
        identity=backbone.digest(),
        size=backbone.config.image_size,
        embed=student_embedder(encoder, pool, device),
    )


def embed_both(
    subject: Subject,
    train: str | Path,
    test: str | Path,
    config: EmbedSettings,
    on_bad: Callable[[str, str], None],
    on_progress: Callable[[int], None],
    features: str | Path | None = None,
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Features of the train and of the test images; see `embed_shards`.

    Args:
        features: folder where they are kept for the next time; images skipped are reported the first time alone.
    """

    def embed(images: str | Path) -> LabelledFeatures:
        identity = {
            "subject": subject.identity,
            "size": subject.size,
            "settings": config.model_dump(mode="json", exclude={"threads"}),
            "images": _identity_of(images) if features is not None else "",
        }
        return kept_features(
            features,
            identity,
            lambda: embed_shards(images, subject.embed, subject.size, config, on_bad, on_progress),
        )

    return embed(train), embed(test)


def _identity_of(images: str | Path) -> list[str]:
    if is_class_folder(images):
        files = files_under(Path(images))
        return [f"{path.relative_to(images)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    lines = []
    for shard in expand_shards(images):
        local = shard.location.local
        changed = (local / shard.name).stat().st_mtime_ns if local is not None else ""
        lines.append(f"{shard} {shard.size()} {changed}")
    return lines


# --- k-NN and the quick linear probe --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KnnReport:
    """k-NN accuracy by number of neighbours; `best` is the highest of them; counts of images used and skipped.

    `kept` is the file that a report reads, if there is one.
    """

    subject: str
    accuracy: dict[int, float]
    best: float
    train: int
    test: int
    bad: int
    kept: str | None


@dataclass(frozen=True, kw_only=True)
class LinearProbeReport:
    """Accuracy of a linear classifier on frozen features; counts of images used and skipped; `kept` as of k-NN."""

    subject: str
    accuracy: float
    train_accuracy: float
    l2: float
    converged: bool
    train: int
    test: int
    bad: int
    kept: str | None


def knn(
    checkpoint: str | Path,
    train: str | Path,
    test: str | Path,
    params: Params,
    *,
    features: str | Path | None = None,
    keep: str | Path | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> KnnReport:
    """k-nearest-neighbour accuracy of a checkpoint, a run, `random` or `teacher`.

    Args:
        features: folder that keeps what is embedded.
        keep: folder for the result, which `report` reads; none: `evaluations` in the run of the checkpoint.

    Raises:
        MissingError, DataError, MismatchError, SettingError, StoreError: as `subject_of`, `embed_shards`,
            `knn_accuracy`, or a folder cannot be written.
    """
    both = _Both(checkpoint, train, test, params, features, keep, on_progress)
    accuracy = knn_accuracy(both.train, both.test, params.knn)
    best = max(accuracy.values())
    scores = {"best": best, **{f"k{k}": value for k, value in accuracy.items()}}
    command = command_of("knn", [checkpoint, train, test], params, student_sections(checkpoint, *_EMBEDDED, "knn"))
    return KnnReport(accuracy=accuracy, best=best, kept=both.kept("knn", scores, command), **both.counts())


def linear_probe(
    checkpoint: str | Path,
    train: str | Path,
    test: str | Path,
    params: Params,
    *,
    features: str | Path | None = None,
    keep: str | Path | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> LinearProbeReport:
    """Quick linear probe of a checkpoint, a run, `random` or `teacher`; arguments and errors as of `knn`."""
    both = _Both(checkpoint, train, test, params, features, keep, on_progress)
    result = linear_probe_accuracy(both.train, both.test, params.linear_probe)
    scores = {"accuracy": result.accuracy, "train": result.train_accuracy}
    sections = student_sections(checkpoint, *_EMBEDDED, "linear_probe")
    command = command_of("linear-probe", [checkpoint, train, test, "--quick"], params, sections)
    return LinearProbeReport(
        accuracy=result.accuracy,
        train_accuracy=result.train_accuracy,
        l2=result.l2,
        converged=result.converged,
        kept=both.kept("linear-probe", scores, command),
        **both.counts(),
    )


_EMBEDDED = ("embed", "pretrain.seed")


class _Both:
    """Features of both sets of images, and what is kept of a result on them."""

    def __init__(
        self,
        checkpoint: str | Path,
        train: str | Path,
        test: str | Path,
        params: Params,
        features: str | Path | None,
        keep: str | Path | None,
        on_progress: Callable[[int], None],
    ) -> None:
        if keep is not None:
            # Before the work, not after it.
            make_folder(local_folder(keep, "results"))
        self._keep = keep
        self._data = f"{train} -> {test}"
        self._subject = subject_of(checkpoint, params)
        self._bad: list[tuple[str, str]] = []
        self.train, self.test = embed_both(
            self._subject,
            train,
            test,
            params.embed,
            lambda key, reason: self._bad.append((key, reason)),
            on_progress,
            features,
        )

    def counts(self) -> dict[str, Any]:
        return {
            "subject": self._subject.name,
            "train": len(self.train.label_N),
            "test": len(self.test.label_N),
            "bad": len(self._bad),
        }

    def kept(self, task: str, scores: Mapping[str, float], command: str) -> str | None:
        """Keep a result where that was asked, or in the run of the checkpoint; None where there is neither."""
        run = run_of(self._subject.name)
        folder = Path(self._keep) if self._keep is not None else run and run / FOLDER
        if folder is None:
            return None
        evaluation = Evaluation(
            task=task,
            subject=self._subject.name,
            identity=self._subject.identity,
            scores=scores,
            data=self._data,
            train=len(self.train.label_N),
            test=len(self.test.label_N),
            command=command,
        )
        try:
            return str(keep_evaluation(folder, evaluation))
        except StoreError as error:
            if self._keep is not None:
                raise
            # The result is there, and nobody asked for a file.
            warnings.warn(str(error), RuntimeWarning, stacklevel=4)
            return None
