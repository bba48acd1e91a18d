"""`index.json`: what a folder of image shards holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milan_pipe.errors import DataError, MismatchError, MissingError
from milan_pipe.images.files import read_regular
from milan_pipe.storage.local import write_file

INDEX_NAME = "index.json"
INDEX_VERSION = 1

PREPARE_MARKER = ".prepare-is-running"
"""Stands in a folder from the first shard that `prepare` writes until the index is there."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard of a prepared folder.

    Attributes:
        name: file name inside the folder.
        split: "train", "test" or as the source's folder says.
        samples: number of images, at least 1.
        bytes: size of the tar file.
        sha256: hex digest of the tar file.
    """

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """Content of `index.json`.

    Attributes:
        shards: in name order within each split.
        classes: class names, a sample's label is an index into them; None where there are no labels.
        source: plain data that says where the images came from.
        mask_classes: names of the classes in the samples' masks; None where there are no masks.
    """

    shards: tuple[ShardRecord, ...]
    classes: tuple[str, ...] | None
    source: Mapping[str, Any]
    mask_classes: tuple[str, ...] | None = None


def write_index(folder: Path, index: ImageIndex) -> None:
    """Write `index.json` into `folder`, whole or not at all; the same index gives the same bytes.

    Raises:
        StoreError: the file cannot be written.
    """
    plain = {
        "version": INDEX_VERSION,
        "source": dict(index.source),
        "classes": None if index.classes is None else list(index.classes),
        **({} if index.mask_classes is None else {"mask_classes": list(index.mask_classes)}),
        "shards": [asdict(shard) for shard in index.shards],
    }
    write_file(folder / INDEX_NAME, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def read_index(folder: str | Path) -> ImageIndex:
    """Read `folder/index.json`.

    Raises:
        MissingError: the folder has no index.
        DataError: the index is damaged.
        MismatchError: the index is of another version than this package reads.
    """
    path = Path(folder) / INDEX_NAME
    try:
        plain = json.loads(read_regular(path))
    except FileNotFoundError:
        raise MissingError(f"{path} is not there; `milan-pipe prepare` writes it as its last step") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); run `milan-pipe prepare` again") from None
    if not isinstance(plain, dict):
        raise DataError(f"{path} holds no JSON object; run `milan-pipe prepare` again")
    if plain.get("version") != INDEX_VERSION:
        raise MismatchError(
            f"{path} has version {plain.get('version')!r}, this package reads version {INDEX_VERSION}; "
            "run `milan-pipe prepare` again"
        )
    try:
        return _checked(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run `milan-pipe prepare` again") from None


def _checked(plain: Mapping[str, Any]) -> ImageIndex:
    shards = []
    for entry in plain["shards"]:
        shard = ShardRecord(**entry)
        numbers_fit = type(shard.samples) is int and type(shard.bytes) is int
        # A name is joined to the folder and may be overwritten: it must not lead elsewhere.
        if not numbers_fit or Path(shard.name).name != shard.name:
            raise ValueError(entry)
        shards.append(shard)
    return ImageIndex(
        shards=tuple(shards),
        classes=_names(plain["classes"]),
        source=dict(plain["source"]),
        mask_classes=_names(plain.get("mask_classes")),
    )


def _names(values: Any) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError(values)
    return tuple(values)
