"""Stored targets against the teacher run live on the stored views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from milan_pipe.config.params import Params
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MissingError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.random_bits import permutation, seed_of
from milan_pipe.storage import location_of
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets import manifest
from milan_pipe.targets.codec import codec_of, mean_cosine
from milan_pipe.targets.schema import ViewRun, require_same_header
from milan_pipe.targets.store import read_header
from milan_pipe.targets.verify import Problem, VerifyReport, verify_store
from milan_pipe.teacher.clip import load_teacher

_ATTENTION_TOLERANCE = 0.02


class TeacherCheck:
    """Compares a few views of each shard; a check for `verify_store`."""

    def __init__(
        self,
        targets: str | Path,
        teacher: TeacherSettings | None,
        grid: tuple[int, int] | None,
        device: str,
        views_per_shard: int,
    ) -> None:
        """Load the teacher.

        Args:
            teacher: none takes what the store's header says of it.

        Raises:
            MissingError: there is no store.
            MismatchError: the teacher that the settings name is not the store's.
        """
        location = location_of(targets)
        header = read_header(location)
        if header is None:
            raise MissingError(f"{location} is not a target store")
        if teacher is None:
            stored = header.teacher.model_dump(include=set(TeacherSettings.model_fields))
            teacher = TeacherSettings.parse(stored, f"{location}, teacher")
        self._teacher = load_teacher(teacher, resolve_device(device), grid=grid)
        require_same_header(header, header.model_copy(update={"teacher": self._teacher.info}), location)
        self._codec = codec_of(header.codec)
        self._views = header.views.count
        self._per_shard = views_per_shard
        self._location = location

    def _rows(self, shard: str, samples: int, view: int) -> list[int]:
        """Samples of a view to compare: spread over the shard, chosen by shard and view alone."""
        first = seed_of(shard) % self._views
        wanted = (self._per_shard + self._views - 1 - (view - first) % self._views) // self._views
        return sorted(permutation(samples, "rows", shard, view)[:wanted].tolist())

    def __call__(self, shard: str, samples: int, view: int, start: int, run: ViewRun) -> Iterator[Problem]:
        """Compare what a run has of the `views_per_shard` views of its shard."""
        rows = [row - start for row in self._rows(shard, samples, view) if start <= row < start + len(run.keys)]
        if not rows:
            return
        try:
            pixels = np.stack([decode_jpeg(run.jpegs[row]) for row in rows])
        except DataError:
            return  # reported by the check of the views themselves
        live = self._teacher(torch.from_numpy(pixels))
        scale = None if run.scale_NS is None else torch.from_numpy(run.scale_NS[rows])
        stored = self._codec.decode(torch.from_numpy(run.code_NST[rows]), scale)
        importance = live.importance_BL.cpu()
        importance = importance / importance.sum(dim=1, keepdim=True)
        attention = torch.from_numpy(run.attention_NL[rows]).float()
        for i, row in enumerate(rows):
            cosine = mean_cosine(live.features_BST[i].cpu(), stored[i])
            if not cosine >= self._codec.least_cosine:
                yield self._problem(
                    shard, "features", f"view {view} of {run.keys[row]}: cosine {cosine:.6f} with the teacher run live"
                )
            off = float((attention[i] - importance[i]).abs().sum())
            if not off <= _ATTENTION_TOLERANCE:
                yield self._problem(
                    shard,
                    "attention",
                    f"view {view} of {run.keys[row]}: differs by {off:.4f} from the teacher run live",
                )

    def _problem(self, shard: str, array: str, what: str) -> Problem:
        return Problem(shard=shard, array=array, what=what, repair=manifest.redo_command(self._location, shard))


def verify_against_teacher(
    targets: str | Path, params: Params, views: int, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> VerifyReport:
    """Check every byte of a store, and some views of each shard against the teacher run live.

    Raises:
        MissingError, DataError, MismatchError, StoreError: as `verify_store` and `TeacherCheck`.
    """
    teacher = params.teacher if params.teacher.model_fields_set else None
    check = TeacherCheck(targets, teacher, grid_of(params.student), params.extract.device, views)
    return verify_store(targets, on_run=check, on_progress=on_progress)
