"""Checkpoints: a folder of safetensors and one JSON record, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.digests import sha256_of_file, verified, with_digest
from milan_pipe.errors import (
    DataError,
    MilanError,
    MismatchError,
    MissingError,
    StoreError,
    first_problem,
    system_reason,
)
from milan_pipe.storage import location_of
from milan_pipe.storage.kinds import CHECKPOINT, RUN, mistaken
from milan_pipe.storage.local import read_regular
from milan_pipe.units import some
from milan_pipe.weights_file import load_tensors, write_weights

CHECKPOINT_VERSION = 1
_ADDED = {
    "segment.over_all_pixels": False,
    "targets.views.renderer": "pillow",
    "student.init": None,
    "pretrain.layer_decay": None,
    "teachers.standardise": "none",
    "teachers.weights": "equal",
    "teachers.importance": "first",
}
"""What earlier versions did where there is a choice now: their runs do not say it."""
_OF_NO_EFFECT = frozenset(
    ("order", "targets.schema_version", "targets.codec.zstd_level", "targets.teacher.license", "targets.teacher.source")
)
"""What converting a store changes, or what is said of it, and no value that is trained on; `order` is judged apart."""
_SAID_LATER = frozenset(("targets.views_sha256", "data.train_sizes", "data.val_sizes"))
"""Compared where a run says it: those of earlier versions do not."""

_MOST_LEVELS = 64
_LONGEST_NAME = 1000
_FOLDER, _RECORD, _NAME = "checkpoints", "checkpoint.json", "step-"


class _File(BaseModel):
    bytes: NonNegativeInt
    sha256: str


class _Teacher(BaseModel):
    model: str
    weights_sha256: str


class _Store(BaseModel):
    targets: str
    teacher: _Teacher


class _Settings(BaseModel):
    target: str = "clip"
    decoder: dict[str, Any] = {}
    masking: dict[str, Any] = {}
    teachers: dict[str, Any] = {}


class _Views(BaseModel, strict=True):
    count: int
    size: int


class _Targets(BaseModel):
    views: _Views | None = None


class _Configuration(BaseModel):
    student: dict[str, Any] = {}
    targets: _Targets = _Targets()
    statistics: dict[str, str] = {}


class _Known(BaseModel, strict=True):
    """What others read of a record; each task has more."""

    step: NonNegativeInt
    task: str | None = None
    finished: bool = False
    student: dict[str, Any] | None = None
    teacher: _Teacher | None = None
    settings: _Settings = _Settings()
    configuration: _Configuration = _Configuration()
    targets: str | None = None
    others: list[_Store] = []
    command: str = ""
    data: str = ""
    backbone: str = ""
    files: dict[str, _File] = {}
    judged_on: dict[str, Any] = {}


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether containers lie in each other that often; what shows or writes them goes down by calls."""
    inside = [value]
    for _ in range(levels):
        inside = [
            part
            for one in inside
            if isinstance(one, (dict, list))
            for part in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(inside)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        record: what was saved beside the weights; `step` and `version` always.
        files: bytes and digest of each file, by name; None in checkpoints older than the digests.
    """

    path: Path
    record: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] | None = None

    def weights(self, part: str) -> dict[str, Tensor]:
        """Tensors of one part, on the CPU.

        Raises:
            MissingError: the checkpoint has no such part.
            DataError: the file is damaged.
            StoreError: it cannot be read.
        """
        file = self.path / f"{part}.safetensors"
        expected = (self.files or {}).get(file.name)
        try:
            if not file.is_file():
                unknown = "name a checkpoint that `milan-pipe pretrain` wrote"
                todo = f"it is lost; {_advice(self.path)}" if expected else unknown
                raise MissingError(f"{self.path} has no {file.name}; {todo}")
            if self.files is not None and not expected:
                raise DataError(f"{file} is not among the files that {_RECORD} names")
            if expected and (size := file.stat().st_size) != expected["bytes"]:
                raise DataError(f"{file} is damaged: it has {size} bytes, {_RECORD} says {expected['bytes']}")
            if expected and (digest := sha256_of_file(file)) != expected["sha256"]:
                raise DataError(f"{file} is damaged: its SHA-256 is {digest}, {_RECORD} says {expected['sha256']}")
            return load_tensors(file)
        except DataError as error:
            raise DataError(f"{error}; {_advice(self.path)}") from error
        except MilanError:
            raise
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {system_reason(error)}") from error


def _advice(path: Path) -> str:
    present = _checkpoints_in(path.parent)
    earlier = present[: present.index(path)] if path in present else []
    if earlier:
        return f"use the earlier checkpoint {earlier[-1]}; with {path.name} removed, its run goes on from that one"
    return f"there is no earlier checkpoint; copy it again, or remove {path} to begin its run again"


def checkpoint_path(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-NNNNNNNN."""
    return run / _FOLDER / f"{_NAME}{step:08d}"


def save_checkpoint(run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> Path:
    """Write the folder `checkpoint_path`; a checkpoint of the same step is replaced.

    Args:
        parts: tensors by file name, as {"student": state_dict}.
        record: JSON data.

    Raises:
        StoreError: the folder cannot be written; nothing is left of it.
    """
    final = checkpoint_path(run, step)
    folder = location_of(final.parent)
    folder.clear_scratch()
    try:
        scratch = folder.scratch(final.name)
        try:
            for name, tensors in parts.items():
                write_weights(tensors, scratch / f"{name}.safetensors")
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
                for path in sorted(scratch.iterdir())
            }
            # Through JSON, as it will be read: the digest is of the parsed values.
            content = json.loads(json.dumps({"version": CHECKPOINT_VERSION, "step": step, **record, "files": files}))
            text = json.dumps(with_digest(content), indent=2, sort_keys=True) + "\n"
            (scratch / _RECORD).write_text(text, encoding="utf-8")
            folder.publish(scratch, final.name)
        finally:
            # After a failure it would be in the way of the next attempt on a full disk.
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"checkpoint {final} cannot be written: {system_reason(error.__cause__ or error)}") from error
    return final


