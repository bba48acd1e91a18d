"""The hub of `support.hub`, as a process of its own: Rust code holds Python's lock while it waits for an answer."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class State:
    """What the hub has, and how it behaves; see `support.hub.Hub`.

    Attributes:
        refuse: by repository, the status and the error code (may be empty) that every request for it gets.
        token: who writes, or reads what is private, must have it.
        private: repositories that only who has the token can see.
        page: entries in one answer to a request for a list.
        fail_every: every n-th request is answered 503; 0: none.
        silent: routes that are not answered while they are in it.
        elsewhere: what the other host answers: 0 as it should, a status, or 1 where there is no such host.
        requests: method and path of all that came in.
        leaks: paths on the other host that were asked for with a token.
    """

    endpoint: str
    folder: Path
    objects: Path
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    token: str = "hf_of_the_test"
    private: set[str] = field(default_factory=set)
    page: int = 1000
    fail_every: int = 0
    silent: tuple[str, ...] = ()
    elsewhere: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    commits: dict[str, dict[str, dict[str, Path]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def exists(self, repository: str) -> bool:
        return repository in self.commits or (self.folder / repository).is_dir()

    def commit_of(self, repository: str, revision: str) -> str | None:
        refs = self.refs.get(repository, {"main": COMMIT})
        commits = self.commits.get(repository, {COMMIT: {}})
        return refs.get(revision) or (revision if revision in commits or revision == COMMIT else None)

    def content(self, repository: str, commit: str | None = None) -> dict[str, Path]:
        """Files of a commit by path; of the last one by default."""
        commits = self.commits.get(repository, {})
        commit = commit or self.refs.get(repository, {}).get("main", COMMIT)
        if commit in commits:
            return commits[commit]
        root = self.folder / repository
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def commit(self, repository: str, branch: str, files: dict[str, Path]) -> str:
        """Put a commit with these files on a branch."""
        commits = self.commits.setdefault(repository, {})
        name = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[name] = files
        self.refs.setdefault(repository, {})[branch] = name
        return name


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: State


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


_API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_ROUTES = {
    rf"{_API}(?:/revision/(?P<revision>[^/]+))?": "info",
    rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?": "tree",
    rf"{_API}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"{_API}/branch/(?P<revision>[^/]+)": "branch",
    rf"{_API}/commit/(?P<revision>[^/]+)": "commit",
    r"/(?P<kind>dataset)s/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
    r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
    r"/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch": "batch",
    r"/api/repos/create": "create",
    r"/api/validate-yaml": "validate",
    r"/objects/(?P<path>[0-9a-f]{64})": "upload",
    r"/elsewhere/(?P<path>.+)": "elsewhere",
}
_WRITES = ("preupload", "branch", "commit", "batch", "create")


def _is_text(data: bytes) -> bool:
    return b"\0" not in data[:512]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _answer(self) -> None:
        self.hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        if url.path == "/of-the-test":
            self._told()
            return
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(url.path)))
            count = len(self.hub.requests)
        try:
            if self.hub.fail_every and count % self.hub.fail_every == 0:
                raise _RefusedError(503, "", "not now")
            for pattern, name in _ROUTES.items():
                # Still quoted: a path in one segment has its slashes escaped.
                if found := re.fullmatch(pattern, url.path):
                    parts = {key: unquote(value or "") for key, value in found.groupdict().items()}
                    self._route(name, **parts)
                    return
            raise _RefusedError(404, "RepoNotFound")
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._json({"error": refused.message or refused.code}, refused.status, headers)

    def _told(self) -> None:
        """What the test asks for: a method of the state to call, or an attribute to get or to set."""
        name, values = pickle.loads(self.body)
        with self.hub.lock:
            found = getattr(self.hub, name)
            if callable(found):
                found = found(*values)
            elif values:
                setattr(self.hub, name, values[0])
            self._send(200, pickle.dumps(found), {})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json", **(headers or {})})

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _route(self, route: str, **parts: str) -> None:
        prefix = "datasets/" if parts.pop("kind", "") == "dataset" else ""
        repository = prefix + parts.pop("name", "")
        while route in self.hub.silent:
            time.sleep(0.02)
        if repository in self.hub.refuse:
            raise _RefusedError(*self.hub.refuse[repository])
        if repository and route not in _WRITES:
            hidden = repository in self.hub.private and self._token != self.hub.token
            if hidden or not self.hub.exists(repository):
                raise _RefusedError(401 if hidden and not self._token else 404, "RepoNotFound", "Repository not found")
        if route in _WRITES and self._token != self.hub.token:
            raise _RefusedError(403 if self._token else 401, "", "You have no right to write here")
        call: Callable[..., None] = getattr(self, f"_{route}")
        call(*([repository] if repository else []), **parts)

    def _known(self, repository: str, revision: str) -> str:
        if (commit := self.hub.commit_of(repository, revision or "main")) is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # --- reading --------------------------------------------------------------------------------------------------

    def _info(self, repository: str, revision: str) -> None:
        name = repository.removeprefix("datasets/")
        self._json(
            {
                "id": name,
                "sha": self._known(repository, revision),
                "private": repository in self.hub.private,
                "tags": [],
                "siblings": [],
            }
        )

    def _tree(self, repository: str, revision: str, path: str) -> None:
        start = f"{path}/" if path else ""
        files = self.hub.content(repository, self._known(repository, revision))
        below = {name: file for name, file in files.items() if name.startswith(start)}
        if path and not below:
            raise _RefusedError(404, "EntryNotFound", f"{path} does not exist")
        entries = {}
        for name, file in below.items():
            parts = name.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                entries[start + "/".join(parts[:depth])] = None
            entries[name] = file
        if self.query.get("recursive") != ["true"]:
            entries = {name: file for name, file in entries.items() if "/" not in name.removeprefix(start)}
        listed = [
            {"type": "directory", "oid": "0" * 40, "path": name, "size": 0}
            if file is None
            else {"type": "file", "oid": _digest(file), "path": name, "size": file.stat().st_size}
            for name, file in sorted(entries.items())
        ]
        first = int(self.query.get("cursor", ["0"])[0])
        last, headers = first + self.hub.page, {}
        if last < len(listed):
            recursive = self.query.get("recursive", ["false"])[0]
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={last}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._json(listed[first:last], headers=headers)

    def _resolve(self, repository: str, revision: str, path: str) -> None:
        commit = self._known(repository, revision)
        file = self.hub.content(repository, commit).get(path)
        if file is None:
            raise _RefusedError(404, "EntryNotFound", f"{path} does not exist")
        data, digest = file.read_bytes(), _digest(file)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if _is_text(data):
            self._part(data, headers)
            return
        port = 1 if self.hub.elsewhere == 1 else self.server.server_address[1]
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
        where = f"http://localhost:{port}/elsewhere/{repository}/{commit}/{quote(path)}"
        self._send(302, b"", {**headers, "Location": f"{where}?signature=SIGNEDMARK"})

    def _elsewhere(self, path: str) -> None:
        if self._token:
            self.hub.leaks.append(path)
        if self.hub.elsewhere:
            raise _RefusedError(self.hub.elsewhere, "", "SIGNEDMARK")
        repository, commit, inner = re.fullmatch(r"((?:datasets/)?[^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path).groups()  # type: ignore[union-attr]
        self._part(self.hub.content(repository, commit)[inner].read_bytes(), {"ETag": '"another"'})

    def _part(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    # --- writing --------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        repository = f"datasets/{name}" if asked.get("type") == "dataset" else name
        if repository in self.hub.refuse:
            raise _RefusedError(*self.hub.refuse[repository])
        url = f"{self.hub.endpoint}/{repository}"
        if self.hub.exists(repository):
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        self.hub.commit(repository, "main", {})
        if asked.get("visibility") == "private":
            self.hub.private.add(repository)
        self._json({"url": url, "name": name})

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            if not isinstance(yaml.safe_load(found[1]) if found else None, dict):
                raise ValueError("no metadata")
        except (yaml.YAMLError, ValueError) as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def _branch(self, repository: str, revision: str) -> None:
        if revision in self.hub.refs.setdefault(repository, {"main": COMMIT}):
            raise _RefusedError(409, "", "Reference already exists")
        self.hub.refs[repository][revision] = self.hub.refs[repository]["main"]
        self._json({})

    def _preupload(self, repository: str, revision: str) -> None:
        self._known(repository, revision)
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "regular" if _is_text(base64.b64decode(file["sample"])) else "lfs",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def _batch(self, repository: str) -> None:  # noqa: ARG002
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            if (self.hub.objects / one["oid"]).exists()
            else {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _upload(self, path: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != path:
            raise _RefusedError(400, "", "other bytes")
        self._keep(self.body)
        self._send(200, b"", {})

    def _keep(self, data: bytes) -> Path:
        self.hub.objects.mkdir(parents=True, exist_ok=True)
        file = self.hub.objects / hashlib.sha256(data).hexdigest()
        file.write_bytes(data)
        return file

    def _commit(self, repository: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        with self.hub.lock:
            files = dict(self.hub.content(repository, self._known(repository, revision)))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = self._keep(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects / value["oid"]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif line["key"] == "deletedFolder":
                    files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            commit = self.hub.commit(repository, revision, files)
        url = f"{self.hub.endpoint}/{repository}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    server = _Server(("127.0.0.1", 0), _Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub = State(endpoint=address, folder=Path(sys.argv[1]), objects=Path(sys.argv[2]))
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    server.serve_forever()
