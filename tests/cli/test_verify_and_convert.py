"""`verify-targets` and `convert-targets` as users meet them: exit codes, tables, JSON, and commands that repair."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.targets import header, tree, write_store
from support.wild import Command

from milan_pipe.api import extract_targets
from milan_pipe.cli import console
from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import load_params
from milan_pipe.images.prepare import prepare

FORMATS = ("zarr", "webdataset")
HEADERS = {"zarr": "shards/zarr.json", "webdataset": "header.json"}
SETTINGS = ["views.count=2", "extract.threads=1", "extract.batch_size=16", "extract.device=cpu"]
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def milan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for one in (console.console, console.results):
        monkeypatch.setattr(one, "width", 80)
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "images"
    settings = PrepareSettings(train_scenes=12, test_scenes=0, samples_per_shard=4)
    prepare("demo", folder, settings, workers=1)
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def extracted(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, bytes]]:
    """Format and files of a store of three shards."""
    targets = tmp_path_factory.mktemp("extracted") / "t"
    extract_targets(images, targets, load_params(None, [*SETTINGS, f"extract.format={request.param}"]))
    return request.param, tree(targets)


def put(files: dict[str, bytes], where: Path) -> Path:
    for path, data in files.items():
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        (where / path).write_bytes(data)
    return where


# --- verify -------------------------------------------------------------------------------------------------------


def test_a_whole_store(milan: Command, extracted: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    targets = put(extracted[1], tmp_path / "t")
    done = milan("verify-targets", targets, "--against-teacher", 4, *WORDS)
    assert (done.code, done.err) == (0, "")
    assert "none" in done.out
    assert "repair" not in done.out
    done = milan("verify-targets", targets, "--json")
    assert done.code == 0
    report = json.loads(done.out.splitlines()[-1])
    assert len(done.out.splitlines()) == 1
    assert (report["problems"], report["repair"]) == ([], [])
    shards = {path: data for path, data in extracted[1].items() if path.startswith("shards/0")}
    assert (report["shards"], report["samples"], report["views"]) == (3, 12, 24)
    assert (report["files"], report["bytes"]) == (len(shards), sum(map(len, shards.values())))


def test_the_printed_commands_mend(
    milan: Command, extracted: tuple[str, dict[str, bytes]], images: Path, tmp_path: Path
) -> None:
    store_format, before = extracted
    targets = put(before, tmp_path / "two words" / "t")
    chunk = next(path for path in before if path.startswith("shards/000000/") and before[path])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    manifests = ["manifest/000001.json", "manifest.json", "bad_samples.jsonl"]
    changes: list[tuple[list[str], Callable[[Path], object]]] = [
        ([chunk], lambda file: file.write_bytes(file.read_bytes()[:-1])),
        ([chunk, *manifests], lambda file: file.unlink()),
        (["manifest/000001.json", "manifest/000002.json"], lambda file: file.write_bytes(b"{}")),
        (["manifest.json"], lambda file: file.write_bytes(b"{}")),
        (["bad_samples.jsonl"], lambda file: file.write_bytes(b"{}\n")),
        ([HEADERS[store_format]], lambda file: file.write_bytes(file.read_bytes() + b"\n")),
        (["shards/000009/a", "b c"], lambda file: (file.parent.mkdir(exist_ok=True), file.touch())),
    ]
    for paths, change in changes:
        for path in paths:
            change(targets / path)
        found = milan("verify-targets", targets)
        assert (found.code, found.err) == (1, "")
        *_, commands = found.out.partition(" settings as they were:\n")
        assert commands
        for line in commands.splitlines():
            # As a shell would take it.
            words = subprocess.run(
                ["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
            ).stdout.split("\0")[:-1]
            if words[0] == "milan-pipe":
                repaired = milan(
                    *[images if word == "IMAGES" else word for word in words[1:]], "--format", store_format, *WORDS
                )
                assert repaired.code == 0, repaired.err
            else:
                assert words[0] in ("rm", "mv")
                subprocess.run([str(elsewhere) if word == "ELSEWHERE" else word for word in words], check=True)
        assert tree(targets) == before
        assert milan("verify-targets", targets).code == 0


def test_problems_are_a_table_and_json(milan: Command, tmp_path: Path) -> None:
    targets = tmp_path / "t"
    write_store(targets, header(shards=3), [5, 5, 5])
    (targets / "shards" / "000001" / "attention" / "zarr.json").unlink()
    done = milan("verify-targets", targets, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    command = f"milan-pipe extract-targets IMAGES {targets} --redo 000001"
    assert report["problems"] == [
        {"shard": "000001", "array": "attention", "what": "attention/zarr.json is missing", "repair": command}
    ]
    assert report["repair"] == [command]
    assert (report["shards"], report["samples"]) == (3, 10)
    assert all(word in done.err for word in ("000001", "attention", "is missing"))
    assert f"\n  {command}\n" in done.err, "in one piece, however wide the terminal is"


def test_of_many_problems_some_are_shown_and_all_are_mended(milan: Command, tmp_path: Path) -> None:
    targets = tmp_path / "t"
    write_store(targets, header(format="webdataset", shards=60), [1] * 60)
    for shard in range(60):
        (targets / "shards" / f"{shard:06d}" / "view-1.tar").unlink()
    done = milan("verify-targets", targets, "--json")
    assert done.code == 1
    assert "and 10 more: see --json" in done.err
    report = json.loads(done.out)
    assert len(report["problems"]) == 60
    assert report["repair"][0].endswith(",".join(f"{shard:06d}" for shard in range(60)))


def test_what_cannot_be_checked(milan: Command, tmp_path: Path) -> None:
    targets = tmp_path / "t"
    write_store(targets, header(), [5])
    assert "is not a target store" in milan("verify-targets", tmp_path / "nowhere").error
    assert "is not a target store" in milan("verify-targets", tmp_path).error
    spoilt = put(tree(targets), tmp_path / "spoilt")
    text = (spoilt / "shards" / "zarr.json").read_text()
    (spoilt / "shards" / "zarr.json").write_text(text.replace('"flip": 0.5', '"flip": 0.6'))
    assert "its content does not fit its digest. Remove it and run" in milan("verify-targets", spoilt).error
    done = milan("verify-targets", targets, "--against-teacher", 1, *WORDS)
    assert (done.code, done.out) == (2, "")
    assert "teacher.weights_sha256: store has 'abab" in done.error, "the demo teacher is another one"
    for words in ([], ["--against-teacher", "-1"], ["--against-teacher", "x"], ["--what"]):
        done = milan("verify-targets", *([targets] if words else []), *words)
        assert (done.code, done.out) == (2, "")


def test_a_store_in_a_bucket(milan: Command, bucket: str) -> None:
    where = f"{bucket}/t"
    write_store(where, header(format="webdataset", shards=2), [5, 5])
    assert milan("verify-targets", where).code == 0
    assert milan("convert-targets", where, f"{bucket}/o", "--format", "zarr").code == 0
    assert milan("verify-targets", f"{bucket}/o").code == 0
    assert "there is no bucket" in milan("verify-targets", f"{bucket}-not/t").error


# --- convert ------------------------------------------------------------------------------------------------------


def test_converted_is_as_extracted(
    milan: Command, extracted: tuple[str, dict[str, bytes]], images: Path, tmp_path: Path
) -> None:
    store_format, files = extracted
    into = FORMATS[1 - FORMATS.index(store_format)]
    targets = put(files, tmp_path / "t")
    done = milan("convert-targets", targets, tmp_path / "o", "--format", into, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["shards"], report["skipped"], report["samples"]) == (3, 0, 12)
    assert report["bytes"] == sum(map(len, tree(tmp_path / "o").values()))
    extract_targets(images, tmp_path / "at once", load_params(None, [*SETTINGS, f"extract.format={into}"]))
    assert tree(tmp_path / "o") == tree(tmp_path / "at once")
    again = milan("convert-targets", targets, tmp_path / "o", "--format", into)
    assert (again.code, again.err) == (0, "")
    assert "3 (3 were there)" in again.out
    assert milan("verify-targets", tmp_path / "o", "--against-teacher", 4, *WORDS).code == 0
    # The same extraction takes it for its own.
    more = milan("extract-targets", images, tmp_path / "o", "--format", into, *WORDS, "--json")
    assert (more.code, json.loads(more.out)["skipped"]) == (0, 3)


def test_mistakes(milan: Command, tmp_path: Path) -> None:
    targets = tmp_path / "t"
    write_store(targets, header(), [5])
    assert "zarr" in milan("convert-targets", targets, tmp_path / "o", "--format", "parquet").error
    error = milan("convert-targets", targets, targets, "--format", "webdataset").error
    assert "is the store that is read; name another folder for the new store" in error
    error = milan("convert-targets", tmp_path / "gone", tmp_path / "o", "--format", "zarr").error
    assert "is not there" in error
    (targets / "shards" / "000000" / "key" / "c" / "0").unlink()
    error = milan("convert-targets", targets, tmp_path / "o", "--format", "webdataset").error
    assert "shard 000000" in error
    assert "--redo 000000`" in error
    assert milan("convert-targets", targets, tmp_path / "o").code == 2


# --- views of a store ---------------------------------------------------------------------------------------------


def test_another_teacher_sees_stored_views(
    milan: Command, extracted: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    store_format, files = extracted
    targets, seen = put(files, tmp_path / "a"), tmp_path / "b"
    words = ("--views-from", targets, seen, "--format", store_format, *WORDS)
    done = milan("extract-targets", *words, "--json")
    assert (done.code, done.report["samples"], done.report["views"]) == (0, 12, 24)
    assert f"{targets} -> {seen}" in done.err.replace("\n", "")
    assert tree(seen) == files
    max(path for path in (seen / "shards" / "000001").rglob("*") if path.is_file()).unlink()
    done = milan("verify-targets", seen)
    *_, command = done.out.rstrip().splitlines()
    assert (done.code, command.split()[:2]) == (1, ["milan-pipe", "extract-targets"])
    printed = command.replace("IMAGES", f"--views-from {targets}").split()[1:]
    assert milan(*printed, "--format", store_format, *WORDS).code == 0
    assert tree(seen) == files


@pytest.mark.parametrize(
    "words", [["t"], ["i", "t", "--views-from", "a"], ["i", "j", "t"], ["i", "j", "t", "--views-from", "a"]]
)
def test_images_or_views(milan: Command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = milan("extract-targets", *words)
    found = " ".join([*words[-2:], *words[:-2]] if "--views-from" in words else words)
    assert done.code == 2
    assert f"expected IMAGES TARGETS, or --views-from STORE TARGETS; found {found}" in " ".join(done.err.split())
    assert not list(tmp_path.iterdir())
