"""Folders of files, on a local disk or in an object store, behind one small interface.

Local files are pathlib's; `s3://`, `gs://`, `az://` and `https://` (reading only) go through obstore, which retries
what fails for the moment with growing pauses, and gives up within half a minute. A file is always written whole:
beside its place and renamed, or by one request that an object store carries out as a whole.

Credentials and addresses come from the environment:

- `s3://`: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`,
  `AWS_SKIP_SIGNATURE=true` for public buckets. Without a key, `AWS_PROFILE` and the files below `~/.aws` are read where
  boto3 is installed; otherwise the machine's own role is asked for.
- `gs://`: `GOOGLE_APPLICATION_CREDENTIALS` or `GOOGLE_SERVICE_ACCOUNT`, `GOOGLE_SKIP_SIGNATURE=true`.
- `az://`: `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_KEY`,
  `AZURE_SKIP_SIGNATURE=true`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import platform
import re
import shutil
import stat
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, NotSupportedError, PreconditionError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from milan_pipe.errors import MilanError, MissingError, SettingError, StoreError, printable, resource_hint

SCRATCH = ".partial-"
"""Names that begin so are unfinished work, which readers pass over."""

_SCHEMES = ("s3", "gs", "az", "https", "http")
_PARALLEL_REQUESTS = 16
_WRITE_ATTEMPTS = 3
_PARTS_IN_FLIGHT = 4
# Below this number of files, asking for each is sooner done than listing a folder of unknown length.
_FEW_FILES = 64
_READ_AHEAD_BYTES = 8 * 1024 * 1024
# The factor is a bound on a random pause: below 3, pauses shrink as often as they grow.
_RETRIES: Any = {
    "max_retries": 10,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 4},
    "retry_timeout": timedelta(seconds=20),
}
_TIMEOUTS: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}


def is_url(text: str | Path) -> bool:
    """Whether `text` has a scheme, as `s3://bucket/folder`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def split_url(url: str) -> tuple[str, str]:
    """Folder and file name of a URL or path; the name is empty where a URL names a bucket or host only."""
    if not is_url(url):
        return str(Path(url).parent), Path(url).name
    scheme, _, rest = url.rstrip("/").partition("://")
    folder, _, name = rest.rpartition("/")
    return (f"{scheme}://{folder}", name) if folder else (f"{scheme}://{rest}", "")


def location_of(where: str | Path) -> Location:
    """The folder that a path or URL names; nothing is read or made yet.

    Raises:
        SettingError: the URL's scheme is not known, or what the environment says of its store makes no sense.
    """
    _require_whole(where)
    return _Bucket(str(where)) if is_url(where) else _Folder(Path(where))


def local_folder(where: str | Path, what: str) -> Path:
    """The path of a folder that must be on a disk.

    Args:
        what: what is written there, for the message.

    Raises:
        SettingError: it is a URL, from which `Path` would make a folder named `s3:`.
    """
    _require_whole(where)
    if is_url(where):
        raise SettingError(
            f"{where} is a URL, and {what} are written to a local folder only; name a folder, and copy it there "
            "when it is done"
        )
    return Path(where)


def _require_whole(where: str | Path) -> None:
    # `Path` drops a slash of a URL, and what is left would be made as a folder here.
    lost = re.match(rf"({'|'.join(_SCHEMES)}):/[^/]", str(where))
    if lost is not None:
        scheme, rest = str(where).split(":/", 1)
        raise SettingError(f"{where} has lost a slash of its URL, as Path does; give it as text, as {scheme}://{rest}")


