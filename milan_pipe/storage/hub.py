"""Folders of a dataset repository on a model hub, for reading: `hf://datasets/ORG/NAME[@REVISION]/PATH`.

huggingface_hub says which commit a revision is, what is in it, and who is logged in; the bytes come as from any web
server, by obstore. The commit is asked for once, so that what is read cannot change meanwhile.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.hf_api import RepoFile
from obstore.store import HTTPStore

from milan_pipe.background import Background
from milan_pipe.errors import SettingError, StoreError, one_line
from milan_pipe.storage.location import Listing, Location, is_foreign, require_writable, split_root
from milan_pipe.storage.object_store import RETRIES, TIMEOUTS, RemoteFolder, bounded_list

UNREACHABLE: tuple[type[Exception], ...] = (errors.HTTPError, OSError)  # type: ignore[attr-defined]
"""What huggingface_hub raises where there is no answer, or one that refuses."""


def hub_reason(problem: BaseException, repository: str, files: str) -> str:
    """What a person can do about an error of huggingface_hub.

    Args:
        repository: as in the hub's URL of it: `ORG/NAME`, `datasets/ORG/NAME`.
        files: what was asked for.
    """
    hub, access = constants.ENDPOINT, "log in with `hf auth login`, or set HF_TOKEN"
    status = problem.response.status_code if isinstance(problem, errors.HfHubHTTPError) else None
    missing = isinstance(problem, (errors.EntryNotFoundError, errors.RevisionNotFoundError))
    if isinstance(problem, errors.GatedRepoError):
        return f"repository {repository} is gated: accept its terms at {hub}/{repository} and {access}"
    if missing and not isinstance(problem, errors.LocalEntryNotFoundError):
        return f"repository {repository} on {hub} has no {files}"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"{hub} has no repository {repository}, or keeps it private: check the name, or {access}"
    if status in (401, 403):
        return f"{hub} refuses access to repository {repository} ({status}): {access}"
    if status == 404:
        return f"{hub} has no {files} of a repository {repository}"
    return f"{files} of repository {repository} cannot be fetched from {hub}: {one_line(problem)}"


_SECONDS = 30.0
_PAGE = 1000


class _Repository:
    """A dataset repository at one commit: that which the revision names when it is first asked for."""

    def __init__(self, name: str, revision: str, commit: str | None) -> None:
        self.name, self._revision, self.commit = name, revision, commit
        self._api = HfApi()
        self._files: Any = None
        self._asking = threading.Lock()

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except errors.HFValidationError as error:
            raise SettingError(f"{self.name!r} is no name of a repository: {one_line(error)}") from error
        except UNREACHABLE as error:
            raise StoreError(hub_reason(error, f"datasets/{self.name}", what)) from error
        # huggingface_hub takes an answer apart as if it always were what it should be.
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(
                f"{constants.ENDPOINT} answers for the {what} of repository datasets/{self.name} with what is no such "
                f"thing ({type(error).__name__}: {one_line(error)}); try again, or update huggingface_hub"
            ) from error

    def _pinned(self) -> str:
        with self._asking, self._errors(f"revision {self._revision}"):
            if self.commit is None:
                found = self._api.dataset_info(self.name, revision=self._revision, expand=["sha"], timeout=_SECONDS)
                # It becomes a part of URLs.
                if not re.fullmatch("[0-9a-f]{40,64}", str(found.sha)):
                    raise ValueError(f"commit {found.sha!r}")
                self.commit = str(found.sha)
            return self.commit

    @property
    def files(self) -> Any:
        """The obstore store of the commit's files."""
        commit = self._pinned()
        with self._asking:
            if self._files is None:
                endpoint = self._api.endpoint
                token = get_token()
                login = {"authorization": f"Bearer {token}"} if token else {}
                options: Any = {**TIMEOUTS, "default_headers": login, "allow_http": endpoint.startswith("http://")}
                url = f"{endpoint}/datasets/{self.name}/resolve/{commit}"
                self._files = HTTPStore(url, client_options=options, retry_config=RETRIES)
            return self._files

    def tree(self, path: str, *, recursive: bool) -> list[tuple[str, int | None]]:
        """What is in a folder: paths in the repository, with the bytes of files and None for folders."""
        commit = self._pinned()
        with self._errors("files"):
            try:
                found = self._api.list_repo_tree(
                    self.name, path or None, recursive=recursive, revision=commit, repo_type="dataset"
                )
                # The library waits for ever for each page of a list.
                entries = Background(map(_of_tree, found), ahead=_PAGE, name="hub", seconds=_SECONDS)
                return list(bounded_list(entries, f"datasets/{self.name}"))
            except errors.EntryNotFoundError:
                return []


def _of_tree(entry: Any) -> tuple[str, int | None]:
    """Path and size of what is in a tree; TypeError or ValueError where it has none."""
    path, size = entry.path, entry.size if isinstance(entry, RepoFile) else None
    if not isinstance(path, str) or type(size) not in (int, type(None)):
        raise TypeError(f"path {path!r}, size {size!r}")
    if {"", ".", ".."} & {*path.split("/")}:
        raise ValueError(f"path {path!r}")
    return path, size


class HubFolder(RemoteFolder):
    """A folder in a dataset repository.

    Args:
        url: without a token, which comes from HF_TOKEN or from a login.
        repository: that of the folder that this one is in.
        commit: what the URL's revision was when it was first asked for.
    """

    writable = False

    def __init__(self, url: str, repository: _Repository | None = None, commit: str | None = None) -> None:
        Location.__init__(self, url.rstrip("/"))
        self._scheme = "hf"
        root, self._prefix = split_root(self.address)
        kind, _, name = root.partition("://")[2].partition("/")
        if "@" in kind:
            raise SettingError(
                f"{url} cannot be opened with a token in it; log in with `hf auth login`, or set HF_TOKEN"
            )
        if kind != "datasets" or "/" not in name:
            raise SettingError(f"{url} cannot be opened; expected hf://datasets/ORG/NAME, or .../NAME@REVISION")
        name, _, revision = name.partition("@")
        self._repository = repository or _Repository(name, unquote(revision) or constants.DEFAULT_REVISION, commit)

    def __reduce__(self) -> tuple[Any, ...]:
        return HubFolder, (self.address, None, self._repository.commit)

    @property
    def _root(self) -> Any:
        return self._repository.files

    @contextmanager
    def _errors(self, path: str, doing: str) -> Iterator[None]:
        if doing in ("written", "removed"):
            require_writable(self)
        with super()._errors(path, doing):
            yield

    def child(self, path: str) -> Location:
        return HubFolder(f"{self.address}/{path}", self._repository)

    def _condition(self, tag: str | None) -> dict[str, Any]:  # noqa: ARG002
        # A commit does not change, and the tag is not the hub's but that of the server which it leads to.
        return {}

    def _found(self, *, recursive: bool) -> dict[str, int | None]:
        with self._errors("", "listed"):
            start = f"{self._prefix}/" if self._prefix else ""
            found = self._repository.tree(self._prefix, recursive=recursive)
            paths = {path.removeprefix(start): size for path, size in sorted(dict(found).items())}
            return {path: size for path, size in paths.items() if not any(map(is_foreign, path.split("/")))}

    def listing(self) -> Listing:
        found = self._found(recursive=False)
        return Listing(
            files={name: size for name, size in found.items() if size is not None},
            folders=tuple(name for name, size in found.items() if size is None),
        )

    def sizes(self, expected: Iterable[str] = ()) -> dict[str, int]:  # noqa: ARG002
        return {path: size for path, size in self._found(recursive=True).items() if size is not None}
