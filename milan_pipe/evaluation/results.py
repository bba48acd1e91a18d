"""Results of probes, kept as files, so that a report finds them with the command that made them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from milan_pipe.errors import DataError, first_problem
from milan_pipe.images.files import printable_name
from milan_pipe.storage.local import read_regular, write_file

FOLDER = "evaluations"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One result of `knn`, `linear-probe` or `segment-probe`.

    Attributes:
        subject: path of a checkpoint, `random` or `teacher`.
        identity: digest of its weights.
        scores: shares between 0 and 1; the main one first.
        data: train and test images, as they were named; `train` and `test` are their numbers.
    """

    task: str
    subject: str
    identity: str
    scores: Mapping[str, float]
    data: str
    train: int
    test: int
    command: str


_KEPT = TypeAdapter(Evaluation)
_OWN_NAME = re.compile(r"(knn|linear-probe|segment-probe)-.+\.json")
ADVICE = "name another folder with --keep, which `milan-pipe report` is then given with --evaluations"


def keep_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write FOLDER/TASK-DIGEST.json, in place of the same command's on the same weights; raises StoreError."""
    # Paths in commands and of data may be no UTF-8, which JSON could not hold.
    values = {
        name: printable_name(value) if isinstance(value, str) else value for name, value in asdict(evaluation).items()
    }
    name = hashlib.sha256(f"{values['identity']}\n{values['command']}".encode()).hexdigest()[:12]
    file = folder / f"{evaluation.task}-{name}.json"
    write_file(file, json.dumps({"version": _VERSION, **values}, indent=2) + "\n", ADVICE)
    return file


def read_evaluations(folder: Path) -> list[Evaluation]:
    """All results in a folder, by file name; DataError where one is damaged or of another version."""
    found = []
    for file in sorted(folder.glob("[!.]*.json")):
        try:
            values = json.loads(read_regular(file))
            if values["version"] != _VERSION:
                raise ValueError("another version")
            found.append(_KEPT.validate_python(values))
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            what = first_problem(error) if isinstance(error, ValidationError) else str(error)
            if isinstance(error, LookupError):
                what = f"it has no {error}"
            todo = "name a folder that they were given with --keep; what a run keeps of its own is found without"
            if _OWN_NAME.fullmatch(file.name):
                todo = "remove it, and run them again"
            raise DataError(
                f"{file} is no result that `milan-pipe knn`, `linear-probe` or `segment-probe` kept ({what}); {todo}"
            ) from error
    return found
