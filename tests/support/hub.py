"""A model hub on loopback, with the routes and headers that huggingface_hub asks for.

Folders are its repositories; what is pushed becomes a new commit, and earlier ones stay. Files that are not text lie on
another host, as on the real hub: a request for one is sent on to it.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support import hub_server


@dataclass(frozen=True)
class Hub:
    """A running hub.

    Attributes:
        endpoint: its URL, as HF_ENDPOINT takes it.
        folder: ORG/NAME below it are repositories of models, datasets/ORG/NAME of data. Not written to.
        objects: folder for what is pushed.
        token: who writes, or reads what is private, must have it.
    """

    endpoint: str
    folder: Path
    objects: Path
    token: str = "hf_of_the_test"

    def _ask(self, name: str, *values: Any) -> Any:
        # Without a proxy, whatever the environment says.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.endpoint}/of-the-test", pickle.dumps((name, values)), timeout=30) as answer:
            return pickle.loads(answer.read())

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and path of all that came in."""
        return self._ask("requests")

    def forget(self) -> None:
        """Forget the requests so far."""
        self._ask("requests", [])

    @property
    def files(self) -> list[str]:
        """Names of the repositories' files that were asked for, each once, in order."""
        asked = [path for method, path in self.requests if method == "GET"]
        names = [path.rpartition("/")[2] for path in asked if "/resolve/" in path or path.startswith("/elsewhere/")]
        return list(dict.fromkeys(names))

    @property
    def leaks(self) -> list[str]:
        """Paths on the other host that were asked for with a token."""
        return self._ask("leaks")

    def behave(self, **how: Any) -> None:
        """Set `private`, `page`, `fail_every`, `silent`, `elsewhere`, `token` or `refuse`: `hub_server.State`."""
        for name, value in how.items():
            self._ask(name, value)

    def commit(self, repository: str, files: Mapping[str, Path], branch: str = "main") -> str:
        """Put a commit with these files on a branch; returns its name."""
        return self._ask("commit", repository, branch, {path: file.absolute() for path, file in files.items()})

    def content(self, repository: str, revision: str = "main") -> dict[str, Path]:
        """Files of a revision by path."""
        return self._ask("content", repository, self._ask("commit_of", repository, revision))

    def private(self) -> set[str]:
        """Repositories that only who has the token can see."""
        return self._ask("private")


@contextmanager
def hub_of(folder: Path) -> Iterator[Hub]:
    """Run a hub of the repositories below a folder."""
    folder = folder.absolute()
    objects = folder.with_name(f"{folder.name}-objects")
    command = [sys.executable, hub_server.__file__, str(folder), str(objects)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Hub(endpoint=process.stdout.readline().strip(), folder=folder, objects=objects)
        finally:
            process.kill()


def use_hub(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this hub and no other, with a cache of its own, here and in processes begun here."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
