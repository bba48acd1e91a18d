"""A store in the other backend's files: nothing lost, gone on with, and never written over something else."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import processes
from support.targets import check_store, commit, header, random_blocks, tree, write_store

from milan_pipe.config.targets import StoreFormat
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, StoreError
from milan_pipe.targets.convert import convert_targets
from milan_pipe.targets.store import StoreShardWriter, TargetStoreWriter, open_targets
from milan_pipe.targets.verify import verify_store

FORMATS: tuple[StoreFormat, StoreFormat] = ("zarr", "webdataset")
# What is stored of a codec does not depend on the level: each has both of them once.
KINDS: list[tuple[StoreFormat, str, int]] = [
    ("zarr", "int8", 1), ("zarr", "float16", 0), ("zarr", "klt", 1),
    ("webdataset", "int8", 0), ("webdataset", "float16", 1), ("webdataset", "klt", 0),
]  # fmt: skip


def other(store_format: StoreFormat) -> StoreFormat:
    return FORMATS[1 - FORMATS.index(store_format)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@dataclass(frozen=True)
class Source:
    """A store of three shards with two, two and one block, its files, and those of its conversion."""

    root: Path
    files: dict[str, bytes]
    converted: dict[str, bytes]


@pytest.fixture(scope="module", params=FORMATS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    write_store(folder / "t", header(format=request.param, shards=3), [130, 130, 5])
    convert_targets(folder / "t", folder / "unbroken", format=other(request.param))
    return Source(folder / "t", tree(folder / "t"), tree(folder / "unbroken"))


def format_of(source: Source) -> StoreFormat:
    return "zarr" if "shards/zarr.json" in source.files else "webdataset"


# --- nothing lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store_format", "codec", "level"), KINDS)
def test_the_other_format_and_back(tmp_path: Path, store_format: StoreFormat, codec: str, level: int) -> None:
    sizes = (130, 1)
    head = header(codec, format=store_format, zstd_level=level, shards=2)
    written = write_store(tmp_path / "t", head, sizes)
    # What the same samples give that are written in that format at once.
    into = other(store_format)
    write_store(tmp_path / "at once", head.model_copy(update={"format": into}), sizes)
    report = convert_targets(tmp_path / "t", tmp_path / "converted", format=into)
    assert (report.shards, report.skipped, report.samples) == (2, 0, sum(sizes))
    assert report.bytes == sum(len(data) for data in tree(tmp_path / "converted").values())
    assert tree(tmp_path / "converted") == tree(tmp_path / "at once")
    check_store(open_targets(tmp_path / "converted"), written)
    assert verify_store(tmp_path / "converted").problems == ()
    convert_targets(tmp_path / "converted", tmp_path / "back", format=store_format)
    assert tree(tmp_path / "back") == tree(tmp_path / "t")


def test_the_same_format_is_a_copy(tmp_path: Path, source: Source) -> None:
    convert_targets(source.root, tmp_path / "copy", format=format_of(source))
    assert tree(tmp_path / "copy") == source.files


@pytest.mark.parametrize("store_format", FORMATS)
def test_to_a_bucket_and_back(bucket: str, tmp_path: Path, store_format: StoreFormat) -> None:
    write_store(tmp_path / "t", header(format=store_format, shards=2), [130, 5])
    convert_targets(tmp_path / "t", f"{bucket}/t", format=other(store_format))
    assert verify_store(f"{bucket}/t").problems == ()
    convert_targets(f"{bucket}/t", tmp_path / "back", format=store_format)
    assert tree(tmp_path / "back") == tree(tmp_path / "t")
    convert_targets(f"{bucket}/t", f"{bucket}/copy", format=other(store_format))
    assert tree(f"{bucket}/copy") == tree(f"{bucket}/t")


def test_no_teacher_is_loaded(tmp_path: Path) -> None:
    """Of a store whose teacher is on no machine, in a process that could not even build one."""
    write_store(tmp_path / "t", header("klt", model="of-nobody", pretrained="gone.pt"), [5])
    code = (
        "import sys\n"
        "sys.modules['open_clip'] = sys.modules['timm'] = None\n"
        "from milan_pipe.targets.convert import convert_targets\n"
        f"convert_targets({str(tmp_path / 't')!r}, {str(tmp_path / 'o')!r}, format='webdataset')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert verify_store(tmp_path / "o").problems == ()


# --- gone on with -------------------------------------------------------------------------------------------------


def test_again_does_nothing(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(shards=2), [5, 3])
    convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("0*/*")}
    report = convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    assert (report.shards, report.skipped) == (2, 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("0*/*")} == before


@pytest.mark.parametrize("blocks", [0, 1, 3, 4])
def test_interrupted_after_any_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source, blocks: int
) -> None:
    into = other(format_of(source))
    append, left = StoreShardWriter.append, [blocks]

    def interrupted(self: StoreShardWriter, block: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, block)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(StoreShardWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_targets(source.root, tmp_path / "o", format=into)
    assert not list((tmp_path / "o").rglob(".partial-*")), "nothing unfinished is left"
    report = convert_targets(source.root, tmp_path / "o", format=into)
    assert report.skipped == blocks // 2
    assert tree(tmp_path / "o") == source.converted


@pytest.mark.parametrize("store_format", ["zarr", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_killed_and_gone_on_with(tmp_path: Path, store_format: StoreFormat) -> None:
    shards = 20
    write_store(tmp_path / "t", header(format=store_format, shards=shards, width=64), [130] * shards)
    into = other(store_format)
    convert_targets(tmp_path / "t", tmp_path / "unbroken", format=into)
    command = [sys.executable, "-m", "milan_pipe", "convert-targets", "t", "o", "--format", into]
    process = processes.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    stop = time.monotonic() + 120
    committed = tmp_path / "o" / "manifest" / "000002.json"
    while not committed.exists() and time.monotonic() < stop and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "it had come to its end"
    assert committed.exists()
    report = convert_targets(tmp_path / "t", tmp_path / "o", format=into)
    assert 3 <= report.skipped < shards
    found = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    whole = tree(tmp_path / "unbroken")
    assert found == whole.keys()
    assert tree(tmp_path / "o") == whole


@pytest.mark.parametrize("store_format", FORMATS)
def test_a_source_shard_done_again_is_converted_again_where_it_is_named(
    tmp_path: Path, store_format: StoreFormat
) -> None:
    head = header(format=store_format, shards=2)
    write_store(tmp_path / "t", head, [5, 5])
    into = other(store_format)
    convert_targets(tmp_path / "t", tmp_path / "o", format=into)
    writer = TargetStoreWriter(tmp_path / "t", head)
    writer.forget("000001")
    commit(writer, "000001", random_blocks(head, 7, seed=9))
    writer.finish()
    before = tree(tmp_path / "o")
    message = refusal(tmp_path / "t", tmp_path / "o", into)
    assert "1 of the 2 shards" in message
    assert message.endswith("write them again with --redo 000001")
    assert tree(tmp_path / "o") == before
    report = convert_targets(tmp_path / "t", tmp_path / "o", format=into, redo=["000001"])
    assert (report.skipped, report.samples) == (1, 12)
    convert_targets(tmp_path / "t", tmp_path / "fresh", format=into)
    assert tree(tmp_path / "o") == tree(tmp_path / "fresh")
    assert verify_store(tmp_path / "o").problems == ()


def test_a_shard_whose_files_lack_bytes_is_converted_again(tmp_path: Path, source: Source) -> None:
    into = other(format_of(source))
    convert_targets(source.root, tmp_path / "o", format=into)
    damaged = next(path for path, data in source.converted.items() if path.startswith("shards/000001/") and data)
    (tmp_path / "o" / damaged).unlink()
    with pytest.warns(RuntimeWarning, match="are done again: 000001"):
        report = convert_targets(source.root, tmp_path / "o", format=into)
    assert report.skipped == 2
    assert tree(tmp_path / "o") == source.converted


def test_a_shard_to_write_again_that_is_not_there(tmp_path: Path, source: Source) -> None:
    with pytest.raises(DataError, match=r"no shard '000009' to write again; .* has 000000 to 000002"):
        convert_targets(source.root, tmp_path / "o", format="zarr", redo=["000009"])


# --- refused ------------------------------------------------------------------------------------------------------


def refusal(source: object, destination: object, store_format: StoreFormat) -> str:
    with pytest.raises(MilanError) as caught:
        convert_targets(str(source), str(destination), format=store_format)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_destination_of_another_configuration(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(shards=2), [5, 5])
    write_store(tmp_path / "o", header(format="webdataset", shards=2, model="other"), [5, 5])
    before = tree(tmp_path / "o")
    with pytest.raises(MismatchError, match=r"teacher\.model"):
        convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    with pytest.raises(MismatchError, match="format"):
        convert_targets(tmp_path / "t", tmp_path / "o", format="zarr")
    assert tree(tmp_path / "o") == before


def test_a_destination_that_holds_something_else(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(), [5])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_bytes(b"x")
    with pytest.raises(DataError, match="not empty"):
        convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("store_format", FORMATS)
def test_a_store_into_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_format: StoreFormat) -> None:
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "t", header(), [5])
    (tmp_path / "link").symlink_to(tmp_path / "t")
    before = tree(tmp_path / "t")
    for destination in ("t", "t/", "./t", "../" + tmp_path.name + "/t", tmp_path / "t", "link"):
        assert "is the store that is read; name another folder" in refusal("t", destination, store_format)
    assert "lie one within the other" in refusal("t", "t/inside", store_format)
    assert "lie one within the other" in refusal("t", ".", store_format)
    assert tree(tmp_path / "t") == before


def test_a_store_of_a_bucket_into_itself(bucket: str) -> None:
    write_store(f"{bucket}/t", header(), [5])
    before = tree(bucket)
    for store_format in FORMATS:
        assert "is the store that is read" in refusal(f"{bucket}/t", f"{bucket}/t/", store_format)
        assert "lie one within the other" in refusal(f"{bucket}/t", f"{bucket}/t/inside", store_format)
    assert tree(bucket) == before


def test_a_damaged_source_shard_is_one_clear_error(tmp_path: Path, source: Source) -> None:
    shutil.copytree(source.root, tmp_path / "t")
    into = other(format_of(source))
    inside = [path for path, data in source.files.items() if path.startswith("shards/000001/") and data]
    for path in [*inside[:: max(1, len(inside) // 6)], "manifest/000001.json"]:
        damage(tmp_path / "t" / path)
        message = refusal(tmp_path / "t", tmp_path / "o", into)
        assert "000001" in message
        assert f"`milan-pipe extract-targets IMAGES {tmp_path / 't'} --redo 000001`" in message
        (tmp_path / "t" / path).write_bytes(source.files[path])
        assert list((tmp_path / "o" / "manifest").iterdir()) == [tmp_path / "o" / "manifest" / "000000.json"]
    report = convert_targets(tmp_path / "t", tmp_path / "o", format=into)
    assert report.skipped == 1
    assert tree(tmp_path / "o") == source.converted


def test_a_source_that_is_not_finished(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(shards=3), [5, 5])
    with pytest.raises(DataError, match="2 of 3 shards"):
        convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    assert not (tmp_path / "o").exists()


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not there"):
        convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    (tmp_path / "t").mkdir()
    with pytest.raises(DataError, match="neither"):
        convert_targets(tmp_path / "t", tmp_path / "o", format="webdataset")
    assert not (tmp_path / "o").exists()


def test_a_destination_that_cannot_be_written(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(), [5])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="directory"):
        convert_targets(tmp_path / "t", tmp_path / "file" / "o", format="webdataset")
