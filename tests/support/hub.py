"""A model hub on loopback: serves folders as repositories by the routes and headers that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class Hub:
    """A running hub.

    Attributes:
        endpoint: its URL, as HF_ENDPOINT takes it.
        folder: ORG/NAME below it are the repositories.
        refuse: by repository, the status and the error code (may be empty) that every request for it gets.
        requests: method and path of all that came in.
    """

    endpoint: str
    folder: Path
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Names of the repositories' files that were asked for, each once, in order."""
        names = [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return list(dict.fromkeys(names))


@contextmanager
def hub_of(folder: Path) -> Iterator[Hub]:
    """Run a hub of the repositories below a folder."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(endpoint=f"http://127.0.0.1:{server.server_address[1]}", folder=folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this hub and no other, with a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        status, code = hub.refuse.get(repository, (0, ""))
        if not status and not (rest and (hub.folder / repository).is_dir()):
            status, code = 404, "RepoNotFound"
        file = hub.folder / repository / rest.partition("/")[2]
        if not status and not file.is_file():
            status, code = 404, "EntryNotFound"
        data = b"" if status else file.read_bytes()
        self.send_response(status or 200)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD = _answer
