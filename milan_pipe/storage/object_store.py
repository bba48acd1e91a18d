"""Folders in an object store: `s3://`, `gs://`, `az://`, and `https://` for reading, by obstore.

Requests that fail for the moment are repeated with growing pauses, for 20 seconds at most. Credentials come from the
environment: docs/object-storage.md.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from milan_pipe.errors import MilanError, MissingError, SettingError, StoreError
from milan_pipe.storage.local import MOST_READ_WHOLE, LocalFolder, clear_scratch
from milan_pipe.storage.location import SCHEMES, Listing, Location, is_foreign, split_root
from milan_pipe.storage.messages import translated, without_debug

READ_AHEAD_BYTES = 8 * 1024 * 1024
# The factor bounds a random pause: below 3, pauses shrink as often as they grow.
RETRIES: Any = {
    "max_retries": 10,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 4},
    "retry_timeout": timedelta(seconds=20),
}
TIMEOUTS: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}

_PARALLEL_REQUESTS = 16
_PARTS_IN_FLIGHT = 4
_MOST_LISTED = 10**7
# Up to this number of files, a request for each is faster than listing a folder of unknown length.
_FEW_FILES = 64

T = TypeVar("T")

_first_process: int | None = None


def _require_not_forked(where: str) -> None:
    # The client's threads do not come along through a fork, and every request would wait for them for ever.
    global _first_process
    _first_process = _first_process or os.getpid()
    if _first_process != os.getpid():
        raise StoreError(
            f"{where} cannot be reached: this process was forked from one that had used an object store; start worker "
            "processes by spawn"
        )


class RemoteFolder(Location):
    """A folder in an object store or on a web server.

    Args:
        url: without credentials, which come from the environment.
        root: the store of its bucket; folders of one bucket share its connections.
    """

    def __init__(self, url: str, root: Any = None) -> None:
        super().__init__(url.rstrip("/"))
        start, self._prefix = split_root(self.address)
        scheme, _, bucket = start.partition("://")
        self._scheme = scheme.lower()
        self.listable = self.writable = self._scheme not in ("http", "https")
        if self._scheme not in SCHEMES or not bucket:
            raise SettingError(
                f"{url} cannot be opened; expected a path, or s3://, gs://, az:// or https:// with a bucket or host"
            )
        try:
            self._store = root or _connect(self._scheme, bucket)
        except MilanError:
            raise
        except (BaseError, ValueError, OSError) as error:
            reason = without_debug(str(error))
            hint = "; set AZURE_STORAGE_ACCOUNT_NAME" if "Account must be specified" in reason else ""
            raise SettingError(f"{self.name} cannot be opened: {reason}{hint}") from error

    @property
    def _root(self) -> Any:
        return self._store

    def _key(self, path: str) -> str:
        key = f"{self._prefix}/{path}".strip("/")
        # Web addresses are written with escapes, which the client adds again.
        return key if self.listable else unquote(key)

    @contextmanager
    def _errors(self, path: str, doing: str) -> Iterator[None]:
        url = f"{self.name}/{path}" if path else self.name
        _require_not_forked(url)
        try:
            yield
        except MilanError:
            raise
        except (BaseError, OSError, ValueError) as error:
            raise translated(error, url, doing) from error

    def child(self, path: str) -> Location:
        return RemoteFolder(f"{self.address}/{path}", self._store)

    def _bytes(self, path: str, most: int, options: Any = None) -> bytes:
        """What a request gives, if it is not more than `most` bytes: a server says and sends what it likes."""

        def require(count: int) -> None:
            if count > most:
                raise StoreError(f"{self}/{path} has {count} bytes or more, expected at most {most}; copy it again")

        answer = obstore.get(self._root, self._key(path), options=options)
        start, stop = answer.range
        require(stop - start)
        parts, count = [], 0
        for part in answer.stream():
            parts.append(part)
            count += len(part)
            require(count)
        if count != stop - start:
            raise StoreError(f"{self}/{path}: {count} of {stop - start} bytes came; run the same command again")
        return b"".join(parts)

    def read(self, path: str) -> bytes:
        with self._errors(path, "read"):
            return self._bytes(path, MOST_READ_WHOLE)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._errors(path, "read"):
            try:
                if start < stop:
                    return self._bytes(path, stop - start, {"range": (start, stop)})
            except BaseError as error:
                # A range behind the end is an error of no type of its own here, and nothing to read elsewhere.
                if "status code: 416" not in str(error) or start < self.size(path):
                    raise
        self.size(path)
        return b""

    def open(self, path: str) -> IO[bytes]:
        with self._errors(path, "read"):
            meta = obstore.head(self._root, self._key(path))
        condition = self._condition(meta["e_tag"])

        def fetch(start: int, stop: int) -> bytes:
            options: Any = {**condition, "range": (start, stop)}
            with self._errors(path, "read"):
                return self._bytes(path, stop - start, options)

        return cast("IO[bytes]", io.BufferedReader(RemoteFile(fetch, int(meta["size"])), 64 * 1024))

    def _condition(self, tag: str | None) -> dict[str, Any]:
        # A weak tag never matches.
        return {} if tag is None or tag.startswith("W/") else {"if_match": tag}

    def size(self, path: str) -> int:
        with self._errors(path, "read"):
            return int(obstore.head(self._root, self._key(path))["size"])

    def present(self, names: Iterable[str]) -> dict[str, int]:
        wanted = list(names)
        if self.listable and len(wanted) > _FEW_FILES:
            files = self.listing().files
            return {name: files[name] for name in wanted if name in files}

        def size(name: str) -> int | None:
            with suppress(MissingError):
                return self.size(name)
            return None

        sizes = zip(wanted, _in_parallel(size, wanted), strict=True)
        return {name: size for name, size in sizes if size is not None}

    def listing(self) -> Listing:
        if not self.listable:
            raise StoreError(f"{self.name} cannot be listed: web servers do not list their files; name each file")
        with self._errors("", "listed"):
            found = obstore.list_with_delimiter(self._root, self._prefix or None)
        files = {PurePosixPath(entry["path"]).name: int(entry["size"]) for entry in found["objects"]}
        folders = {PurePosixPath(path).name for path in found["common_prefixes"]}
        return Listing(
            files={name: files[name] for name in sorted(files) if not is_foreign(name)},
            folders=tuple(sorted(name for name in folders if not is_foreign(name))),
        )

    def sizes(self, expected: Iterable[str] = ()) -> dict[str, int]:
        if not self.listable:
            return self.present(expected)
        with self._errors("", "listed"):
            entries = (entry for batch in obstore.list(self._root, self._prefix or None) for entry in batch)
            listed = {
                entry["path"].removeprefix(f"{self._prefix}/"): int(entry["size"])
                for entry in bounded_list(entries, self.name)
            }
        return {path: listed[path] for path in sorted(listed) if not any(map(is_foreign, path.split("/")))}

    def write(self, path: str, data: bytes, *, replace: bool = True) -> bool:
        with self._errors(path, "written"), suppress(AlreadyExistsError):
            options: Any = {"max_concurrency": _PARTS_IN_FLIGHT} if replace else {"mode": "create"}
            obstore.put(self._root, self._key(path), data, **options)
            return True
        return False

    def remove(self, path: str) -> None:
        with self._errors(path, "removed"):
            key = self._key(path)
            for batch in obstore.list(self._root, key):
                obstore.delete(self._root, [entry["path"] for entry in batch])
            with suppress(FileNotFoundError):
                obstore.delete(self._root, key)

    def _scratch_name(self, name: str) -> str:
        # The same for every attempt on this machine, so that one can clear up after another that was killed; machines
        # may share their temporary folder.
        digest = hashlib.sha256(f"{platform.node()} {os.getuid()} {self.name}".encode()).hexdigest()[:16]
        return f"milan-pipe-{digest}-{name}"

    def scratch(self, name: str) -> Path:
        try:
            path = LocalFolder(Path(tempfile.gettempdir())).scratch(self._scratch_name(name))
        except StoreError as error:
            raise StoreError(f"{error}; set TMPDIR to a folder with room") from error
        # The temporary folder is everybody's.
        path.chmod(0o700)
        return path

    def publish(self, scratch: Path, path: str) -> None:
        files = {file.relative_to(scratch).as_posix(): file for file in scratch.rglob("*") if file.is_file()}

        def upload(name: str) -> None:
            with self._errors(f"{path}/{name}", "written"):
                obstore.put(self._root, self._key(f"{path}/{name}"), files[name], max_concurrency=_PARTS_IN_FLIGHT)

        _in_parallel(upload, sorted(files))
        for stray in self.child(path).sizes().keys() - files.keys():
            self.remove(f"{path}/{stray}")
        shutil.rmtree(scratch, ignore_errors=True)

    def clear_scratch(self, name: str = "") -> None:
        clear_scratch(Path(tempfile.gettempdir()), re.escape(self._scratch_name(name)) + ("" if name else ".+"))


def bounded_list(entries: Iterable[T], where: str) -> Iterator[T]:
    """The entries of a list that a server gives page by page; StoreError where it does not end."""
    for number, entry in enumerate(entries):
        if number == _MOST_LISTED:
            raise StoreError(f"{where} lists more than {_MOST_LISTED} files; name a folder that holds fewer")
        yield entry


def _connect(scheme: str, bucket: str) -> Any:
    """The store of a bucket or web server."""
    shared: Any = {"client_options": dict(TIMEOUTS), "retry_config": RETRIES}
    if scheme in ("http", "https"):
        shared["client_options"]["allow_http"] = scheme == "http"
        return HTTPStore(f"{scheme}://{bucket}/", **shared)
    if scheme != "s3":
        return (GCSStore if scheme == "gs" else AzureStore)(bucket, **shared)
    endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"))
    # An endpoint without TLS is only ever named on purpose.
    if any(endpoint.startswith("http://") for endpoint in endpoints):
        shared["client_options"]["allow_http"] = True
    return S3Store(bucket, credential_provider=_profile(), **shared)


def _profile() -> Any:
    """Credentials of `AWS_PROFILE` or of the files below `~/.aws`, where nothing nearer is set; None without."""
    nearer = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    profile = os.environ.get("AWS_PROFILE")
    files = [
        Path(os.environ.get(variable) or Path.home() / ".aws" / name)
        for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config"))
    ]
    if any(map(os.environ.get, nearer)) or (profile is None and not any(file.is_file() for file in files)):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except Exception as error:
        if profile is None:
            return None
        reason = f"cannot be used: {without_debug(str(error))}"
        if isinstance(error, ImportError):
            reason = (
                "boto3, which reads profiles, is not installed; install it, or set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        raise SettingError(f"AWS_PROFILE is {profile} and {reason}") from error


def _in_parallel(request: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Requests on threads, their results in order; the first error cancels those that have not begun."""
    pool = ThreadPoolExecutor(max(1, min(len(names), _PARALLEL_REQUESTS)), thread_name_prefix="requests")
    try:
        return list(pool.map(request, names))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class RemoteFile(io.RawIOBase):
    """An object as a raw file of blocks. The next block comes while one is read; the one before stays for steps back.

    By hand: obstore's reader neither reads ahead nor notices that the object was replaced.

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

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"position {position} is before the first byte")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        index, start = divmod(self._position, READ_AHEAD_BYTES)
        data = memoryview(self._block(index))[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, index: int) -> bytes:
        in_order = index == 0 or index - 1 in self._blocks
        self._blocks = {at: block for at, block in self._blocks.items() if abs(at - index) <= 1}
        for at in (index, index + 1) if in_order else (index,):
            start = at * READ_AHEAD_BYTES
            if at not in self._blocks and start < self._size:
                stop = min(start + READ_AHEAD_BYTES, self._size)
                self._blocks[at] = self._ahead.submit(self._fetch, start, stop)
        return self._blocks[index].result()

    def close(self) -> None:
        if not self.closed:
            self._ahead.shutdown(wait=False, cancel_futures=True)
            self._blocks.clear()
        super().close()
