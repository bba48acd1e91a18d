"""Servers that fail, hang up, refuse or are not there: ridden out, or one clear line in bounded time."""

from __future__ import annotations

import io
import os
import select
import signal
import threading
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from support.counts import Counted
from support.s3 import Proxy
from support.targets import header, write_store
from support.training import same_run, small_params
from support.web import web_server

from milan_pipe.config.params import Params
from milan_pipe.errors import MilanError, MissingError, StoreError
from milan_pipe.pretraining.run import pretrain
from milan_pipe.storage import location_of, object_store


def small_store(where: str, store_format: str) -> tuple[str, Params]:
    head = header(format=store_format, zstd_level=0, shards=2)
    write_store(where, head, [30, 20])
    return where, small_params(head, epochs=2, batch_size=10, log_every=1, checkpoint_every=3)


def test_patience_is_bounded_and_pauses_grow() -> None:
    assert object_store.RETRIES["retry_timeout"] == timedelta(seconds=20)
    assert object_store.TIMEOUTS["connect_timeout"] <= timedelta(seconds=10)
    # A pause is drawn from the first one up to `base` times the last; its logarithm grows by ln(base) - 1 on average.
    assert object_store.RETRIES["backoff"]["base"] > 3


@pytest.mark.parametrize("failure", [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests")])
def test_every_third_request_fails_and_all_goes_on(
    flaky_bucket: str, s3_proxy: Proxy, failure: tuple[int, str]
) -> None:
    s3_proxy.failure = failure
    location = location_of(flaky_bucket)
    data = os.urandom(6_000_000)
    for number in range(4):
        location.write(f"a/{number}", data)
        assert location.read(f"a/{number}") == data
    assert not location.write("a/0", b"", replace=False)
    assert location.child("a").sizes() == {str(number): len(data) for number in range(4)}
    scratch = location.scratch("shard")
    for number in range(6):
        (scratch / str(number)).write_bytes(bytes([number]))
    location.publish(scratch, "shard")
    with location.open("a/1") as file:
        assert file.read() == data
    assert {name: location.read(f"shard/{name}") for name in location.child("shard").sizes()} == {
        str(n): bytes([n]) for n in range(6)
    }
    location.remove("a")
    assert list(location.sizes()) == [f"shard/{n}" for n in range(6)]
    assert sum(request.status == failure[0] for request in s3_proxy.requests) > 10


@pytest.mark.timeout(60)
def test_an_answer_that_never_ends_is_broken_off() -> None:
    sent = [0]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("range", "bytes=0-9").removeprefix("bytes=")
        handler.send_response(206 if "range" in handler.headers else 200)
        handler.send_header("content-range", f"bytes {wanted}/10")
        handler.send_header("content-length", "10" if handler.command == "HEAD" else str(2**50))
        handler.end_headers()
        with suppress(OSError):
            while handler.command == "GET":
                sent[0] += handler.wfile.write(bytes(2**20))

    with web_server() as web:
        web.answers["/a/b"] = answer
        folder = location_of(f"{web.url}/a")
        with pytest.raises(StoreError, match=r"a/b has [0-9]+ bytes or more, expected at most 3; copy it again"):
            folder.read_range("b", 2, 5)
        with (
            pytest.raises(StoreError, match=r"a/b has [0-9]+ bytes or more, expected at most 10; copy it again"),
            folder.open("b") as file,
        ):
            file.read()
        with pytest.raises(StoreError, match=f"a/b has {2**50} bytes or more, expected at most {2**31}"):
            folder.read("b")
    assert sent[0] < 2**27


def test_dropped_connections_are_taken_up_where_they_broke(proxied_bucket: str, s3_proxy: Proxy) -> None:
    location = location_of(proxied_bucket)
    data = os.urandom(20_000_000)
    location.write("a", data)
    s3_proxy.drop_every = 2
    with location.open("a") as file:
        assert file.read() == data
    assert location.read("a") == data
    assert location.read_range("a", 5, 9_000_000) == data[5:9_000_000]
    assert s3_proxy.bytes_sent("/a") < 3.1 * len(data)


@pytest.mark.slow
@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_half_of_the_bytes_is_found_and_never_learned_from(
    proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path, store_format: str, counted: Counted
) -> None:
    """As a proxy gives them that was cut off itself: with the length of what it has. One answer of each run."""
    store, params = small_store(f"{proxied_bucket}/t", store_format)
    before = s3_proxy.gets.copy()
    pretrain(store, tmp_path / "whole", params)
    # In no order: several are under way at once.
    of_a_run = sorted((s3_proxy.gets - before).elements())
    for number, path in enumerate(of_a_run):
        run, message = tmp_path / str(number), ""
        chosen = path, s3_proxy.gets[path] + 1 + of_a_run[:number].count(path)
        s3_proxy.halve = lambda *asked, chosen=chosen: asked == chosen
        try:
            pretrain(store, run, params)
        except MilanError as error:
            message = str(error)
        (status,) = [request.status for request in s3_proxy.requests if request.fault == "halve"][number:]
        # What is not there has no bytes to lose.
        assert bool(message) == (status != 404)
        assert "\n" not in message
        pretrain(store, run, params)
        assert same_run(run, tmp_path / "whole")
    halved = [request.path for request in s3_proxy.requests if request.fault == "halve"]
    assert halved == of_a_run
    assert sum("/shards/00" in path for path in halved) > 3
    counted(
        f"half of the bytes of an answer of a bucket, {store_format}", len(of_a_run), "one line; nothing learned of it"
    )


@pytest.mark.slow
def test_credentials_that_expire_in_mid_run_are_told_and_the_run_goes_on(
    proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path
) -> None:
    store, params = small_store(f"{proxied_bucket}/t", "webdataset")
    before = len(s3_proxy.requests)
    pretrain(store, tmp_path / "whole", params)
    s3_proxy.failure = (400, "ExpiredToken")
    s3_proxy.fail_from = len(s3_proxy.requests) + (len(s3_proxy.requests) - before) // 2
    with pytest.raises(StoreError, match=r"ExpiredToken.*renew") as caught:
        pretrain(store, tmp_path / "run", params)
    assert "\n" not in str(caught.value)
    s3_proxy.fail_from = 0
    pretrain(store, tmp_path / "run", params)
    assert same_run(tmp_path / "run", tmp_path / "whole")


def test_public_buckets_are_read_unsigned(
    proxied_bucket: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    location_of(proxied_bucket).write("a", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(StoreError, match="credentials"):
        location_of(proxied_bucket).read("a")
    s3_proxy.sign = True
    assert location_of(proxied_bucket).read("a") == b"1"
    assert [request.signed_by for request in s3_proxy.requests] == ["test-key", "", ""]


def test_profiles_of_the_aws_tools(
    proxied_bucket: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = key-of-default\naws_secret_access_key = x\n"
        "[other]\naws_access_key_id = key-of-other\naws_secret_access_key = x\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    location_of(proxied_bucket).write("a", b"1")
    monkeypatch.setenv("AWS_PROFILE", "other")
    location_of(proxied_bucket).child("b").write("a", b"1")
    assert [request.signed_by for request in s3_proxy.requests] == ["key-of-default", "key-of-other"]


def test_reading_ahead_fetches_each_byte_once(
    proxied_bucket: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "READ_AHEAD_BYTES", 300_000)
    data = os.urandom(2_000_000)
    location = location_of(proxied_bucket)
    location.write("a", data)
    with location.open("a") as file:
        for position in range(0, len(data), 1000):
            # As tar readers do: one byte back, and on.
            file.seek(max(0, position - 1))
            file.read(1)
            file.seek(position)
            assert file.read(1000) == data[position : position + 1000]
    assert s3_proxy.bytes_sent("/a") == len(data)
    assert s3_proxy.count("GET", "/a") == 7


def test_the_next_block_comes_while_one_is_used() -> None:
    asked: list[tuple[int, int]] = []
    second = threading.Event()

    def fetch(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        if start:
            second.set()
        return bytes(stop - start)

    size = object_store.READ_AHEAD_BYTES + 10
    with io.BufferedReader(object_store.RemoteFile(fetch, size)) as file:
        assert file.read(1) == b"\0"
        assert second.wait(10)
        assert len(file.read()) == size - 1
    assert asked == [(0, size - 10), (size - 10, size)]


def test_a_forked_process_is_told_and_does_not_hang(bucket: str) -> None:
    location = location_of(bucket)
    location.write("a", b"1")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            location.read("a")
        except BaseException as error:
            os.write(write_end, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write_end)
    ready, _, _ = select.select([read_end], [], [], 20)
    text = os.read(read_end, 1000).decode() if ready else ""
    os.close(read_end)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert text.startswith("StoreError")
    assert "start worker processes by spawn" in text
    assert location.read("a") == b"1"


# --- web servers


@pytest.fixture
def web(bucket: str, s3_proxy: Proxy) -> str:
    """URL of the bucket as any web server would show it."""
    s3_proxy.sign = True
    return f"{s3_proxy.endpoint}/{bucket.removeprefix('s3://')}"


def test_a_web_server_is_read(bucket: str, web: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(9_000_000)
    location_of(bucket).write("a b/ü.bin", data)
    location_of(bucket).write("a b/c/d", b"22")
    location = location_of(f"{web}/a%20b")
    assert not location.listable
    assert location.read("%C3%BC.bin") == location.read("ü.bin") == data
    assert location.read_range("ü.bin", 5, 9) == data[5:9]
    with location.open("ü.bin") as file:
        assert file.read() == data
    assert location.child("c").size("d") == 2
    with pytest.raises(MissingError, match="gone"):
        location.read("gone")
    monkeypatch.setattr(object_store, "MOST_READ_WHOLE", 1)
    with pytest.raises(StoreError, match="d has 2 bytes or more, expected at most 1"):
        location.read("c/d")
    assert location.sizes(["c/d", "gone"]) == {"c/d": 2}
    assert location.child("c").sizes(["d"]) == {"d": 2}
    assert location.present([*map(str, range(100)), "ü.bin"]) == {"ü.bin": len(data)}
    with pytest.raises(StoreError, match="listed"):
        location.listing()
    assert {request.method for request in s3_proxy.requests} == {"GET", "HEAD"}
