"""Whether a run may go on: what it was begun with, and where it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milan_pipe.errors import MismatchError
from milan_pipe.training.checkpoint import Checkpoint, checkpoints_of, open_checkpoint


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The checkpoint to go on from; None in a run that has none.

    Raises:
        DataError, MismatchError: it is damaged, or of another version.
    """
    found = checkpoints_of(run)
    return open_checkpoint(found[-1]) if found else None


def describe_last_checkpoint(run: Path) -> str:
    """What to say of a run's last checkpoint when the run ends early."""
    found = checkpoints_of(run)
    return f"The last good checkpoint is {found[-1]}" if found else "No checkpoint was written"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def require_same_configuration(checkpoint: Checkpoint, configuration: Mapping[str, Any], run: Path) -> None:
    """Refuse to go on in a run that was begun with something else.

    Raises:
        MismatchError: names every setting that differs, with both values.
    """
    found = checkpoint.record.get("configuration")
    if not isinstance(found, dict):
        raise MismatchError(
            f"{run} holds {checkpoint.path.name}, which does not say what it was trained with; name another folder"
        )
    if found.get("order") != configuration.get("order") and not checkpoint.record["finished"]:
        raise MismatchError(
            f"{run} was begun by another version of milan-pipe, which takes samples in another order (version "
            f"{found.get('order', 1)}, here {configuration.get('order', 1)}); train in another folder. "
            f"{checkpoint.path.name} can still be evaluated and exported"
        )
    # Through JSON, as the other side went: tuples are lists there.
    theirs, ours = _flat(found), _flat(json.loads(json.dumps(configuration)))
    differences = [
        f"{name}: the run has {theirs.get(name)!r}, the settings say {ours.get(name)!r}"
        for name in sorted((theirs.keys() | ours.keys()) - {"order"})
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise MismatchError(
            f"{run} holds a run of another configuration ({checkpoint.path.name}): {'; '.join(differences)}. Use the "
            "same settings to go on, or name another folder"
        )