def _step_of(path: Path) -> int | None:
    """The step in a folder's name; None where it is no checkpoint, as a copy that somebody made."""
    found = re.fullmatch(rf"{_NAME}([0-9]{{8}}|[1-9][0-9]{{8,}})", path.name)
    return int(found[1]) if found else None


def _checkpoints_in(folder: Path) -> list[Path]:
    found = [(step, path) for path in folder.glob(f"{_NAME}*") if (step := _step_of(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def checkpoints_of(run: str | Path) -> list[Path]:
    """Checkpoint folders of a run, the last one last, without interrupted writes."""
    return _checkpoints_in(Path(run) / _FOLDER)


def run_of(checkpoint: str | Path) -> Path | None:
    """The run of a checkpoint folder, if it lies in one."""
    path = Path(checkpoint)
    return path.parents[1] if path.parent.name == _FOLDER and path.is_dir() else None


def keep_last(run: str | Path, count: int) -> None:
    """Remove all checkpoints of a run but the last `count`, and the rest of interrupted writes."""
    keep_steps(run, {_step_of(path) for path in checkpoints_of(run)[-count:]})


def keep_steps(run: str | Path, steps: Collection[int | None]) -> None:
    """Remove all checkpoints of a run but those of these steps, and the rest of interrupted writes."""
    folder = location_of(Path(run) / _FOLDER)
    for path in checkpoints_of(run):
        if _step_of(path) not in steps:
            folder.remove(path.name)
    folder.clear_scratch()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or the last one of a run folder.

    Raises:
        MissingError: neither is there.
        DataError: its record is damaged.
        StoreError: its record cannot be read.
        MismatchError: it was written by another version of the format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingError(f"{folder} is not there; expected a run folder or a checkpoint folder")
    if not (folder / _RECORD).is_file() and _step_of(folder) is None:
        steps = checkpoints_of(folder) or _checkpoints_in(folder)
        if not steps:
            missing = f"{folder} has no checkpoint; expected {folder}/{_FOLDER}/step-NNNNNNNN/{_RECORD}"
            raise MissingError(mistaken(folder, RUN, CHECKPOINT) or missing)
        folder = steps[-1]
    file = folder / _RECORD
    try:
        found = json.loads(read_regular(file))
        version = found["version"]
        if _is_deeper(found, _MOST_LEVELS):
            raise RecursionError
    except FileNotFoundError as error:
        raise DataError(f"{file} is lost; {_advice(folder)}") from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {system_reason(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}); {_advice(folder)}") from error
    if version != CHECKPOINT_VERSION:
        raise MismatchError(f"{folder} has checkpoint version {version}, this milan-pipe reads {CHECKPOINT_VERSION}")
    # The earliest checkpoints have no digests.
    record = verified(found) if {"sha256", "files"} & found.keys() else found
    if record is None or ("files" in found) != ("sha256" in found):
        raise DataError(f"{file} is damaged: its values do not fit their digest; {_advice(folder)}")
    try:
        _Known.model_validate(record)
    except ValidationError as error:
        raise DataError(f"{file} was not written by milan-pipe: {first_problem(error)}; {_advice(folder)}") from error
    if _step_of(folder) not in (None, record["step"]):
        other = checkpoint_path(Path(), record["step"]).name
        raise DataError(f"{folder} holds the checkpoint of another step, {record['step']}; rename it to {other}")
    return Checkpoint(path=folder, record=record, files=record.pop("files", None))


def describe_last_checkpoint(run: Path) -> str:
    """One sentence, for errors that end a run early."""
    found = checkpoints_of(run)
    return f"The last good checkpoint is {found[-1]}" if found else "No checkpoint was written"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        # Of each value its name has those of all that it lies in.
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a name of {len(name)} characters")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def require_same_configuration(checkpoint: Checkpoint, configuration: Mapping[str, Any], run: Path) -> None:
    """Refuse to go on in a run of another configuration.

    Raises:
        MismatchError: names the settings that differ, with both values.
        DataError: the run's is none.
    """
    found = checkpoint.record.get("configuration")
    if not isinstance(found, dict):
        holds = f"{run} holds {checkpoint.path.name}, which does not say what it was trained with"
        raise MismatchError(f"{holds}; name another folder")
    try:
        flat = dict(_flat(found))
    except ValueError as error:
        raise DataError(f"{checkpoint.path} has no configuration of milan-pipe: {error}") from None
    former = {f"pretrain.{old}": f"pretrain.{new}" for old, new in PretrainSettings.renamed.items()}
    ours = dict(_flat(json.loads(json.dumps(configuration))))  # through JSON, where tuples become lists
    theirs = {name: value for name, value in _ADDED.items() if name in ours}
    theirs |= {former.get(name, name): value for name, value in flat.items()}
    if theirs.get("order") != ours.get("order") and not checkpoint.record.get("finished"):
        versions = f"version {theirs.get('order', 1)}, here {ours.get('order', 1)}"
        raise MismatchError(
            f"{run} was begun by another version of milan-pipe, which takes samples in another order ({versions}); "
            f"train in another folder. {checkpoint.path.name} can still be evaluated and exported"
        )
    differences = [
        f"{name}: the run has {theirs.get(name)!r:.200}, the settings say {ours.get(name)!r:.200}"
        for name in sorted((theirs.keys() | ours.keys()) - _OF_NO_EFFECT - (_SAID_LATER - theirs.keys()))
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        holds = f"{run} holds a run of another configuration ({checkpoint.path.name}): {some(differences, 20, '; ')}"
        raise MismatchError(f"{holds}. Use the same settings and data to go on, or name another folder")
