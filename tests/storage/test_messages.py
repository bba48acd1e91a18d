"""What an error of a store says: one line with the file, the reason and what to do, in bounded time."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from support.messages import one_line
from support.s3 import Proxy, free_port

from milan_pipe.errors import MilanError, MissingError, SettingError, StoreError
from milan_pipe.storage import Location, location_of, object_store


class Bucket:
    """A bucket behind a proxy, and what may be done to them."""

    def __init__(self, url: str, proxy: Proxy, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.url, self.proxy, self.patch, self.folder = url, proxy, patch, folder
        self.cleanup = ExitStack()

    def nobody_at(self, variable: str) -> None:
        self.patch.setenv(variable, f"http://127.0.0.1:{free_port()}")

    def without_key(self) -> None:
        self.patch.delenv("AWS_ACCESS_KEY_ID")
        self.patch.delenv("AWS_SECRET_ACCESS_KEY")

    def location(self) -> Location:
        return location_of(f"{self.url}/x")

    def web(self) -> Location:
        self.proxy.sign = True
        return location_of(f"{self.proxy.endpoint}/{self.url.removeprefix('s3://')}")


def refused(bucket: Bucket) -> None:
    bucket.nobody_at("AWS_ENDPOINT_URL")
    bucket.location().read("a")


def silent(bucket: Bucket) -> None:
    server = bucket.cleanup.enter_context(socket.socket())
    server.bind(("127.0.0.1", 0))
    server.listen(16)
    bucket.patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    bucket.patch.setitem(object_store.TIMEOUTS, "timeout", timedelta(seconds=1))
    bucket.location().read("a")


def failing(bucket: Bucket) -> None:
    bucket.proxy.fail_every = 1
    bucket.location().write("a", b"1")


def hanging_up(bucket: Bucket) -> None:
    bucket.location().write("a", os.urandom(200_000))
    bucket.proxy.drop_every = 1
    bucket.location().read("a")


def without_credentials(bucket: Bucket) -> None:
    bucket.without_key()
    bucket.nobody_at("AWS_METADATA_ENDPOINT")
    bucket.location().read("a")


def forbidden(bucket: Bucket) -> None:
    bucket.location().write("a", b"1")
    bucket.without_key()
    bucket.patch.setenv("AWS_SKIP_SIGNATURE", "true")
    bucket.location().read("a")


def unknown_profile(bucket: Bucket) -> None:
    bucket.without_key()
    bucket.patch.setenv("AWS_PROFILE", "third")
    bucket.location()


def profile_without_boto3(bucket: Bucket) -> None:
    bucket.patch.setitem(sys.modules, "obstore.auth.boto3", None)
    unknown_profile(bucket)


def replaced(bucket: Bucket) -> None:
    bucket.patch.setattr(object_store, "READ_AHEAD_BYTES", 1000)
    bucket.location().write("a", b"1" * 10_000)
    with bucket.location().open("a") as file:
        file.read(10)
        bucket.location().write("a", b"2" * 10_000)
        file.seek(9000)
        file.read(10)


def without_ranges(bucket: Bucket) -> None:
    location_of(bucket.url).write("a", b"123")
    bucket.proxy.hide = frozenset(("range",))
    with bucket.web().open("a") as file:
        file.read()


def no_account(bucket: Bucket) -> None:
    bucket.patch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    location_of("az://container/a")


def pipe(bucket: Bucket) -> None:
    os.mkfifo(bucket.folder / "a")
    location_of(bucket.folder).read("a")


def below_a_file(bucket: Bucket) -> None:
    (bucket.folder / "file").touch()
    location_of(bucket.folder / "file" / "store").write("a", b"1")


NO_BUCKET = "s3://no-such-bucket/a"
READ = "{url}/x/a cannot be read"
TRIED = r"\(tried ([2-9]|\d\d) times in (\d+ s|less than a second)\)"
CASES: dict[str, tuple[Callable[[Bucket], object], type[MilanError], str]] = {
    "missing": (lambda b: b.location().read("gone/a"), MissingError, "{url}/x/gone/a is not there"),
    "missing here": (lambda b: location_of(b.folder).read("a"), MissingError, "{folder}/a is not there"),
    **{
        f"no bucket, {name}": (
            lambda _, attempt=attempt: attempt(location_of(NO_BUCKET)),
            StoreError,
            rf"{NO_BUCKET}\S* cannot be \w+: there is no bucket no-such-bucket; make it, or correct its name",
        )
        for name, attempt in {
            "read": lambda location: location.read("b"),
            "write": lambda location: location.write("b", b"1"),
            "sizes": lambda location: location.sizes(),
            "listing": lambda location: location.listing(),
        }.items()
    },
    "refused": (refused, StoreError, rf"{READ}: no answer from http://\S+: Connection refused.* {TRIED}"),
    "silent": (silent, StoreError, rf"{READ}: no answer from http://\S+: time is over"),
    "hanging up": (hanging_up, StoreError, f"{READ}: .+"),
    "failing": (
        failing,
        StoreError,
        rf"{{url}}/x/a cannot be written: {{endpoint}} answered 500 Internal Server Error, InternalError: not now "
        rf"{TRIED}",
    ),
    "no credentials": (
        without_credentials,
        StoreError,
        READ + ": no credentials were found; set AWS_ACCESS_KEY_ID and .*AWS_SKIP_SIGNATURE=true .*",
    ),
    "forbidden": (forbidden, StoreError, "{url}/x/a .* answered 403 Forbidden; check the credentials, and what .*"),
    "unknown profile": (unknown_profile, SettingError, "AWS_PROFILE is third and cannot be used: .*third.*"),
    "no boto3": (profile_without_boto3, SettingError, "AWS_PROFILE is third and boto3, .* is not installed; .*"),
    "replaced": (replaced, StoreError, READ + ": it was replaced meanwhile; run again"),
    "no ranges": (without_ranges, StoreError, ".*/a cannot be read: its server does not send parts of files; copy .*"),
    "no listing": (lambda b: b.web().listing(), StoreError, ".* cannot be listed: web servers do not .*name each file"),
    "no account": (no_account, SettingError, "az://container/a cannot be opened: .*; set AZURE_STORAGE_ACCOUNT_NAME"),
    "other scheme": (
        lambda _: location_of("ftp://a/b"),
        SettingError,
        "ftp://a/b cannot .* with a bucket or host",
    ),
    "pipe": (pipe, StoreError, "{folder}/a cannot be read: not a regular file"),
    "below a file": (
        below_a_file,
        StoreError,
        "{folder}/file/store/a .*: (Not a directory|File exists)",
    ),
}


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("case", CASES)
def test_messages(
    case: str, proxied_bucket: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    provoke, kind, expected = CASES[case]
    bucket = Bucket(proxied_bucket, s3_proxy, monkeypatch, tmp_path)
    begin = time.monotonic()
    with bucket.cleanup, pytest.raises(kind) as caught:
        provoke(bucket)
    assert caught.type is kind
    assert time.monotonic() - begin < 20
    values = {"url": bucket.url, "endpoint": s3_proxy.endpoint, "folder": str(tmp_path)}
    for name, value in values.items():
        expected = expected.replace(f"{{{name}}}", re.escape(value))
    assert re.fullmatch(expected, one_line(caught)), one_line(caught)
