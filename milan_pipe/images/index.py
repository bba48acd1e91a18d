"""`index.json`: what a folder of image shards holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.storage import Location, location_of
from milan_pipe.storage.local import write_file

INDEX_NAME = "index.json"
INDEX_VERSION = 1

PREPARE_MARKER = ".prepare-is-running"
"""File in a folder from the first shard that `prepare` writes until the index is there; it says the source."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6}\.tar")


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


def begin_index(folder: Path, source: Mapping[str, Any]) -> None:
    """Make a folder ready for shards of a source: write the marker, and remove what an earlier run on it wrote.

    Raises:
        MismatchError: the folder holds other shards.
        StoreError: it is a file.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; expected a folder to write shards into")
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in folder.glob("*.tar")}
    marker = folder / PREPARE_MARKER
    own: set[str] = set()
    earlier: Mapping[str, Any] | None = None
    if (folder / INDEX_NAME).exists():
        index = read_index(folder)
        own, earlier = {shard.name for shard in index.shards}, index.source
    if marker.exists():
        # An earlier run was killed: every shard with a name of ours is from it, or from the index that it replaced.
        own |= {name for name in present if _SHARD_NAME.fullmatch(name)}
        with suppress(ValueError):
            earlier = earlier or json.loads(marker.read_bytes())
    foreign = sorted(present - own)
    if foreign:
        raise MismatchError(
            f"{folder} holds {len(foreign)} shards that `prepare` did not write there, as {foreign[0]}; choose an "
            "empty folder, or move them away"
        )
    if own and isinstance(earlier, Mapping) and _resolved(earlier) != _resolved(source):
        before, now = (described.get("path", described.get("kind")) for described in (earlier, source))
        raise MismatchError(
            f"{folder} holds shards of {before}, the source is {now}; choose another folder, or delete this one"
        )
    marker.write_text(json.dumps(dict(source), sort_keys=True) + "\n", encoding="utf-8")
    for name in (INDEX_NAME, *(own & present)):
        (folder / name).unlink(missing_ok=True)
    location_of(folder).clear_scratch()


def _resolved(source: Mapping[str, Any]) -> tuple[Any, Path]:
    return source.get("kind"), Path(str(source.get("path", ""))).resolve()


def write_index(folder: Path, index: ImageIndex) -> None:
    """Write `index.json` into `folder`, whole or not at all; the same index gives the same bytes.

    Raises:
        StoreError: the file cannot be written.
    """
    plain = {"version": INDEX_VERSION, **{name: getattr(index, name) for name in ("source", "classes")}}
    if index.mask_classes is not None:
        plain["mask_classes"] = index.mask_classes
    plain["shards"] = [asdict(shard) for shard in index.shards]
    write_file(folder / INDEX_NAME, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def read_index(folder: str | Path | Location) -> ImageIndex:
    """Read `folder/index.json`.

    Raises:
        MissingError: the folder has no index.
        StoreError: it cannot be read.
        DataError: the index is damaged.
        MismatchError: the index is of another version than this package reads.
    """
    location = folder if isinstance(folder, Location) else location_of(folder)
    path = f"{location}/{INDEX_NAME}"
    try:
        plain = json.loads(location.read(INDEX_NAME))
    except MissingError:
        raise MissingError(f"{path} is not there; `milan-pipe prepare` writes it as its last step") from None
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
        return ImageIndex(
            shards=tuple(_checked(ShardRecord(**entry)) for entry in plain["shards"]),
            classes=_names(plain["classes"]),
            source=dict(plain["source"]),
            mask_classes=_names(plain.get("mask_classes")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run `milan-pipe prepare` again") from None


def _checked(shard: ShardRecord) -> ShardRecord:
    numbers_fit = type(shard.samples) is int and type(shard.bytes) is int
    # A name is joined to the folder and may be overwritten: it must not lead elsewhere.
    if not numbers_fit or Path(shard.name).name != shard.name:
        raise ValueError(shard)
    return shard


def _names(values: Any) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError(values)
    return tuple(values)
