"""k-NN and linear probe of a student, an untrained student or the teacher, on labelled shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from milan_pipe.devices import resolve_device
from milan_pipe.student.encoder import StudentConfig, build_encoder
from milan_pipe.teacher.clip import TeacherConfig, load_teacher
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.transfer.backbone import RANDOM, student_of
from milan_pipe.transfer.features import EmbedConfig, Embedder, LabelledFeatures, embed_shards, student_embedder

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a name to print, the side of its input in pixels, and the function that embeds."""

    name: str
    size: int
    embed: Embedder


def _teacher_embedder(config: TeacherConfig, grid: tuple[int, int], pool: str, device: torch.device) -> Embedder:
    teacher = load_teacher(config, device, grid=grid)

    def embed(pixels_BHWC: Tensor) -> Tensor:
        features_BST: Tensor = teacher(pixels_BHWC).features_BST
        return features_BST[:, 0] if pool == "cls" else features_BST[:, 1:].mean(dim=1)

    return embed


def subject_of(
    checkpoint: str | Path,
    *,
    student: StudentConfig,
    teacher: TeacherConfig,
    embed: EmbedConfig,
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
        return Subject(
            name=TEACHER, size=student.image_size, embed=_teacher_embedder(teacher, student.grid, embed.pool, place)
        )
    if str(checkpoint) == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = build_encoder(student)
        return Subject(name=RANDOM, size=student.image_size, embed=student_embedder(encoder, embed.pool, place))
    opened = open_checkpoint(checkpoint)
    saved, encoder = student_of(opened)
    return Subject(name=str(opened.path), size=saved.image_size, embed=student_embedder(encoder, embed.pool, place))


def embed_both(
    subject: Subject,
    train: str | Path,
    test: str | Path,
    config: EmbedConfig,
    on_bad: Callable[[str, str], None],
    on_progress: Callable[[int], None],
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Features of the train and of the test shards; see `embed_shards`."""
    first = embed_shards(train, subject.embed, subject.size, config, on_bad, on_progress)
    return first, embed_shards(test, subject.embed, subject.size, config, on_bad, on_progress)
