"""Files of a repository on a model hub: fetched once, then from the local cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransferError  # type: ignore[attr-defined]

from milan_pipe.errors import MissingError, SettingError, one_line


@contextmanager
def quiet(*names: str | None) -> Iterator[None]:
    """Keep libraries from logging what is about to be raised as one clear error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def hub_file(repository: str, *names: str) -> Path:
    """The first of these files that a repository has; where the hub is out of reach, the first that the cache has.

    Raises:
        SettingError: no repository can have this name.
        MissingError: the repository is not there, may not be read or has none of the files, or the hub is out of reach
            and no earlier call has fetched one.
    """
    problem: BaseException | None = None
    with quiet("huggingface_hub", "huggingface_hub.utils._http"):
        for name in names:
            try:
                silent = _silence(repository, name)
                return Path(hf_hub_download(repository, name, local_files_only=silent is not None))
            except HFValidationError as error:
                raise SettingError(
                    f"{repository!r} is no name of a repository, expected ORG/NAME: {one_line(error)}"
                ) from error
            except LocalEntryNotFoundError as error:
                problem = silent or error.__cause__ or error
            except EntryNotFoundError as error:
                problem = error
            except (TransferError, OSError) as error:
                problem = error
                break
    assert problem is not None, "no file was named"
    raise MissingError(_described(problem, repository, names)) from problem


def _silence(repository: str, name: str) -> Exception | None:
    """Why the hub gives no answer at all; None where it gives one: huggingface_hub itself would retry for minutes."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, name))
    except HfHubHTTPError:
        return None
    except (TransferError, OSError) as error:
        return error
    return None


def _described(problem: BaseException, repository: str, names: tuple[str, ...]) -> str:
    hub = constants.ENDPOINT
    files = " or ".join(names)
    access = "log in with `hf auth login`, or set HF_TOKEN"
    status = problem.response.status_code if isinstance(problem, HfHubHTTPError) else None
    if isinstance(problem, GatedRepoError):
        return f"repository {repository} is gated: accept its terms at {hub}/{repository} and {access}"
    if isinstance(problem, EntryNotFoundError) and not isinstance(problem, LocalEntryNotFoundError):
        return f"repository {repository} on {hub} has no {files}"
    if isinstance(problem, RepositoryNotFoundError):
        return f"{hub} has no repository {repository}, or keeps it private: check the name, or {access}"
    if status in (401, 403):
        return f"{hub} refuses access to repository {repository} ({status}): {access}"
    if status == 404:
        return f"{hub} has no {files} of a repository {repository}"
    return f"{files} of repository {repository} cannot be fetched from {hub}: {one_line(problem)}"