def require_writable(location: Location) -> None:
    """Refuse a location that can only be read, before any work is done for it.

    Raises:
        SettingError: it is on a web server.
    """
    if not location.listable:
        raise SettingError(
            f"{location} can only be read, as any web server; write to a local folder, s3://, gs:// or az://"
        )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies directly in a folder; both in name order.

    Attributes:
        files: bytes of each file, by name.
        folders: names.
    """

    files: dict[str, int]
    folders: tuple[str, ...]


class Location(ABC):
    """A folder. Paths are relative to it, with `/` between their parts. It can be sent to other processes."""

    name: str
    """The path or URL, for messages: without the password of a URL."""

    address: str
    """The path or URL, by which `location_of` finds it again."""

    local: Path | None = None
    """The folder itself, where it is a local one."""

    listable: bool = True
    """Whether the store can say what it holds; web servers cannot."""

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
        """All bytes of a file.

        Raises:
            MissingError: no such file.
            StoreError: it cannot be read.
        """

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file; fewer where it ends before. Raises as `read`."""

    @abstractmethod
    def open(self, path: str) -> IO[bytes]:
        """A seekable file to read from, read ahead where it is far away. Raises as `read`, also while it is read."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file. Raises as `read`."""

    @abstractmethod
    def present(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of the named files in this folder that are there, by name.

        Raises:
            StoreError: the store cannot be read.
        """

    @abstractmethod
    def listing(self) -> Listing:
        """What lies directly in this folder; nothing where it is not there. Scratch is left out.

        Raises:
            StoreError: the store cannot be read, or not be listed (https).
        """

    @abstractmethod
    def sizes(self, folder: str = "", expected: Iterable[str] = ()) -> dict[str, int]:
        """Bytes of every file below a folder, by its path relative to that folder, sorted; scratch is left out.

        Args:
            folder: nothing is found where it is not there.
            expected: where a store cannot be listed (https), the files to ask for one by one.

        Raises:
            StoreError: the store cannot be read.
        """

    @abstractmethod
    def write(self, path: str, data: bytes, *, replace: bool = True) -> bool:
        """Write a file as a whole.

        Returns:
            False where it is there and must not be replaced. An object store may also say so after a disturbance in
            which the file was written all the same: look what is there.

        Raises:
            StoreError: it cannot be written.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all in it; nothing where there is none.

        Raises:
            StoreError: it cannot be removed.
        """

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """A new, empty local folder for the making of `name`; see `publish`.

        Raises:
            StoreError: it cannot be made.
        """

    @abstractmethod
    def publish(self, scratch: Path, path: str) -> None:
        """Put the content of a scratch folder in the place of the folder `path`, and remove the scratch.

        Locally a folder is flushed to the disk and renamed; several at once leave the whole of one, and where it fails
        what was there stays. In an object store the files come one after another, so a reader must be message by other
        means that all are there, and processes that publish one folder at once must bring files of the same names.

        Raises:
            StoreError: it cannot be written.
        """

    @abstractmethod
    def clear_scratch(self, name: str = "") -> None:
        """Remove what interrupted attempts at `name`, or at anything, left."""


def _is_scratch(entry: str, name: str, prefix: str) -> bool:
    """Whether an entry is scratch of `name` exactly: of `a`, and not of `a-b`; of anything where there is no name."""
    wanted = re.escape(name) if name else ".+"
    return re.fullmatch(rf"{re.escape(prefix)}{wanted}-[0-9a-f]{{32}}", entry, re.DOTALL) is not None


def _is_foreign(name: str) -> bool:
    """Unfinished work, and what macOS leaves in every folder that it shows: no content of any folder."""
    return name.startswith((SCRATCH, "._")) or name == ".DS_Store"


def _is_content(path: str) -> bool:
    return not any(map(_is_foreign, path.split("/")))


def _remove_entry(path: Path) -> None:
    """Remove scratch; what stands in the way is left for later.

    It is renamed first. Removed in place, a folder would be filled again by an owner that still writes, and could take
    its final name in parts; renamed, it is gone for its owner in one step.
    """
    own = path.with_name(f"{SCRATCH}removed-{uuid.uuid4().hex}")
    with suppress(OSError):
        path.rename(own)
        if own.is_dir() and not own.is_symlink():
            shutil.rmtree(own, ignore_errors=True)
        else:
            own.unlink()


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: after a power cut a rename may be there without the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems flush no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _flush_all(folder: Path) -> None:
    for here, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(here, name))
        flush(Path(here))


# --- local --------------------------------------------------------------------------------------------------------


class _Folder(Location):
    def __init__(self, path: Path) -> None:
        self.local: Path = path
        self.name = self.address = str(path)

    def child(self, path: str) -> Location:
        return _Folder(self.local / path)

    @contextmanager
    def _errors(self, path: str, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and doing not in ("made", "written"):
                raise MissingError(f"{self.local / path} is not there") from None
            reason = resource_hint(error) or error.strerror or error
            raise StoreError(f"{self.local / path} cannot be {doing}: {reason}") from error

    def read(self, path: str) -> bytes:
        with self.open(path) as file, self._errors(path, "read"):
            return file.read()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._errors(path, "read"), open_regular(self.local / path) as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def open(self, path: str) -> IO[bytes]:
        with self._errors(path, "read"):
            return io.BufferedReader(open_regular(self.local / path))

    def size(self, path: str) -> int:
        with self._errors(path, "read"):
            return (self.local / path).stat().st_size

    def present(self, names: Iterable[str]) -> dict[str, int]:
        with self._errors("", "read"):
            return {name: (self.local / name).stat().st_size for name in names if (self.local / name).is_file()}

    def listing(self) -> Listing:
        files, folders = {}, []
        try:
            with self._errors("", "listed"), os.scandir(self.local) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if _is_foreign(entry.name):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files[entry.name] = entry.stat().st_size
        except MissingError:
            return Listing(files={}, folders=())
        return Listing(files=files, folders=tuple(folders))

    def sizes(self, folder: str = "", expected: Iterable[str] = ()) -> dict[str, int]:  # noqa: ARG002
        root = str(self.local / folder)
        found = {}
        with self._errors(folder, "listed"):
            for here, folders, files in os.walk(root, onerror=_unless_missing):
                folders[:] = sorted(name for name in folders if not _is_foreign(name))
                below = here[len(root) :].replace(os.sep, "/").strip("/")
                for name in files:
                    # Another process may remove what has just been listed.
                    with suppress(FileNotFoundError):
                        if not _is_foreign(name):
                            found[f"{below}/{name}" if below else name] = Path(here, name).stat().st_size
        return {path: found[path] for path in sorted(found)}

    def write(self, path: str, data: bytes, *, replace: bool = True) -> bool:
        final = self.local / path
        for attempt in range(_WRITE_ATTEMPTS):
            beside = final.with_name(f"{SCRATCH}{final.name}-{uuid.uuid4().hex}")
            try:
                final.parent.mkdir(parents=True, exist_ok=True)
                _write_flushed(beside, data)
                if replace:
                    beside.replace(final)
                else:
                    _create(beside, final)
                flush(final.parent)
                break
            except OSError as error:
                if isinstance(error, FileExistsError) and not replace and final.exists():
                    return False
                # Another process that has finished the store may just have cleared all scratch away.
                if isinstance(error, FileNotFoundError) and attempt + 1 < _WRITE_ATTEMPTS:
                    continue
                reason = resource_hint(error) or error.strerror or error
                raise StoreError(f"{final} cannot be written: {reason}") from error
            finally:
                with suppress(OSError):
                    beside.unlink()
        return True

    def remove(self, path: str) -> None:
        target = self.local / path
        with self._errors(path, "removed"), suppress(FileNotFoundError):
            if target.is_dir() and not target.is_symlink():
                # In one step: whoever reads sees the whole of it or nothing.
                shutil.rmtree(target.rename(target.with_name(f"{SCRATCH}removed-{uuid.uuid4().hex}")))
            else:
                target.unlink()

    def scratch(self, name: str) -> Path:
        path = self.local / f"{SCRATCH}{name}-{uuid.uuid4().hex}"
        with self._errors(path.name, "made"):
            path.mkdir(parents=True)
        return path

    def publish(self, scratch: Path, path: str) -> None:
        final = self.local / path
        with self._errors(path, "written"):
            final.parent.mkdir(parents=True, exist_ok=True)
            _flush_all(scratch)
            aside: Path | None = None
            try:
                # Removed in place, the old folder would be seen in parts, and two processes would be at it at once.
                while not _renamed(scratch, final):
                    if aside is not None:
                        _remove_entry(aside)
                    aside = final.with_name(f"{SCRATCH}{final.name}-{uuid.uuid4().hex}")
                    with suppress(FileNotFoundError):
                        final.rename(aside)
            except OSError:
                if aside is not None:
                    # Nothing follows the old folder, which may be committed: it stays.
                    with suppress(OSError):
                        aside.rename(final)
                raise
            finally:
                if aside is not None:
                    _remove_entry(aside)
            flush(final.parent)

    def clear_scratch(self, name: str = "") -> None:
        with suppress(OSError):
            for entry in list(os.scandir(self.local)):
                if _is_scratch(entry.name, name, SCRATCH):
                    _remove_entry(Path(entry.path))


def open_regular(path: Path) -> io.FileIO:
    """A file without a buffer; raises OSError for what is no regular file: a pipe would be waited for for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(path)


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _create(beside: Path, final: Path) -> None:
    """Give a file its final name; raises FileExistsError where it is taken."""
    try:
        # Unlike a rename, a link fails where the name is taken, in one step.
        os.link(beside, final)
    except OSError as error:
        if isinstance(error, (FileExistsError, FileNotFoundError)) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A file system without links. Who is first is settled in one step too; its content follows.
        with final.open("xb") as file:
            file.write(beside.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _renamed(scratch: Path, final: Path) -> bool:
    """Whether the folder could take its final name; False where a folder with something in it has it."""
    try:
        scratch.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


# --- object stores ------------------------------------------------------------------------------------------------

_started_here = False
_started_before_fork = False


def _note_fork() -> None:
    global _started_before_fork
    _started_before_fork = _started_here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _start(where: str) -> None:
    # The client's threads do not come along through a fork, and every request would wait for them for ever.
    if _started_before_fork:
        raise StoreError(
            f"{where} cannot be reached: this process was forked from one that had used an object store; start worker "
            "processes by spawn"
        )
    global _started_here
    _started_here = True


def _connect(scheme: str, bucket: str, prefix: str | None) -> Any:
    shared: Any = {"client_options": dict(_TIMEOUTS), "retry_config": _RETRIES}
    if scheme == "gs":
        return GCSStore(bucket, prefix=prefix, **shared)
    if scheme == "az":
        return AzureStore(bucket, prefix=prefix, **shared)
    if scheme in ("http", "https"):
        shared["client_options"]["allow_http"] = scheme == "http"
        return HTTPStore(f"{scheme}://{bucket}/{prefix or ''}", **shared)
    endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"))
    # An endpoint without TLS is only ever named on purpose.
    if any(endpoint.startswith("http://") for endpoint in endpoints):
        shared["client_options"]["allow_http"] = True
    profile = _profile()
    if profile is not None:
        shared["credential_provider"] = profile
    return S3Store(bucket, prefix=prefix, **shared)


def _profile() -> Any:
    """Credentials of `AWS_PROFILE` or of the files below `~/.aws`, where nothing nearer is set; None without."""
    nearer = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(name) for name in nearer):
        return None
    profile = os.environ.get("AWS_PROFILE")
    files = [
        Path(os.environ.get(variable) or Path.home() / ".aws" / name)
        for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config"))
    ]
    if profile is None and not any(file.is_file() for file in files):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if profile is None:
            return None
        raise SettingError(
            f"AWS_PROFILE is {profile} and boto3, which reads profiles, is not installed; install it, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        return Boto3CredentialProvider()
    except Exception as error:
        if profile is None:
            return None
        raise SettingError(f"AWS_PROFILE is {profile} and cannot be used: {_one_line(str(error))}") from error


class _Bucket(Location):
    def __init__(self, url: str, root: Any = None) -> None:
        self.address = url.rstrip("/")
        self.name = printable(self.address)
        self._scheme, _, rest = self.address.partition("://")
        self._scheme = self._scheme.lower()
        self._bucket, _, prefix = rest.partition("/")
        self._prefix = prefix.strip("/")
        self.listable = self._scheme not in ("http", "https")
        if self._scheme not in _SCHEMES or not self._bucket:
            raise SettingError(
                f"{url} cannot be opened; expected a path, or s3://, gs://, az:// or https:// with a bucket or host"
            )
        # Folders of one bucket share its connections.
        self._root = self._connected(None) if root is None else root

    @cached_property
    def store(self) -> Any:
        """An obstore store whose paths are relative to this folder, for libraries that take one."""
        _start(self.name)
        return self._connected(self._prefix or None)

    def _connected(self, prefix: str | None) -> Any:
        try:
            return _connect(self._scheme, self._bucket, prefix)
        except (BaseError, ValueError, OSError) as error:
            if isinstance(error, MilanError):
                raise
            reason = _one_line(str(error).partition("Debug source:")[0])
            hint = "; set AZURE_STORAGE_ACCOUNT_NAME" if "Account must be specified" in reason else ""
            raise SettingError(f"{self.name} cannot be opened: {reason}{hint}") from error

    def _key(self, path: str) -> str:
        key = f"{self._prefix}/{path}".strip("/")
        # Web addresses are written with escapes, which the client adds again.
        return key if self.listable else unquote(key)

    def _where(self, path: str) -> str:
        return f"{self.name}/{path}" if path else self.name

    def child(self, path: str) -> Location:
        return _Bucket(f"{self.address}/{path}", self._root)

    @contextmanager
    def _errors(self, path: str, doing: str) -> Iterator[None]:
        _start(self._where(path))
        try:
            yield
        except MilanError:
            raise
        except (BaseError, OSError, ValueError) as error:
            raise self._translated(error, path, doing) from error

    def _translated(self, error: Exception, path: str, doing: str) -> MilanError:
        text = str(error)
        where = self._where(path)
        if "NoSuchBucket" in text or "ContainerNotFound" in text or "The specified bucket does not exist" in text:
            return StoreError(
                f"{where} cannot be {doing}: there is no bucket {self._bucket}; make it, or correct its name"
            )
        if isinstance(error, (FileNotFoundError, NotFoundError)) and doing != "written":
            return MissingError(f"{where} is not there")
        if isinstance(error, PreconditionError):
            return StoreError(f"{where} cannot be {doing}: it was replaced meanwhile; run again")
        if isinstance(error, NotSupportedError) and "Range request" in text:
            return StoreError(f"{where} cannot be {doing}: its server does not send parts of files; copy it to a disk")
        return StoreError(f"{where} cannot be {doing}: {resource_hint(error) or _reason(text, self._scheme)}")

    def read(self, path: str) -> bytes:
        with self._errors(path, "read"):
            return bytes(obstore.get(self._root, self._key(path)).bytes())

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._errors(path, "read"):
            try:
                if start < stop:
                    return bytes(obstore.get_range(self._root, self._key(path), start=start, end=stop))
            except BaseError as error:
                # A range behind the end is an error here, and nothing to read elsewhere.
                if "status code: 416" not in str(error) or start < self.size(path):
                    raise
        self.size(path)
        return b""

    def open(self, path: str) -> IO[bytes]:
        with self._errors(path, "read"):
            meta = obstore.head(self._root, self._key(path))
        options = {}
        tag = meta["e_tag"]
        # A weak tag never matches.
        if tag is not None and not tag.startswith("W/"):
            options["if_match"] = tag

        def fetch(start: int, stop: int) -> bytes:
            with self._errors(path, "read"):
                wanted: Any = {**options, "range": (start, stop)}
                return bytes(obstore.get(self._root, self._key(path), options=wanted).bytes())

        return cast("IO[bytes]", io.BufferedReader(_RemoteFile(fetch, int(meta["size"])), 64 * 1024))

    def size(self, path: str) -> int:
        with self._errors(path, "read"):
            return int(obstore.head(self._root, self._key(path))["size"])

    def present(self, names: Iterable[str]) -> dict[str, int]:
        wanted = list(names)
        if self.listable and len(wanted) > _FEW_FILES:
            files = self.listing().files
            return {name: files[name] for name in wanted if name in files}
        return self._ask("", wanted)

    def _ask(self, prefix: str, paths: list[str]) -> dict[str, int]:
        def ask(path: str) -> int | None:
            try:
                return self.size(prefix + path)
            except MissingError:
                return None

        with _pool(len(paths)) as pool:
            return {path: size for path, size in zip(paths, pool.map(ask, paths), strict=True) if size is not None}

    def listing(self) -> Listing:
        if not self.listable:
            raise StoreError(f"{self.name} cannot be listed: web servers do not say what they hold; name each file")
        with self._errors("", "listed"):
            found = obstore.list_with_delimiter(self._root, self._prefix or None)
        # A store's own interface shows an empty folder by an object of no bytes.
        files = {PurePosixPath(entry["path"]).name: int(entry["size"]) for entry in found["objects"]}
        folders = {PurePosixPath(path).name for path in found["common_prefixes"]}
        return Listing(
            files={name: files[name] for name in sorted(files) if not _is_foreign(name)},
            folders=tuple(sorted(name for name in folders if not _is_foreign(name))),
        )

    def sizes(self, folder: str = "", expected: Iterable[str] = ()) -> dict[str, int]:
        if not self.listable:
            return self._ask(f"{folder}/" if folder else "", list(expected))
        key = self._key(folder)
        with self._errors(folder, "listed"):
            listed = {
                entry["path"].removeprefix(f"{key}/" if key else ""): int(entry["size"])
                for batch in obstore.list(self._root, key or None)
                for entry in batch
            }
        return {path: listed[path] for path in sorted(listed) if _is_content(path)}

    def write(self, path: str, data: bytes, *, replace: bool = True) -> bool:
        with self._errors(path, "written"):
            try:
                if replace:
                    obstore.put(self._root, self._key(path), data, max_concurrency=_PARTS_IN_FLIGHT)
                else:
                    obstore.put(self._root, self._key(path), data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def remove(self, path: str) -> None:
        with self._errors(path, "removed"):
            key = self._key(path)
            for batch in obstore.list(self._root, key):
                obstore.delete(self._root, [entry["path"] for entry in batch])
            with suppress(FileNotFoundError, NotFoundError):
                obstore.delete(self._root, key)

    def _scratch_root(self) -> Path:
        # The same for every attempt on this machine, so that one can clear up after another that was killed; machines
        # may share their temporary folder.
        digest = hashlib.sha256(f"{platform.node()} {self.name}".encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"milan-pipe-{os.getuid()}-{digest}"

    def scratch(self, name: str) -> Path:
        root = self._scratch_root()
        path = root / f"{name}-{uuid.uuid4().hex}"
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            # The name can be foreseen, and the folder above is everybody's.
            if root.stat().st_uid != os.getuid() or root.is_symlink():
                raise StoreError(f"{root} belongs to another user; set TMPDIR to a folder of your own")
            path.mkdir(parents=True)
        except StoreError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"{path} cannot be made: {reason}; set TMPDIR to a folder with room") from error
        return path

    def publish(self, scratch: Path, path: str) -> None:
        files = {file.relative_to(scratch).as_posix(): file for file in scratch.rglob("*") if file.is_file()}

        def upload(name: str) -> None:
            with self._errors(f"{path}/{name}", "written"):
                obstore.put(self._root, self._key(f"{path}/{name}"), files[name], max_concurrency=_PARTS_IN_FLIGHT)

        with _pool(len(files)) as pool:
            list(pool.map(upload, sorted(files)))
        for stray in self.sizes(path).keys() - files.keys():
            self.remove(f"{path}/{stray}")
        shutil.rmtree(scratch, ignore_errors=True)

    def clear_scratch(self, name: str = "") -> None:
        root = self._scratch_root()
        with suppress(OSError):
            for entry in list(os.scandir(root)):
                if _is_scratch(entry.name, name, ""):
                    _remove_entry(Path(entry.path))
            root.rmdir()


@contextmanager
def _pool(tasks: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests; the first error ends the wait for those that have not begun."""
    pool = ThreadPoolExecutor(max(1, min(tasks, _PARALLEL_REQUESTS)), thread_name_prefix="requests")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _RemoteFile(io.RawIOBase):
    """An object as a raw file of blocks. The next block comes while one is read; the one before stays for steps back.

    Args:
        fetch: takes start and stop in bytes, not past the end.
        size: bytes of the object.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._position = 0
        self._blocks: dict[int, Future[bytes]] = {}
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the first byte")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        index, start = divmod(self._position, _READ_AHEAD_BYTES)
        data = memoryview(self._block(index))[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, index: int) -> bytes:
        in_order = index == 0 or index - 1 in self._blocks
        self._blocks = {at: block for at, block in self._blocks.items() if abs(at - index) <= 1}
        self._begin(index)
        if in_order:
            self._begin(index + 1)
        return self._blocks[index].result()

    def _begin(self, index: int) -> None:
        start = index * _READ_AHEAD_BYTES
        if index not in self._blocks and start < self._size:
            stop = min(start + _READ_AHEAD_BYTES, self._size)
            self._blocks[index] = self._ahead.submit(self._fetch, start, stop)

    def close(self) -> None:
        if not self.closed:
            self._ahead.shutdown(wait=False, cancel_futures=True)
            self._blocks.clear()
        super().close()


# --- what went wrong ----------------------------------------------------------------------------------------------

_HOW_TO_SIGN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, or AZURE_SKIP_SIGNATURE=true for a public container",
}
_ASKS_FOR_CREDENTIALS = (
    "/latest/api/token",
    "/latest/meta-data",
    "/computeMetadata/",
    "/metadata/identity",
    "//169.254.",
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_ADVICE = {
    "401": "check the credentials",
    "403": "check the credentials, and what they may do here",
    "301": "set AWS_REGION to the bucket's region",
}


def _reason(text: str, scheme: str) -> str:
    """One line for a person, from obstore's message, which holds addresses, XML and the debug form of its source."""
    message, _, debug = text.partition("Debug source:")
    request = re.search(
        r"Error performing (?P<method>[A-Z]+) (?P<url>\S+) in (?P<time>[\d.]+)(?P<unit>[^\d\s,]*s)"
        r"(?:, after (?P<retries>\d+) retries)?.*? - (?P<what>.*)",
        message,
        re.DOTALL,
    )
    if request is None:
        return _one_line(message) + _cause(debug)
    if any(part in request["url"] for part in _ASKS_FOR_CREDENTIALS) and scheme in _HOW_TO_SIGN:
        return f"no credentials were found; {_HOW_TO_SIGN[scheme]}"
    seconds = f"{float(request['time']):.0f} s" if request["unit"] == "s" else "less than a second"
    tries = f" (tried {int(request['retries']) + 1} times in {seconds})" if request["retries"] else ""
    host = "/".join(request["url"].split("/")[:3])
    status = re.match(r"Server returned non-2xx status code: (\d{3}) ?([^:]*)", request["what"])
    if status is None:
        return f"no answer from {host}{_cause(debug)}{tries}"
    advice = _ADVICE.get(status[1])
    return f"{host} answered {status[1]} {status[2]}{_said(request['what'])}{tries}" + (f"; {advice}" if advice else "")


def _said(what: str) -> str:
    parts = [match[1] for tag in ("Code", "Message") if (match := re.search(rf"<{tag}>([^<]*)</{tag}>", what))]
    return f", {_one_line(': '.join(parts))}" if parts else ""


def _cause(debug: str) -> str:
    """The innermost words of a chain of errors, as "Connection refused"."""
    certificate = re.search(r"InvalidCertificate\((?:\s*\w+\()*\s*(\w+)", debug)
    if certificate is not None:
        return f": its certificate is not accepted ({certificate[1]}); set SSL_CERT_FILE to that of its issuer"
    kind = re.search(r"kind: (Connect|Timeout|Interrupted)", debug)
    words = re.findall(r'(?:message|error): "([^"]+)"', debug)
    if not words and kind is not None:
        words = [{"Connect": "no connection", "Timeout": "time is over", "Interrupted": "connection lost"}[kind[1]]]
    return f": {_one_line(words[-1])}" if words else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300] or "no reason was given"
