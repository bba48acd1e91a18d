"""A student or a target store as a repository on a model hub."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from milan_pipe.errors import DataError, MilanError, MissingError, SettingError, StoreError, one_line
from milan_pipe.interop.card import CARD, REPOSITORY, dataset_card
from milan_pipe.interop.timm_layout import STUDENT_FILES, export_student, require_exported
from milan_pipe.storage import SCRATCH, is_url, location_of
from milan_pipe.storage.hub import UNREACHABLE
from milan_pipe.storage.kinds import CHECKPOINT, EXPORTED, RUN, TARGETS, mistaken
from milan_pipe.storage.local import lies_in, real_path
from milan_pipe.targets import manifest
from milan_pipe.targets.schema import SHARDS
from milan_pipe.targets.store import HEADER_FILES, open_targets, read_header
from milan_pipe.weights_file import load_tensors

Kind = Literal["model", "dataset"]
_FAILED: tuple[type[Exception], ...] = (*UNREACHABLE, ValueError, RuntimeError)
_NAMES = tuple("[0-9]" * digits for digits in range(6, 10))
# All of a store but its manifest, which goes last; an earlier one in the repository may have had other files.
_OF_A_STORE = (
    *HEADER_FILES,
    manifest.BAD_SAMPLES,
    *(f"{manifest.FOLDER}/{name}.json" for name in _NAMES),
    *(f"{SHARDS}/{name}/*" for name in _NAMES),
    *(f"{name}/*" for name in _NAMES),  # of schema 2
)


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What was pushed, or would be.

    Attributes:
        url: of the repository's page.
        files: bytes by path.
        card: the README.md.
        commit: its last commit; None where nothing was pushed.
    """

    kind: Kind
    url: str
    files: dict[str, int]
    card: str
    commit: str | None


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """Where to push to."""

    name: str
    kind: Kind
    revision: str | None
    private: bool

    @contextmanager
    def _talking(self) -> Iterator[None]:
        # In a log, a bar for each file is noise.
        shown = sys.stderr.isatty() or are_progress_bars_disabled()
        try:
            if not shown:
                disable_progress_bars()
            yield
        except MilanError:
            raise
        except errors.HFValidationError as error:
            raise SettingError(f"{self.name!r} is no name of a repository: {one_line(error)}") from error
        except _FAILED as error:
            raise StoreError(f"{self.name} cannot be pushed: {self._reason(error)}") from error
        finally:
            if not shown:
                enable_progress_bars()

    def _reason(self, error: BaseException) -> str:
        # What one of several uploads was told is the cause of an error.
        told = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        status = told.response.status_code if isinstance(told, errors.HfHubHTTPError) else None
        hub, organization = constants.ENDPOINT, self.name.partition("/")[0]
        if status in (401, 403):
            return (
                f"{hub} does not let this token write to {organization} ({status}); use one that may, or another name"
            )
        answer = f"{hub} answered {status}" if status else f"no good answer from {hub}"
        return f"{answer}: {one_line(told)}"

    def upload(self, last: Mapping[str, Path | bytes], folder: Path | None = None) -> str:
        """Upload what is of a store in a folder, and after it some files, in one commit; returns its name."""
        where: Any = {"repo_id": self.name, "repo_type": self.kind}
        with self._talking():
            api = HfApi()
            api.create_repo(**where, private=self.private or None, exist_ok=True)
            if self.private and not api.repo_info(**where).private:
                raise StoreError(f"{self.name} is there and is public; name another repository, or leave --private out")
            if self.revision is not None:
                api.create_branch(**where, branch=self.revision, exist_ok=True)
            where |= {"revision": self.revision, "commit_message": "Push with milan-pipe"}
            if folder is not None:
                patterns: Any = {"allow_patterns": list(_OF_A_STORE), "ignore_patterns": [f"*{SCRATCH}*"]}
                api.upload_folder(**where, **patterns, folder_path=folder, delete_patterns=list(_OF_A_STORE))
            files = [
                CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in last.items()
            ]
            return str(api.create_commit(**where, operations=files).oid)


