"""Images and targets are read from a dataset repository of a hub as from a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub import Hub, hub_of, use_hub
from support.messages import Case, one_line, require_message
from support.project import SETTINGS, Project
from support.s3 import free_port

from milan_pipe import api
from milan_pipe.config.params import load_params
from milan_pipe.errors import DataError, MissingError, SettingError, StoreError
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard
from milan_pipe.storage import location_of
from milan_pipe.training.checkpoint import open_checkpoint

DATA = "datasets/org/data"
IMAGES, TARGETS = f"hf://{DATA}/images", f"hf://{DATA}@main/targets"


@pytest.fixture
def hub(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A private repository of the project's images and targets, read with a token."""
    with hub_of(tmp_path / "hub") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        hub.behave(private={DATA})
        monkeypatch.setenv("HF_TOKEN", hub.token)
        # How long a plan measures is tested where plans are.
        monkeypatch.setattr("milan_pipe.planning.load._LOADER_SECONDS", 0.05)
        offer(hub, {"images": project.root / "images", "targets": project.targets})
        yield hub
        assert hub.leaks == []


def offer(hub: Hub, folders: dict[str, Path]) -> None:
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.commit(DATA, files)


def tree(folder: Path) -> dict[str, bytes]:
    location = location_of(folder)
    return {path: location.read(path) for path in location.sizes()}


def test_images(hub: Hub, project: Project, tmp_path: Path) -> None:
    train = f"{IMAGES}/train-*.tar"
    assert expand_shards(train) == expand_shards(f"{IMAGES}/train-{{000000..000001}}.tar")
    assert [shard.name for shard in expand_shards(IMAGES)] == sorted(path.name for path in images_of(project))
    assert api.extract_targets(train, tmp_path / "targets", project.params).complete
    assert tree(tmp_path / "targets") == tree(project.targets)
    assert hub.token not in str(tree(tmp_path / "targets"))
    api.plan(train, tmp_path / "planned", project.params, sample=2)
    score = api.knn(project.runs[0], train, f"{IMAGES}/test-*.tar", project.params, keep=tmp_path / "kept")
    here = next(kept for kept in read_evaluations(project.runs[0] / "evaluations") if kept.task == "knn")
    assert score.best == max(here.scores.values())
    with pytest.raises(DataError, match="subfolders"):
        expand_shards(f"hf://{DATA}")
    with pytest.raises(DataError, match="shards"):
        expand_shards(TARGETS)


def test_parquet_files_are_prepared(hub: Hub, project: Project, tmp_path: Path) -> None:
    """A folder of a private repository in the form in which most data sets are there."""
    shard = images_of(project)[0]
    found = [sample.data for sample in read_shard(shard, lambda *_: None)]
    pq.write_table(pa.table({"image": found}), tmp_path / "data.parquet")
    offer(hub, {"data": tmp_path})
    report = api.prepare(f"hf://{DATA}/data", tmp_path / "images", project.params)
    assert report.samples == len(found)
    packed = [path for path in (tmp_path / "images").iterdir() if hub.token in path.read_text(errors="replace")]
    assert not packed


def images_of(project: Project) -> list[Path]:
    return list((project.root / "images").glob("*.tar"))


@pytest.mark.parametrize("stored", ["int8 in zarr", "webdataset"])
def test_targets(stored: str, hub: Hub, project: Project, tmp_path: Path) -> None:
    store = project.targets
    if stored == "webdataset":
        api.convert_targets(project.targets, tmp_path / "tars", format="webdataset")
        offer(hub, {"targets": (store := tmp_path / "tars")})
    assert api.verify_targets(TARGETS) == api.verify_targets(store)
    api.pretrain(TARGETS, tmp_path / "run", project.params)
    runs = (project.runs[0], tmp_path / "run")
    here, there = ([file["sha256"] for file in open_checkpoint(run).files.values()] for run in runs)
    assert here == there
    api.extract_targets(None, tmp_path / "seen", project.params, views_from=TARGETS)
    assert tree(tmp_path / "seen") == tree(project.targets)
    looks = api.inspect_targets(TARGETS, tmp_path / "looks", project.params, count=1)
    assert TARGETS in Path(looks.page).read_text()


def test_compressed_targets(hub: Hub, project: Project, tmp_path: Path) -> None:
    params = load_params(None, [*SETTINGS, "codec.name=klt"])
    api.extract_targets(f"{project.root}/images/test-*.tar", tmp_path / "klt", params)
    offer(hub, {"targets": tmp_path / "klt"})
    api.convert_targets(TARGETS, tmp_path / "again", format="zarr")
    assert tree(tmp_path / "again") == tree(tmp_path / "klt")


