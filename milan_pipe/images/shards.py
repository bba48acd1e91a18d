"""Which image shards a path, a pattern or a URL names."""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import IO

from braceexpand import braceexpand

from milan_pipe.errors import DataError, MilanError, MissingError
from milan_pipe.images.files import IMAGE_SUFFIXES, suffix_of
from milan_pipe.images.index import INDEX_NAME, PREPARE_MARKER, ImageIndex, read_index
from milan_pipe.storage import Listing, Location, is_url, location_of, split_root, split_url
from milan_pipe.storage.kinds import IMAGES, mistaken
from milan_pipe.storage.local import is_utf8

_MAX_BRACE_NAMES = 1_000_000


@dataclass(frozen=True)
class ShardFile:
    """A shard's tar file, local or in an object store. It can be sent to other processes, and sorts by its address.

    Attributes:
        location: its folder.
        name: its file name.
        known_size: bytes, where a listing has given them.
    """

    location: Location
    name: str
    known_size: int | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        folder = self.location.local
        return f"{self.location}/{self.name}" if folder is None else str(folder / self.name)

    def __lt__(self, other: ShardFile) -> bool:
        return str(self) < str(other)

    def size(self) -> int:
        """Bytes of the tar; raises MissingError or StoreError."""
        return self.location.size(self.name) if self.known_size is None else self.known_size

    def open(self) -> IO[bytes]:
        """A seekable file to read from; raises as `size`, also while it is read."""
        return self.location.open(self.name)


def shard_file(where: str | Path) -> ShardFile:
    """The shard of this path or URL, whether it is there or not."""
    folder, name = split_url(str(where))
    return ShardFile(location_of(folder), name)


def index_beside(shards: Sequence[ShardFile]) -> ImageIndex | None:
    """The index that `prepare` wrote, where all shards lie in one local folder that has it."""
    location = shards[0].location
    if location.local is None or any(shard.location != location for shard in shards):
        return None
    return read_index(location) if (location.local / INDEX_NAME).is_file() else None


