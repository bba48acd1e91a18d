"""What a local folder is, where another was expected: arguments change places easily."""

from __future__ import annotations

import os
from pathlib import Path

CHECKPOINT, IMAGES, RUN, TARGETS = "a checkpoint", "a folder of images", "a run", "a target store"
# The first that is there.
_KINDS = {
    "shards/zarr.json": TARGETS,
    "header.json": TARGETS,
    "index.json": IMAGES,
    "checkpoint.json": CHECKPOINT,
    "checkpoints": RUN,
    "embeddings.json": "a folder of embeddings",
}


def mistaken(folder: Path | None, *expected: str) -> str | None:
    """A message where a folder is something else that milan-pipe wrote than what was expected.

    None for anything else, and for what is not on this machine.
    """
    if folder is None:
        return None
    found = next((kind for name, kind in _KINDS.items() if os.path.exists(folder / name)), None)  # noqa: PTH110
    return None if found is None or found in expected else f"{folder} is {found}; expected {' or '.join(expected)}"
