"""A folder of files: its interface, and how a path or URL names one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from milan_pipe.errors import SettingError, printable

SCRATCH = ".partial-"
"""Prefix of names of unfinished work, which readers skip."""

SCHEMES = ("s3", "gs", "az", "hf", "https", "http")

_REPOSITORY = re.compile(r"hf://datasets/[^/@]+/[^/@]+(@(refs/[^/]+/[^/]+|[^/]+))?(?=/|$)", re.IGNORECASE)


def is_url(text: str | Path) -> bool:
    """Whether `text` has a scheme, as `s3://bucket/folder`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def split_root(url: str) -> tuple[str, str]:
    """What a URL's store begins with (`s3://bucket`, a web server's host, `hf://datasets/ORG/NAME`), and the rest."""
    if found := _REPOSITORY.match(url):
        return found[0], url[found.end() :].strip("/")
    scheme, _, rest = url.partition("://")
    root, _, path = rest.partition("/")
    return f"{scheme}://{root}", path.strip("/")


def split_url(url: str) -> tuple[str, str]:
    """Folder and file name of a URL or path; the name is empty where a URL names a bucket, host or repository only."""
    if not is_url(url):
        return str(Path(url).parent), Path(url).name
    root, path = split_root(url)
    folder, _, name = path.rpartition("/")
    return f"{root}/{folder}" if folder else root, name


def location_of(where: str | Path) -> Location:
    """The folder that a path or URL names; nothing is read or written yet.

    Raises:
        SettingError: the URL's scheme is not known, or the environment's settings for its store are wrong.
    """
    _require_whole(where)
    if is_url(where):
        # obstore and huggingface_hub take their time to import.
        if str(where).lower().startswith("hf://"):
            from milan_pipe.storage.hub import HubFolder

            return HubFolder(str(where))
        from milan_pipe.storage.object_store import RemoteFolder

        return RemoteFolder(str(where))
    from milan_pipe.storage.local import LocalFolder

    return LocalFolder(Path(where))


def local_folder(where: str | Path, what: str) -> Path:
    """The path of a folder for `what`; raises SettingError for a URL, of which `Path` would make a folder `s3:`."""
    _require_whole(where)
    if is_url(where):
        raise SettingError(
            f"{where} is a URL, and {what} are written to a local folder only; name a folder, and copy it to the URL "
            "afterwards"
        )
    return Path(where)


def _require_whole(where: str | Path) -> None:
    # `Path` drops a slash of a URL; the rest would become a local folder.
    if re.match(rf"({'|'.join(SCHEMES)}):/[^/]", str(where)):
        scheme, rest = str(where).split(":/", 1)
        raise SettingError(f"{where} has lost a slash of its URL, as Path does; give it as text, as {scheme}://{rest}")


def require_writable(location: Location) -> None:
    """Raise SettingError for a location on a web server or a hub, which can only be read."""
    if not location.writable:
        raise SettingError(f"{location} can only be read; write to a local folder, s3://, gs:// or az://")


class Listing(NamedTuple):
    """Direct content of a folder: bytes of each file by name, names of folders; both sorted."""

    files: dict[str, int]
    folders: tuple[str, ...]


class Location(ABC):
    """A folder, which need not exist. Paths are relative to it, with `/` between their parts. It can be pickled.

    Methods raise MissingError where a file to read does not exist, StoreError where the store cannot be read or
    written. Files are written whole or not at all.

    Attributes:
        address: path or URL, for `location_of`.
        name: the same for messages, without the password of a URL.
        local: the folder's path, if it is a local one.
        listable: whether the store can list its content; web servers cannot.
        writable: whether the store can be written to; web servers and hubs cannot.
    """

    local: Path | None = None
    listable: bool = True
    writable: bool = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.name = printable(address)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"location_of({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return location_of, (self.address,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    @abstractmethod
    def child(self, path: str) -> Location:
        """A folder in this folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All bytes of a file."""

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file; fewer where it ends before."""

    def read_into(
        self, path: str, start: int, memory: memoryview, on_part: Callable[[int], None] = lambda _: None
    ) -> int:
        """Fill memory with the bytes of a file from `start` on; returns how many there were.

        Args:
            on_part: called with how many are there so far, part by part while the last one is still in the cache.
        """
        data = self.read_range(path, start, start + len(memory))
        memory[: len(data)] = data
        on_part(len(data))
        return len(data)

    @abstractmethod
    def open(self, path: str) -> IO[bytes]:
        """A seekable file to read from; a remote one is read ahead. Reading it raises as this does."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def present(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes, by name, of the named files in this folder that exist."""

    @abstractmethod
    def listing(self) -> Listing:
        """Direct content, scratch left out; a folder that does not exist is empty. StoreError if not `listable`."""

    @abstractmethod
    def sizes(self, expected: Iterable[str] = ()) -> dict[str, int]:
        """Bytes of every file below this folder by its path, sorted, scratch left out.

        Args:
            expected: the files to look for if the store is not `listable`.
        """

    @abstractmethod
    def write(self, path: str, data: bytes, *, replace: bool = True) -> bool:
        """Write a file.

        Returns:
            False where it exists and must not be replaced. After a disturbance an object store may say so although it
            wrote the file: read it.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file, or a folder with its content, if it exists."""

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """A new, empty local folder in which to make the folder `name`; see `publish`."""

    @abstractmethod
    def publish(self, scratch: Path, path: str) -> None:
        """Replace the folder `path` by the content of a scratch folder, which is removed.

        A local folder is flushed and renamed: of several at once one stays, whole, and a failure changes nothing. In an
        object store files come one after another: readers need a sign that all are present, and processes that publish
        one folder at once must bring files of the same names.
        """

    @abstractmethod
    def clear_scratch(self, name: str = "") -> None:
        """Remove scratch of interrupted attempts at `name`, or at anything."""


def is_foreign(name: str) -> bool:
    """Whether a name is unfinished work, what macOS leaves in a folder, or what NFS makes of a removed open file."""
    return name.startswith((SCRATCH, "._", ".nfs")) or name == ".DS_Store"
