"""Stored targets against the teacher run live on the stored views."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from milan_pipe.data.views import decode_jpeg
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MissingError
from milan_pipe.storage import place_of
from milan_pipe.targets.codec import codec_of, mean_cosine
from milan_pipe.targets.schema import CodecInfo, ViewRun, require_same_header
from milan_pipe.targets.store import read_header
from milan_pipe.targets.verify import Problem
from milan_pipe.teacher.clip import TeacherConfig, load_teacher

_LEAST_COSINE = {"int8": 0.999, "float16": 0.9999}
_ATTENTION_TOLERANCE = 0.02


def _least_cosine(codec: CodecInfo) -> float:
    """Below this a token's picture is not what was encoded; twice the loss that `klt` was fitted for, on the mean."""
    return _LEAST_COSINE.get(codec.name, 1 - 4 * (1 - (codec.quality or 0.0)))


class TeacherCheck:
    """Compares a few views of each shard; a check for `verify_targets`."""

    def __init__(
        self,
        targets: str | Path,
        teacher: TeacherConfig | None,
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
        place = place_of(targets)
        header = read_header(place)
        if header is None:
            raise MissingError(f"{place} is not a target store")
        if teacher is None:
            told = header.teacher.model_dump(include=set(TeacherConfig.model_fields))
            teacher = TeacherConfig.parse(told, f"{place}, teacher")
        self._teacher = load_teacher(teacher, resolve_device(device), grid=grid)
        require_same_header(header, header.model_copy(update={"teacher": self._teacher.info}), place)
        self._codec = codec_of(header.codec)
        self._least = _least_cosine(header.codec)
        self._views = header.views.count
        self._per_shard = views_per_shard
        self._targets = str(targets)
        self._done: dict[str, int] = {}

    def __call__(self, shard: str, view: int, start: int, run: ViewRun) -> Iterator[Problem]:
        """Compare up to `views_per_shard` views of a shard, spread over its views, chosen by shard and view alone."""
        left = self._per_shard - self._done.get(shard, 0)
        fair = -(-self._per_shard // self._views)
        wanted = min(left, fair, len(run.keys)) if start == 0 else 0
        if wanted <= 0:
            return
        self._done[shard] = self._done.get(shard, 0) + wanted
        seed = int.from_bytes(hashlib.sha256(f"{shard}/{view}".encode()).digest()[:8], "big")
        rows = sorted(np.random.default_rng(seed).permutation(len(run.keys))[:wanted].tolist())
        try:
            pixels = np.stack([decode_jpeg(run.jpegs[row]) for row in rows])
        except DataError:
            return  # told by the check of the views themselves
        live = self._teacher(torch.from_numpy(pixels))
        scale = None if run.scale_NS is None else torch.from_numpy(run.scale_NS[rows])
        stored = self._codec.decode(torch.from_numpy(run.code_NST[rows]), scale)
        importance = live.importance_BL.cpu()
        importance = importance / importance.sum(dim=1, keepdim=True)
        attention = torch.from_numpy(run.attention_NL[rows]).float()
        for i, row in enumerate(rows):
            cosine = mean_cosine(live.features_BST[i].cpu(), stored[i])
            if not cosine >= self._least:
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
        mend = f"milan-pipe extract-targets IMAGES {self._targets} --redo {shard}"
        return Problem(shard=shard, array=array, what=what, mend=mend)
