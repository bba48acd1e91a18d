"""A web server on loopback, over real HTTP: what it answers to each path, and what it was asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A server whose answers are set by path.

    Attributes:
        url: of its root, without a slash at the end.
        answers: by path without its query; other paths are 404.
        requests: path and headers of all that came in.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []

    def serve(self, path: str, data: bytes) -> str:
        """Answer with these bytes, or a range of them; returns the URL."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("range", ""))
            if wanted is None:
                return send(handler, 200, data)
            part = data[int(wanted[1]) : int(wanted[2]) + 1]
            where = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
            return send(handler, 206, part, **{"content-range": where})

        self.answers[path] = answer
        return self.url + path


def send(handler: BaseHTTPRequestHandler, status: int, data: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"content-length": str(len(data)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(data)


@contextmanager
def web_server() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.requests.append((self.path, dict(self.headers)))
            web.answers.get(self.path.partition("?")[0], lambda handler: send(handler, 404))(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web = Web(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