def test_a_store_at_the_root_of_its_repository_has_a_card_beside_it(hub: Hub, project: Project) -> None:
    files = {
        path.relative_to(project.targets).as_posix(): path for path in project.targets.rglob("*") if path.is_file()
    }
    card = hub.objects.parent / "card"
    card.write_text("---\nlicense: mit\n---\n")
    hub.commit(DATA, {**files, "README.md": card, ".gitattributes": card})
    assert api.verify_targets(f"hf://{DATA}").problems == ()
    broken = {**files, "shards/000000/features/c/0/0/0/0": files["shards/000001/features/c/0/0/0/0"]}
    hub.commit(DATA, broken)
    (problem, *_) = api.verify_targets(f"hf://{DATA}").problems
    assert problem.repair == "milan-pipe extract-targets IMAGES TARGETS --redo 000000"


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("answer", [1, 403, 500])
def test_where_the_hub_leads_to_is_not_shown(answer: int, hub: Hub) -> None:
    """The address is signed: who has it can read without a token."""
    hub.behave(elsewhere=answer)
    location = location_of(IMAGES)
    for ask in (location.read, location.open, location.size):
        with pytest.raises(StoreError, match=r"train-000000\.tar cannot be read") as caught:
            ask("train-000000.tar")
        assert "SIGNED" not in one_line(caught)


# --- one line for each mistake ------------------------------------------------------------------------------------


def refused(hub: Hub, status: int, code: str) -> None:
    hub.behave(refuse={DATA: (status, code)})
    location_of(TARGETS).read("shards/zarr.json")


def gated_files(hub: Hub) -> None:
    location = location_of(TARGETS)
    location.sizes()
    hub.behave(refuse={DATA: (403, "GatedRepo")})
    location.read("shards/zarr.json")


def no_token(_: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    api.verify_targets(TARGETS)


def nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(f"http://127.0.0.1:{free_port()}", hub.folder, monkeypatch)
    location_of(TARGETS).read("shards/zarr.json")


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
MESSAGES: dict[str, tuple[Callable[..., object], type[Exception], str]] = {
    "gated": (lambda hub: refused(hub, 403, "GatedRepo"), StoreError,
              f"repository {DATA} is gated: accept its terms at http://.../{DATA} and {LOGIN}"),
    "gated files": (gated_files, StoreError,
                    f"{TARGETS}/shards/zarr.json cannot be read: ... answered 403 Forbidden; accept its terms on its "
                    "page, and log in with `hf auth login` or set HF_TOKEN"),
    "no token": (no_token, StoreError,
                 f"http://... has no repository {DATA}, or keeps it private: check the name, or {LOGIN}"),
    "refused": (lambda hub: refused(hub, 401, ""), StoreError,
                f"http://... refuses access to repository {DATA} (401): {LOGIN}"),
    "no revision": (lambda _: api.verify_targets(f"hf://{DATA}@v9"), StoreError,
                    f"repository {DATA} on http://... has no revision v9"),
    "no such name": (lambda _: location_of("hf://datasets/org/..").sizes(), SettingError,
                     "'org/..' is no name of a repository: ..."),
    "nobody": (nobody, StoreError, f"revision main of repository {DATA} cannot be fetched from http://...: ...refused"),
    "models": (lambda _: location_of("hf://org/data"), SettingError,
               "hf://org/data cannot be opened; expected hf://datasets/ORG/NAME, or .../NAME@REVISION"),
    "token in the URL": (lambda _: location_of("hf://me:hf_secret@datasets/org/data"), SettingError,
                         "hf://***@datasets/org/data cannot be opened with a token in it; " + LOGIN),
    "written": (lambda _: api.convert_targets(TARGETS, f"hf://{DATA}/new", format="zarr"), SettingError,
                f"hf://{DATA}/new can only be read; write to a local folder, s3://, gs:// or az://"),
    "no store": (lambda _: api.verify_targets(f"hf://{DATA}/images"), MissingError,
                 f"hf://{DATA}/images is not a target store; write one with `milan-pipe extract-targets IMAGES "
                 "TARGETS`"),
    "no shard": (lambda _: api.extract_targets(f"hf://{DATA}/images/train-9.tar", "t"), MissingError,
                 f"hf://{DATA}/images/train-9.tar is not there; expected a folder of .tar shards, a shard, braces or a "
                 "glob"),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    provoke, kind, expected = MESSAGES[case]
    arguments = (hub, monkeypatch)[: provoke.__code__.co_argcount]
    checked: Case = (lambda: provoke(*arguments), kind, expected)
    require_message(checked)
