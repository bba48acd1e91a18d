"""What a local folder is, where another was expected: arguments change places easily."""

from __future__ import annotations

from pathlib import Path

from milan_pipe.errors import StoreError

CHECKPOINT, EMBEDDINGS, IMAGES = "a checkpoint", "a folder of embeddings", "a folder of images"
RUN, TARGETS = "a run", "a target store"
_NEW = "a new folder"
# Each with patterns of files, all of which are there.
_KINDS = (
    (TARGETS, ("shards/zarr.json",)),
    (TARGETS, ("header.json", "shards")),
    (RUN, ("checkpoints/step-*",)),
    (CHECKPOINT, ("checkpoint.json",)),
    (IMAGES, ("index.json", "*.tar")),
    (EMBEDDINGS, ("embeddings.json",)),
)


def mistaken(folder: Path | None, *expected: str) -> str | None:
    """A message where a folder is something else that milan-pipe wrote than what was expected.

    None for anything else, and for what is not on this machine.
    """
    if folder is None:
        return None
    found = [kind for kind, patterns in _KINDS if all(any(folder.glob(pattern)) for pattern in patterns)]
    if not found or set(found) & set(expected):
        return None
    return f"{folder} is {found[0]}; expected {' or '.join(expected)}"


def require_new(folder: Path | None, own: str) -> None:
    """Raise StoreError where something else that milan-pipe wrote is in a folder that is to hold `own`."""
    if message := mistaken(folder, _NEW, own):
        raise StoreError(message)
