"""k-NN and quick linear probe of what does not change: a student, a model of timm or the teacher."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from milan_pipe.config.command import command_of, student_sections
from milan_pipe.config.params import Params
from milan_pipe.config.subjects import TEACHER
from milan_pipe.devices import resolve_device
from milan_pipe.errors import StoreError, without_secrets
from milan_pipe.evaluation.backbone import Layout, pooled
from milan_pipe.evaluation.features import (
    LabelledFeatures,
    Tokens,
    embed_shards,
    kept_features,
    tokens_of,
)
from milan_pipe.evaluation.knn import knn_accuracy
from milan_pipe.evaluation.linear_probe import linear_probe_accuracy
from milan_pipe.evaluation.results import ADVICE, FOLDER, Evaluation, keep_evaluation
from milan_pipe.evaluation.timm_backbone import frozen_backbone_of
from milan_pipe.images.files import files_under
from milan_pipe.images.labelled import class_names, is_class_folder, require_same_names, warn_if_shared
from milan_pipe.images.shards import expand_shards
from milan_pipe.storage import local_folder
from milan_pipe.storage.local import make_folder
from milan_pipe.student.encoder import grid_of
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.training.checkpoint import run_of


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, with the side of its input in pixels; the same identity and structure: the same features."""

    name: str
    identity: str
    structure: str
    size: int
    layout: Layout
    tokens: Tokens


def subject_of(checkpoint: str | Path, params: Params) -> Subject:
    """What a CHECKPOINT argument names: as of `frozen_backbone_of`, or `teacher`, the configured one.

    Raises:
        MissingError, DataError, MismatchError, SettingError: as `frozen_backbone_of`, or there is no such teacher.
    """
    student, device = params.student, resolve_device(params.pretrain.device)
    if str(checkpoint) != TEACHER:
        backbone = frozen_backbone_of(checkpoint, student, params.pretrain.seed)
        return Subject(
            name=backbone.name,
            identity=backbone.digest(),
            structure=backbone.structure(),
            size=backbone.settings.image_size,
            layout=backbone.layout,
            tokens=tokens_of(backbone, device),
        )
    teacher = load_teacher(params.teacher, device, grid=grid_of(student))
    identity = json.dumps(teacher.info.model_dump(mode="json", exclude={"structure_sha256"}), sort_keys=True)
    return Subject(
        name=TEACHER,
        identity=identity,
        structure=str(teacher.info.structure_sha256),
        size=student.image_size,
        layout=Layout(grid=teacher.info.grid, width=teacher.info.width, has_cls=True, prefix=1),
        tokens=lambda pixels_BHWC: teacher(pixels_BHWC).features_BST,
    )


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


@dataclass(frozen=True, kw_only=True)
class FrozenReport:
    """What was evaluated, counts of images used and skipped, and the file that `report` reads, if there is one."""

    subject: str
    train: int
    test: int
    bad: int
    kept: str | None


@dataclass(frozen=True, kw_only=True)
class KnnReport(FrozenReport):
    """k-NN accuracy by number of neighbours; `best` is the highest of them."""

    accuracy: dict[int, float]
    best: float


@dataclass(frozen=True, kw_only=True)
class LinearProbeReport(FrozenReport):
    """Accuracy of a linear classifier on frozen features; see `ProbeResult`."""

    accuracy: float
    train_accuracy: float
    l2: float
    converged: bool


def make_kept_folder(keep: str | Path | None) -> None:
    """Make the folder for a result, where one is named: before the work, not after it; StoreError if it cannot be."""
    if keep is not None:
        make_folder(local_folder(keep, "results"), ADVICE)


def keep_result(subject: Subject, keep: str | Path | None, task: str, data: str, **values: Any) -> str | None:
    """Keep a result in the folder that is named, or in the run of the subject; returns the file, if there is one.

    Args:
        values: what else an `Evaluation` has.
    """
    evaluation = Evaluation(
        task=task, subject=subject.name, identity=subject.identity, data=without_secrets(data), **values
    )
    run = run_of(subject.name)
    folder = Path(keep) if keep is not None else run / FOLDER if run is not None else None
    try:
        return str(keep_evaluation(folder, evaluation)) if folder is not None else None
    except StoreError as error:
        if keep is not None:
            raise
        # The result is there, and no file was asked for.
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)
        return None


