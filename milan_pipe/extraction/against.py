"""Stored targets against the teacher run live on the stored views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from milan_pipe.config.params import Params
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MissingError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.random_bits import permutation, seed_of
from milan_pipe.storage import location_of
from milan_pipe.targets import manifest
from milan_pipe.targets.codec import codec_of, decode_run, mean_cosine
from milan_pipe.targets.schema import ViewRun
from milan_pipe.targets.store import read_header
from milan_pipe.targets.verify import Problem, VerifyReport, verify_store
from milan_pipe.teacher.clip import load_teacher_of

_ATTENTION_TOLERANCE = 0.02


def verify_against_teacher(
    targets: str | Path, params: Params, views: int, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> VerifyReport:
    """Check every byte of a store, and some views of each shard against the teacher run live.

    Args:
        params: where they say nothing of the teacher, it is the one that the store's header names.
        views: of each shard.

    Raises:
        MissingError: there is no store.
        MismatchError: the teacher that the settings name is not the store's.
        SettingError, DataError, StoreError: as `verify_store` and `load_teacher`.
    """
    location = location_of(targets)
    header = read_header(location)
    if header is None:
        raise MissingError(f"{location} is not a target store; write one with `{manifest.extract_command(location)}`")
    settings = params.teacher if params.teacher.model_fields_set else None
    teacher = load_teacher_of(header, settings, resolve_device(params.extract.device), location)
    codec, view_count, size = codec_of(header.codec), header.views.count, header.views.size

    def check(shard: str, samples: int, view: int, start: int, run: ViewRun) -> Iterator[Problem]:
        # Spread over the shard, chosen by shard and view alone.
        first = seed_of(shard) % view_count
        wanted = (views + view_count - 1 - (view - first) % view_count) // view_count
        chosen = permutation(samples, "rows", shard, view)[:wanted].tolist()
        rows = sorted(row - start for row in chosen if start <= row < start + len(run.keys))
        if not rows:
            return
        try:
            pixels = np.stack([decode_jpeg(run.jpegs[row], side=size) for row in rows])
        except DataError:
            return  # reported by the check of the views themselves
        live = teacher(torch.from_numpy(pixels))
        stored_NST = decode_run(header.codec, run, rows)
        off_N = (torch.from_numpy(run.attention_NL[rows]).float() - live.share_BL().cpu()).abs().sum(dim=1)

        def problem(row: int, array: str, what: str) -> Problem:
            repair = manifest.redo_command(location, shard)
            return Problem(shard=shard, array=array, what=f"view {view} of {run.keys[row]}: {what}", repair=repair)

        for row, live_ST, stored_ST, off in zip(rows, live.features_BST.cpu(), stored_NST, off_N.tolist(), strict=True):
            cosine = mean_cosine(live_ST, stored_ST)
            if not cosine >= codec.least_cosine:
                yield problem(row, "features", f"cosine {cosine:.6f} with the teacher run live")
            if not off <= _ATTENTION_TOLERANCE:
                yield problem(row, "attention", f"differs by {off:.4f} from the teacher run live")

    return verify_store(targets, on_run=check, on_progress=on_progress)
