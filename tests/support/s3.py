"""A real S3 server on this machine, and a proxy before it that counts, fails and hangs up as a test asks."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_STARTS_WITHIN_S = 60
_ANY_SIGNATURE = "AWS4-HMAC-SHA256 Credential=any/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_HOP_BY_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"))


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def create_bucket(endpoint: str, name: str) -> None:
    """Make an empty bucket on the server at `endpoint`."""
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=10)
    connection.request("PUT", f"/{name}")
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"bucket {name} cannot be made: {response.status} {response.read()[:200]!r}")
    connection.close()


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Run moto's server as a process of its own; yields its URL once it answers.

    Args:
        log: file that takes what the server prints.

    Raises:
        RuntimeError: it ended, or did not answer within a minute.
    """
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    stop = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < stop and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/moto-api/data.json")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request that reached the proxy.

    Attributes:
        method: as GET.
        path: with the query.
        status: what the client was told; 0 where the proxy hung up before that.
        sent: bytes of the body that went to the client.
        at: seconds on the monotonic clock when it came in.
        signed_by: the access key id of its signature; empty where it is not signed.
        fault: what became of it, as of `next_fault`.
    """

    method: str
    path: str
    status: int
    sent: int
    at: float
    signed_by: str
    fault: str


@dataclass
class Proxy:
    """A reverse proxy on loopback. Faults are counted over all requests, so they come at the same places each time.

    Attributes:
        endpoint: its URL.
        target: the server's URL.
        fail_every: every n-th request is answered with `failure` and not passed on; 0: none.
        fail_from: from the n-th request on all are; 0: none.
        failure: status and code of S3.
        drop_every: of every n-th GET half of the body is sent, then the connection is closed; 0: none.
        halve: whether of a GET half of the body is sent, as if it were the whole, by its path and the number of GETs of
            that path so far.
        hide: headers of requests, in lower case, that are not passed on.
        sign: requests without a signature are passed on with one, so that the store looks like an open web server.
        requests: all that came in.
    """

    endpoint: str
    target: str
    fail_every: int = 0
    fail_from: int = 0
    failure: tuple[int, str] = (500, "InternalError")
    drop_every: int = 0
    halve: Callable[[str, int], bool] = lambda *_: False
    hide: frozenset[str] = frozenset()
    sign: bool = False
    requests: list[Request] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _count: int = 0
    gets: Counter[str] = field(default_factory=Counter)

    def next_fault(self, method: str, path: str) -> str:
        """What becomes of the request that has just come in: "", "fail", "drop" or "halve"."""
        with self._lock:
            self._count += 1
            if (self.fail_every and self._count % self.fail_every == 0) or 0 < self.fail_from <= self._count:
                return "fail"
            if method != "GET":
                return ""
            self.gets[path] += 1
            if self.drop_every and self.gets.total() % self.drop_every == 0:
                return "drop"
            return "halve" if self.halve(path, self.gets[path]) else ""

    def bytes_sent(self, name: str = "") -> int:
        """Bytes of bodies that went to clients, of GETs whose path holds `name`."""
        return sum(request.sent for request in self.requests if request.method == "GET" and name in request.path)

    def count(self, method: str, name: str = "") -> int:
        """Number of requests of a method whose path holds `name`."""
        return sum(request.method == method and name in request.path for request in self.requests)


@contextmanager
def proxy_before(target: str) -> Iterator[Proxy]:
    """Run a proxy before the server at `target`."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = Proxy(endpoint=f"http://127.0.0.1:{server.server_address[1]}", target=target)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        server.hang_up()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: Proxy

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connected: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Note who is connected."""
        connection, address = super().get_request()
        self._connected.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection and close it."""
        self._connected.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End kept connections, each of which a thread waits on; a client may keep its end for as long as it lives."""
        for connection in list(self._connected):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _relay(self) -> None:
        at = time.monotonic()
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.next_fault(self.command, self.path)
        if fault == "fail":
            status, code = proxy.failure
            headers, data = [], f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        else:
            status, headers, data = self._ask(proxy, body)
        if fault == "halve":
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            data = data[: len(data) // 2]
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        sent = data[: len(data) // 2] if fault == "drop" else data
        if self.command == "HEAD":
            sent = b""
        signed_by = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        seen = {"method": self.command, "path": self.path, "status": status, "sent": len(sent), "at": at}
        proxy.requests.append(Request(**seen, signed_by=signed_by, fault=fault))
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self.wfile.write(sent)
        if fault == "drop":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

    def _ask(self, proxy: Proxy, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(proxy.target).netloc, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in proxy.hide}
            if proxy.sign:
                headers.setdefault("Authorization", _ANY_SIGNATURE)
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()