def push(
    source: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    scores: Sequence[str | Path] = (),
    dry_run: bool = False,
) -> PushReport:
    """Upload a student as a repository of a model, in timm's layout, or a store as one of data; with a card.

    Args:
        source: run, checkpoint, folder that `export` wrote, or target store; on this machine.
        repository: ORG/NAME; made where it is not there, else what it holds of the same names is replaced.
        private: make it so that only its owners see it.
        revision: branch; made where it is not there.
        license: of what is pushed, by the hub's name, as `apache-2.0`.
        scores: runs that began with this student, whose scores the card names too.
        dry_run: say what would be pushed, and ask no network.

    Raises:
        SettingError: SOURCE is a URL, or REPOSITORY no name of a repository.
        MissingError: SOURCE is not there, or there is no token.
        DataError, MismatchError: SOURCE is none of these, is damaged, or is a store that is not complete.
        StoreError: the hub is out of reach or refuses, or there is no room to export a student.
    """
    if is_url(source):
        raise SettingError(
            f"{source} is a URL, and what is pushed is read from this machine; copy it to a folder first"
        )
    folder = Path(source)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise SettingError(f"{repository!r} is no name of a repository; expected ORG/NAME")
    if not folder.is_dir():
        raise MissingError(
            f"{folder} is not there; expected a run, a checkpoint, an exported student or a target store"
        )
    exported = all((folder / name).is_file() for name in STUDENT_FILES)
    if not exported and (other := mistaken(folder, RUN, CHECKPOINT, EXPORTED, TARGETS)):
        raise DataError(other)
    if not dry_run and get_token() is None:
        raise MissingError("there is no token to push with; log in with `hf auth login`, or set HF_TOKEN")
    kind: Kind = "model" if exported or read_header(location_of(folder)) is None else "dataset"
    target = _Repository(name=repository, kind=kind, revision=revision, private=private)
    if kind == "dataset":
        if scores:
            raise SettingError(f"{folder} is a target store, which has no scores; leave --scores out")
        return _push_store(folder, target, license, dry_run)
    if exported:
        if license or scores:
            raise SettingError(f"{folder} has its card already: edit its {CARD}, and leave --license and --scores out")
        return _push_student(folder, target, dry_run)
    _require_inside(folder, folder.rglob("*"))
    with tempfile.TemporaryDirectory(prefix="milan-pipe-push-") as scratch:
        export_student(folder, Path(scratch, "student"), license=license, scores=scores)
        return _push_student(Path(scratch, "student"), target, dry_run)


def _named(card: str, repository: str) -> str:
    title = REPOSITORY.partition("/")[2]
    return card.replace(f"# {title}\n", f"# {repository.partition('/')[2]}\n", 1).replace(REPOSITORY, repository)


def _require_inside(folder: Path, files: Iterable[Path]) -> None:
    """What somebody else made may hold links to files of this machine, which would be published."""
    for file in files:
        if file.is_symlink() and not lies_in(folder, file):
            leads_to = real_path(file)
            raise DataError(f"{file} is a link to {leads_to}, out of its folder; put a copy in its place to push it")


def _push_student(folder: Path, target: _Repository, dry_run: bool) -> PushReport:
    _require_inside(folder, (folder / name for name in (CARD, *STUDENT_FILES)))
    if not (folder / CARD).is_file():
        raise DataError(f"{folder} has no {CARD}, which `milan-pipe export` writes; export it again")
    try:
        card = _named((folder / CARD).read_text(encoding="utf-8"), target.name)
    except ValueError as error:
        raise DataError(f"{folder}/{CARD} is no UTF-8 ({error}); write it as such, or export again") from error
    require_exported(folder, load_tensors(folder / STUDENT_FILES[1]))
    files: dict[str, Path | bytes] = {CARD: card.encode(), **{name: folder / name for name in STUDENT_FILES}}
    return PushReport(
        kind=target.kind,
        url=f"{constants.ENDPOINT}/{target.name}",
        files={CARD: len(card.encode()), **{name: (folder / name).stat().st_size for name in STUDENT_FILES}},
        card=card,
        commit=None if dry_run else target.upload(files),
    )


def _push_store(folder: Path, target: _Repository, license: str | None, dry_run: bool) -> PushReport:
    location = location_of(folder)
    store = open_targets(folder)
    done, count = len(store.shards), store.header.source.shards
    if manifest.read_manifest(location) is None or done != count:
        raise DataError(
            f"{folder} is not complete, {done} of its {count} shards are there; finish it with "
            f"`{manifest.extract_command(location)}`"
        )
    _require_inside(folder, folder.rglob("*"))
    store.committed(sizes=True)
    card = _named(dataset_card(store, license), target.name)
    sizes = {path: size for path, size in location.sizes().items() if any(fnmatch(path, one) for one in _OF_A_STORE)}
    last: dict[str, Path | bytes] = {manifest.MANIFEST: folder / manifest.MANIFEST, CARD: card.encode()}
    return PushReport(
        kind=target.kind,
        url=f"{constants.ENDPOINT}/datasets/{target.name}",
        files={CARD: len(card.encode()), manifest.MANIFEST: location.size(manifest.MANIFEST), **sizes},
        card=card,
        commit=None if dry_run else target.upload(last, folder),
    )
