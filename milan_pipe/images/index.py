"""`index.json`: what a folder of image shards holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ValidationError

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError, printable_json
from milan_pipe.storage import Location, location_of
from milan_pipe.storage.kinds import IMAGES, require_new
from milan_pipe.storage.local import make_folder, read_regular, real_path, write_file

INDEX_NAME = "index.json"
INDEX_VERSION: Final = 1

PREPARE_MARKER = ".prepare-is-running"
"""File in a folder from the first shard that `prepare` writes until the index is there; it says the source."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6}\.tar")


def _plain_name(name: str) -> str:
    # It is joined to the folder and may be overwritten: it must not lead elsewhere.
    if Path(name).name != name:
        raise ValueError("not a plain file name")
    return name


class ShardRecord(BaseModel, frozen=True, strict=True, extra="forbid"):
    """One shard of a prepared folder: its file's name, size and hex digest, its split and number of images."""

    name: Annotated[str, AfterValidator(_plain_name)]
    split: str
    samples: int
    bytes: int
    sha256: str


class ImageIndex(BaseModel, frozen=True, strict=True):
    """Content of `index.json`.

    Attributes:
        source: where the images came from.
        classes: class names, labels are indices into them; None where there are no labels.
        mask_classes: names of the values in masks; None where there are no masks.
        shards: in name order within each split.
    """

    version: Literal[1] = INDEX_VERSION
    source: Mapping[str, Any]
    classes: tuple[str, ...] | None
    mask_classes: tuple[str, ...] | None = None
    shards: tuple[ShardRecord, ...]


def begin_index(folder: Path, source: Mapping[str, Any]) -> None:
    """Make a folder ready for shards of a source: write the marker, and remove what an earlier run on it wrote.

    Raises:
        MismatchError: the folder holds other shards.
        StoreError: it is a file, holds something else, or cannot be made or written.
        OSError: an earlier run's files cannot be removed.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; expected a folder to write shards into")
    require_new(folder, IMAGES)
    make_folder(folder)
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
        with suppress(OSError, ValueError, RecursionError):
            earlier = earlier or json.loads(read_regular(marker))
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
    write_file(marker, json.dumps(dict(source), sort_keys=True) + "\n")
    for name in (INDEX_NAME, *(own & present)):
        (folder / name).unlink(missing_ok=True)
    location_of(folder).clear_scratch()


def _resolved(source: Mapping[str, Any]) -> tuple[Any, Path]:
    return source.get("kind"), real_path(str(source.get("path", "")))


def write_index(folder: Path, index: ImageIndex) -> None:
    """Write `index.json` into `folder`, whole or not at all; raises StoreError where it cannot be written."""
    # Workers of a run that was killed live a second longer, and may have begun another shard.
    location_of(folder).clear_scratch()
    plain = index.model_dump(mode="json", exclude=None if index.mask_classes else {"mask_classes"})
    write_file(folder / INDEX_NAME, printable_json(plain, indent=1) + "\n")


def read_index(folder: str | Path | Location) -> ImageIndex:
    """Read `folder/index.json`.

    Raises:
        MissingError: the folder has no index.
        StoreError: it cannot be read.
        DataError: it is damaged.
        MismatchError: it is of another version.
    """
    location = folder if isinstance(folder, Location) else location_of(folder)
    path = f"{location}/{INDEX_NAME}"
    try:
        data = location.read(INDEX_NAME)
        version = json.loads(data).get("version")
        if version == INDEX_VERSION:
            return ImageIndex.model_validate_json(data)
    except MissingError:
        raise MissingError(f"{path} is not there; `milan-pipe prepare` writes it as its last step") from None
    except (ValueError, RecursionError, AttributeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else error
        raise DataError(f"{path} is damaged ({reason}); run `milan-pipe prepare` again") from None
    raise MismatchError(
        f"{path} has version {version!r}, this package reads version {INDEX_VERSION}; run `milan-pipe prepare` again"
    )
