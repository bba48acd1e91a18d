"""Checkpoints: a folder of safetensors and one JSON record, written beside its place and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError

CHECKPOINT_VERSION = 1
_FOLDER, _RECORD = "checkpoints", "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        record: what was saved beside the weights; `step` and `version` always.
    """

    path: Path
    record: Mapping[str, Any]

    def weights(self, part: str) -> dict[str, Tensor]:
        """Tensors of one part, on the CPU.

        Raises:
            MissingError: the checkpoint has no such part.
            DataError: the file is damaged.
        """
        file = self.path / f"{part}.safetensors"
        if not file.is_file():
            raise MissingError(f"{self.path} has no {file.name}; name a checkpoint that `milan-pipe pretrain` wrote")
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: a rename may outlive a crash that the data does not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies: RUN/checkpoints/step-NNNNNNNN."""
    return run / _FOLDER / f"step-{step:08d}"


def save_checkpoint(run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> Path:
    """Write the folder `checkpoint_path`; a checkpoint of the same step is replaced.

    Args:
        parts: tensors by file name, as {"student": state_dict}.
        record: JSON data that says what the weights are valid for.

    Raises:
        StoreError: the folder cannot be written.
    """
    final = checkpoint_path(run, step)
    partial = final.with_name(f".partial-{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                partial / f"{name}.safetensors",
            )
        content = {"version": CHECKPOINT_VERSION, "step": step, **record}
        (partial / _RECORD).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"checkpoint {final} cannot be written: {reason}") from error
    return final


def checkpoints_of(run: str | Path) -> list[Path]:
    """Checkpoint folders of a run, the last one last; what an interrupted write left is not among them."""
    return sorted(path for path in (Path(run) / _FOLDER).glob("step-*") if path.is_dir())


def run_of(checkpoint: str | Path) -> Path | None:
    """The run that a checkpoint folder belongs to, if it lies in one."""
    path = Path(checkpoint)
    return path.parents[1] if path.parent.name == _FOLDER and path.is_dir() else None


def keep_last(run: str | Path, count: int) -> None:
    """Remove all checkpoints of a run but the last `count`, and what an interrupted write left."""
    folder = Path(run) / _FOLDER
    for path in [*checkpoints_of(run)[:-count], *folder.glob(".partial-step-*")]:
        # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
        going = path.with_name(f".partial-{path.name.removeprefix('.partial-')}")
        if going != path:
            shutil.rmtree(going, ignore_errors=True)
            path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or the last one of a run folder.

    Raises:
        MissingError: neither is there.
        DataError: its record is damaged.
        MismatchError: it was written by another version of the format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingError(f"{folder} is not there; expected a run folder or a checkpoint folder")
    if not (folder / _RECORD).is_file():
        steps = checkpoints_of(folder) or sorted(folder.glob("step-*"))
        if not steps:
            raise MissingError(f"{folder} has no checkpoint; expected {folder}/{_FOLDER}/step-NNNNNNNN/{_RECORD}")
        folder = steps[-1]
    try:
        record = json.loads((folder / _RECORD).read_text())
        version = record["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / _RECORD} cannot be read ({type(error).__name__}); use another checkpoint"
        ) from error
    if version != CHECKPOINT_VERSION:
        raise MismatchError(f"{folder} has checkpoint version {version}, this milan-pipe reads {CHECKPOINT_VERSION}")
    return Checkpoint(path=folder, record=record)