class FrozenSets:
    """Features of the train and of the test images, and where results on them are kept.

    Args:
        checkpoint: see `subject_of`.
        train, test: see `embed_shards`, as `on_progress`.
        features: folder that keeps what is embedded; skipped images are reported the first time alone.
        keep: folder for the result, which `report` reads; none: `evaluations` in the run of the checkpoint.

    Raises:
        MissingError, DataError, MismatchError, SettingError, StoreError: as `subject_of` and `embed_shards`, or a
            folder cannot be written.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        train: str | Path,
        test: str | Path,
        params: Params,
        *,
        features: str | Path | None,
        keep: str | Path | None,
        on_progress: Callable[[int], None],
    ) -> None:
        make_kept_folder(keep)
        require_same_names(train, class_names(train), test, class_names(test))
        self.params, self._keep = params, keep
        self._arguments = checkpoint, train, test
        self._subject = subject = subject_of(checkpoint, params)
        subject.layout.require(params.embed.pool, "embed.pool", subject.name)
        bad: list[str] = []

        def features_of(pixels_BHWC: Tensor) -> Tensor:
            return pooled(subject.tokens(pixels_BHWC), params.embed.pool, subject.layout)

        def embed(images: str | Path) -> LabelledFeatures:
            identity = {
                "subject": subject.identity,
                "structure": subject.structure,
                "size": subject.size,
                # Limits as they are by default are not named: what was kept before there were any stays good.
                "settings": params.embed.model_dump(mode="json", include={"batch_size", "crop", "pool"})
                | params.images.model_dump(mode="json", exclude_defaults=True),
                "images": _identity_of(images) if features is not None else "",
            }

            def compute() -> LabelledFeatures:
                return embed_shards(
                    images,
                    features_of,
                    subject.size,
                    params.embed,
                    lambda key, _: bad.append(key),
                    on_progress,
                    limits=params.images,
                )

            return kept_features(features, identity, compute)

        self.train, self.test = embed(train), embed(test)
        warn_if_shared(train, test)
        self._counts = {"train": len(self.train.label_N), "test": len(self.test.label_N)}
        self._bad = len(bad)

    def keep(self, task: str, section: str, scores: Mapping[str, float], *flags: str) -> dict[str, Any]:
        """Keep a result in the folder that was named, or in the run of the checkpoint; the fields of `FrozenReport`."""
        checkpoint, train, test = self._arguments
        sections = student_sections(checkpoint, "images", "embed", "pretrain.seed", section)
        kept = keep_result(
            self._subject,
            self._keep,
            task,
            f"{train} -> {test}",
            scores=scores,
            command=command_of(task, [checkpoint, train, test, *flags], self.params, sections),
            **self._counts,
        )
        return {"subject": self._subject.name, **self._counts, "bad": self._bad, "kept": kept}


def knn(sets: FrozenSets) -> KnnReport:
    """k-nearest-neighbour accuracy; raises as `knn_accuracy`."""
    accuracy = knn_accuracy(sets.train, sets.test, sets.params.knn)
    best = max(accuracy.values())
    scores = {"best": best, **{f"k{k}": value for k, value in accuracy.items()}}
    return KnnReport(accuracy=accuracy, best=best, **sets.keep("knn", "knn", scores))


def linear_probe(sets: FrozenSets) -> LinearProbeReport:
    """Accuracy of a linear classifier, fitted once; raises as `linear_probe_accuracy`."""
    result = linear_probe_accuracy(sets.train, sets.test, sets.params.linear_probe)
    scores = {"accuracy": result.accuracy, "train": result.train_accuracy}
    return LinearProbeReport(**asdict(result), **sets.keep("linear-probe", "linear_probe", scores, "--quick"))
