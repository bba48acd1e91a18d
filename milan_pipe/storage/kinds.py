"""What a local folder is, where another was expected: arguments change places easily."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from milan_pipe.errors import StoreError
from milan_pipe.storage.local import is_utf8, require_own_folders

CHECKPOINT, EMBEDDINGS, IMAGES = "a checkpoint", "a folder of embeddings", "a folder of images"
CHECKPOINTS, EXPORTED = "the checkpoints of a run", "an exported student"
RUN, TARGETS = "a run", "a target store"
_NEW = "a new folder"
# Each with patterns of files, all of which are there.
_KINDS = (
    (TARGETS, ("shards/zarr.json",)),
    (TARGETS, ("header.json", "shards")),
    (RUN, ("checkpoints/step-*",)),
    (CHECKPOINT, ("checkpoint.json",)),
    (CHECKPOINTS, ("step-*/checkpoint.json",)),
    (EXPORTED, ("config.json", "model.safetensors")),
    (IMAGES, ("*.tar",)),
    (EMBEDDINGS, ("embeddings.json",)),
)


def mistaken(folder: Path | None, *expected: str) -> str | None:
    """A message where a folder is something else that milan-pipe wrote than what was expected.

    None for anything else, and for what is not on this machine.
    """
    if folder is None:
        return None
    found = _kinds(folder)
    if not found or set(found) & set(expected):
        return None
    return f"{folder} is {found[0]}; expected {' or '.join(expected)}"


def require_new(folder: Path | None, own: str) -> None:
    """Raise StoreError where nothing can be written that is `own`.

    Something else that milan-pipe wrote is there, it lies in a store, a link in it leads to another folder, or its name
    is no UTF-8.
    """
    if message := mistaken(folder, _NEW, own):
        raise StoreError(message)
    if folder is not None:
        if not is_utf8(str(folder)):
            raise StoreError(f"{folder} is no UTF-8, which zarr and safetensors do not open; name another folder")
        require_outside_stores(folder)
        require_own_folders(folder)


def require_outside_stores(path: Path) -> None:
    """Raise StoreError for a path in a target store: `verify-targets` would name what is written there as damage."""
    for parent in path.absolute().parents:
        if any(_is_like(parent, patterns) for kind, patterns in _KINDS if kind == TARGETS):
            held = "a target store, which holds nothing else"
            raise StoreError(f"{path} would lie in {parent}, {held}; name another place")


def _kinds(folder: Path) -> list[str]:
    return [kind for kind, patterns in _KINDS if _is_like(folder, patterns)]


def _is_like(folder: Path, patterns: Iterable[str]) -> bool:
    return all(any(folder.glob(pattern)) for pattern in patterns)
