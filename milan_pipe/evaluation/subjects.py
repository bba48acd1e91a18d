"""k-NN and linear probe of a student, an untrained student or the teacher, on labelled shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milan_pipe.devices import resolve_device
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.features import Embedder, LabelledFeatures, embed_shards, kept_features, student_embedder
from milan_pipe.evaluation.settings import EmbedSettings
from milan_pipe.images.files import files_under
from milan_pipe.images.labelled import is_class_folder
from milan_pipe.images.shards import expand_shards
from milan_pipe.student.encoder import build_encoder
from milan_pipe.student.settings import StudentSettings
from milan_pipe.student.weights import load_weights
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.teacher.settings import TeacherSettings

TEACHER = "teacher"


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


def subject_of(
    checkpoint: str | Path,
    *,
    student: StudentSettings,
    teacher: TeacherSettings,
    embed: EmbedSettings,
    device: str,
    seed: int,
) -> Subject:
    """What a CHECKPOINT argument names.

    Args:
        checkpoint: a checkpoint folder, a run folder (its last checkpoint), `random` (the configured student with
            fresh weights) or `teacher` (the configured teacher: the upper bound).

    Raises:
        MissingError, DataError, MismatchError: see `open_checkpoint`.
        SettingError: the teacher or student that the settings name does not exist.
    """
    place = resolve_device(device)
    if str(checkpoint) == TEACHER:
        identity, embedder = _teacher_embedder(teacher, student.grid, embed.pool, place)
        return Subject(name=TEACHER, identity=identity, size=student.image_size, embed=embedder)
    backbone = backbone_of(checkpoint, student, seed)
    encoder = build_encoder(backbone.config)
    load_weights(encoder, backbone.weights, backbone.name)
    return Subject(
        name=backbone.name,
        identity=backbone.digest(),
        size=backbone.config.image_size,
        embed=student_embedder(encoder, embed.pool, place),
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
    """Features of the train and of the test pictures; see `embed_shards`.

    Args:
        features: folder where they are kept for the next time; pictures set aside are told the first time alone.
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
    told = []
    for shard in expand_shards(images):
        local = shard.place.local
        changed = (local / shard.name).stat().st_mtime_ns if local is not None else ""
        told.append(f"{shard} {shard.size()} {changed}")
    return told
