"""Files of a repository on a model hub: fetched once, then from the local cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from milan_pipe.config.params import NO_YAML, load_yaml, read_yaml
from milan_pipe.errors import MissingError, SettingError, one_line
from milan_pipe.storage.hub import UNREACHABLE, hub_reason


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from logging what is about to be raised as one clear error."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


def hub_file(repository: str, *names: str) -> Path:
    """The first of these files that a repository has; where the hub is out of reach, the first that the cache has.

    Raises:
        SettingError: no repository can have this name.
        MissingError: the repository is not there, may not be read or has none of the files, or the hub is out of reach
            and no earlier call has fetched one.
    """
    problem: BaseException | None = None
    with quiet():
        for name in names:
            unreachable = None
            try:
                # Asked first: without an answer, huggingface_hub would retry the download for minutes.
                try:
                    get_hf_file_metadata(hf_hub_url(repository, name))
                except errors.HfHubHTTPError:
                    pass
                except UNREACHABLE as error:
                    unreachable = error
                return Path(hf_hub_download(repository, name, local_files_only=unreachable is not None))
            except errors.HFValidationError as error:
                raise SettingError(
                    f"{repository!r} is no name of a repository, expected ORG/NAME: {one_line(error)}"
                ) from error
            except errors.LocalEntryNotFoundError as error:
                problem = unreachable or error.__cause__ or error
            except errors.EntryNotFoundError as error:
                problem = error
            except UNREACHABLE as error:
                problem = error
                break
    assert problem is not None, "no file was named"
    raise MissingError(hub_reason(problem, repository, " or ".join(names))) from problem


def license_of_card(card: Path) -> str | None:
    """The licence that a model card states, as `apache-2.0`; None without a card, or where it states none."""
    try:
        # Not by its `ModelCard`, which reads YAML without a bound.
        found = REGEX_YAML_BLOCK.search(read_yaml(card))
        data = load_yaml(found[2]) if found else None
    except (OSError, *NO_YAML):
        return None
    if not isinstance(data, dict):
        return None
    stated = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return stated if isinstance(stated, str) else None


def license_on_hub(repository: str) -> str | None:
    """The licence that a repository's card states; None where it has no card, or the hub is out of reach."""
    if not repository:
        return None
    try:
        return license_of_card(hub_file(repository, "README.md"))
    except MissingError:
        return None