def expand_shards(spec: str | Path) -> list[ShardFile]:
    """List the shards that `spec` names, sorted and each once.

    Args:
        spec: a folder (its `*.tar`), one shard, a path with braces as `train-{000000..000127}.tar` or
            `{train,test}-000000.tar`, or a glob. Each of them may be a URL; web servers (`https://`) cannot be
            listed, so only single shards and braces are possible there. A local file or folder of exactly this name
            goes first.

    Raises:
        MissingError: the folder, the file, one of the braces' files, or any match of the glob is not there.
        DataError: a folder without shards or that `prepare` has not finished, a folder or glob on a web server,
            braces that make no sense, or a shard that is no regular file.
        SettingError: a URL of an unknown kind.
        StoreError: the object store cannot be read.
    """
    text = str(spec)
    if not text.strip():
        raise DataError("no image shards were named; give a folder of .tar shards, a shard, or a glob")
    if text.startswith("pipe:"):
        raise DataError(f"{text} is a command, which is not run; give a folder of .tar shards, a shard, or a glob")
    if is_url(text):
        return _remote_shards(text)
    path = Path(text)
    if path.is_dir():
        return _shards_in(path)
    if path.exists():
        return _regular([shard_file(path)])
    if "{" in text:
        names = _expand_braces(text)
    elif glob.has_magic(text):
        names = [name for name in glob.glob(text, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207
        if not names:
            raise MissingError(f"no file matches {text}")
    else:
        raise MissingError(f"{text} is not there; expected a folder of .tar shards, a shard, braces or a glob")
    shards = [shard_file(name) for name in sorted(set(names))]
    missing = [shard for shard in shards if not Path(str(shard)).exists()]
    if missing:
        raise _missing(missing, len(shards), text)
    return _regular(shards)


def _regular(shards: list[ShardFile]) -> list[ShardFile]:
    for shard in shards:
        if not Path(str(shard)).exists():
            raise MissingError(f"{shard} is a link to a file that is not there")
        if not Path(str(shard)).is_file():
            raise DataError(f"{shard} is not a regular file; a shard is a tar file, remove this or rename it")
        if not is_utf8(shard.name):
            raise DataError(f"{shard} has a name that is no UTF-8, which no record can hold; rename it")
    return shards


def _missing(missing: list[ShardFile], count: int, text: str) -> MissingError:
    return MissingError(f"{missing[0]} is not there ({len(missing)} of the {count} shards of {text} are missing)")


def _remote_shards(url: str) -> list[ShardFile]:
    text = url.rstrip("/")
    if "{" in text:
        return _remote_braces(text)
    folder, name = split_url(text)
    location = location_of(folder)
    if not location.listable and (glob.has_magic(text) or not name.endswith(".tar")):
        raise DataError(
            f"{text} cannot be listed, as no web server can; name its shards one by one or by braces, as "
            "https://host/folder/train-{000000..000127}.tar"
        )
    if glob.has_magic(text):
        shards = sorted(_remote_glob(text))
        if not shards:
            raise MissingError(f"no file matches {text}")
        return shards
    size = location.present([name]).get(name) if name else None
    if size is not None:
        return [ShardFile(location, name, size)]
    below = location_of(text)
    listing = below.listing() if location.listable else Listing(files={}, folders=())
    if not listing.files and not listing.folders:
        expected = "a folder of .tar shards, a shard, braces or a glob" if location.listable else "a shard or braces"
        raise MissingError(f"{text} is not there; expected {expected}")
    return _shards_of(below, listing.files, listing.folders)


def _remote_braces(text: str) -> list[ShardFile]:
    urls = sorted(set(_expand_braces(text)))
    names: dict[str, list[str]] = {}
    for folder, name in map(split_url, urls):
        names.setdefault(folder, []).append(name)
    shards, missing = [], []
    for folder, wanted in names.items():
        location = location_of(folder)
        sizes = location.present(wanted)
        shards += [ShardFile(location, name, size) for name, size in sizes.items()]
        missing += [ShardFile(location, name) for name in wanted if name not in sizes]
    if missing:
        raise _missing(sorted(missing), len(urls), text)
    return sorted(shards)


def _remote_glob(url: str) -> Iterator[ShardFile]:
    root, path = split_root(url)
    parts = path.split("/") if path else []
    plain = next(index for index, part in enumerate([*parts, "*"]) if glob.has_magic(part))
    if glob.has_magic(root) or plain == len(parts):
        raise DataError(f"{url} has a pattern in its bucket; patterns are for what lies in a bucket")
    yield from _matches(location_of("/".join([root, *parts[:plain]])), parts[plain:])


def _matches(location: Location, patterns: list[str]) -> Iterator[ShardFile]:
    """Files whose parts below `location` match the patterns, as in a shell; `**` is any number of folders."""
    pattern, *below = patterns
    listing = location.listing()
    if pattern == "**":
        yield from _matches(location, below or ["*"])
        for folder in listing.folders:
            if not folder.startswith("."):
                yield from _matches(location.child(folder), patterns)
    elif below:
        for folder in _like(listing.folders, pattern):
            yield from _matches(location.child(folder), below)
    else:
        yield from (ShardFile(location, name, listing.files[name]) for name in _like(listing.files, pattern))


def _like(names: Iterable[str], pattern: str) -> list[str]:
    hidden = pattern.startswith(".")
    return [name for name in names if fnmatchcase(name, pattern) and (hidden or not name.startswith("."))]


def _shards_in(folder: Path) -> list[ShardFile]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = {entry.name: None for entry in entries if not entry.is_dir()}
    return _regular(_shards_of(location_of(folder), files, folders))


def _shards_of(location: Location, files: Mapping[str, int | None], folders: Iterable[str]) -> list[ShardFile]:
    """The shards of a folder that holds these files, with their sizes where they are known, and these folders."""
    if PREPARE_MARKER in files:
        raise DataError(f"{location} is not complete: `milan-pipe prepare` still runs or was stopped; run it again")
    names = sorted(name for name in files if not name.startswith("."))
    if shards := [ShardFile(location, name, files[name]) for name in names if name.endswith(".tar")]:
        if INDEX_NAME in files:
            _warn_unless_indexed(shards)
        return shards
    if other := mistaken(location.local, IMAGES):
        raise DataError(other)
    images = sum(suffix_of(name) in IMAGE_SUFFIXES for name in names)
    subfolders = sum(not name.startswith(".") for name in folders)
    if images or subfolders:
        found = " and ".join(f"{n} {noun}" for n, noun in ((images, "images"), (subfolders, "subfolders")) if n)
        raise DataError(
            f"{location} holds {found} and no .tar shards; run `milan-pipe prepare` to pack images into shards"
        )
    if not names:
        raise DataError(f"{location} is empty; expected .tar shards, which `milan-pipe prepare` writes")
    raise DataError(f"{location} holds no .tar shards; found {len(names)} other files, as {names[0]}")


def _warn_unless_indexed(shards: Sequence[ShardFile]) -> None:
    """Warn where all shards of a folder are not those that its index names, by names and sizes."""
    location = shards[0].location
    try:
        records = {record.name: record for record in read_index(location).shards}
    except MilanError:  # Shards are what they are without one.
        return
    listed = {shard.name: shard for shard in shards}
    same = {name for name in listed.keys() & records.keys() if listed[name].size() == records[name].bytes}
    if wrong := sorted((listed.keys() | records.keys()) - same):
        what = "is lost" if wrong[0] not in listed else "is another" if wrong[0] in records else "is not named there"
        warnings.warn(
            f"{location} is not as its {INDEX_NAME} says, which `milan-pipe prepare` wrote: {wrong[0]} {what}"
            f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; all that is there is used",
            RuntimeWarning,
            stacklevel=1,
        )


def _expand_braces(text: str) -> list[str]:
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", text):
        # braceexpand also counts down, and lays every range out in memory.
        if not 0 <= int(last) - int(first) < _MAX_BRACE_NAMES:
            span = f"{{{first}..{last}}}"
            raise DataError(f"{span} in {text} must run upwards and over less than {_MAX_BRACE_NAMES} numbers")
    try:
        names = list(islice(braceexpand(text, escape=False), _MAX_BRACE_NAMES + 1))
    except ValueError:  # They are not balanced.
        names = [text]
    if len(names) > _MAX_BRACE_NAMES:
        raise DataError(f"{text} names more than {_MAX_BRACE_NAMES} shards")
    if any("{" in name for name in names):
        raise DataError(f"braces in {text} are not understood; expected {{000000..000127}} or {{train,test}}")
    return names
