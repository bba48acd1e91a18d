"""A store says of itself which shards and files it has. What it says leads nowhere outside of it, digests or not."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from numcodecs import Zstd
from support.targets import header, write_store

from milan_pipe.config.student import MaskSettings
from milan_pipe.digests import sha256_of, with_digest
from milan_pipe.errors import DataError, MilanError, StoreError
from milan_pipe.reports.inspect_targets import inspect_targets
from milan_pipe.targets import manifest
from milan_pipe.targets.checksum import crc32c
from milan_pipe.targets.convert import convert_targets
from milan_pipe.targets.store import open_targets
from milan_pipe.targets.tar_store import _members
from milan_pipe.targets.verify import verify_store

FORMATS = ["zarr", "webdataset"]


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a file with a digest and give it the digest of its new content."""
    values = json.loads(file.read_text())
    del values["sha256"]
    change(values)
    file.write_bytes(manifest.to_file(values))


def values_of(folder: Path, array: str) -> Path:
    """The only file of a small array, in the folder of its shard."""
    (file,) = [file for file in (folder / array / "c").rglob("*") if file.is_file()]
    return file


def without_values(store: Path, array: str) -> None:
    """Make of a small array one that was not written, as those of zeros."""
    folder = store / "shards" / "000000"
    file = values_of(folder, array)
    rewrite(store / "manifest" / "000000.json", lambda values: values["files"].pop(file.relative_to(folder).as_posix()))
    file.unlink()


def hostile_store(root: Path, store_format: str, name: str) -> Path:
    """A store of two shards, the second of which is called `name`."""
    write_store(root, header(format=store_format, shards=2), [5, 5])

    def rename(values: Any) -> None:
        values["shards"][name] = values["shards"].pop("000001")

    rewrite(root / "manifest.json", rename)
    return root


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "..", "000001\n", "00001", "manifest", "a" * 7])
@pytest.mark.parametrize("store_format", FORMATS)
def test_a_shard_of_another_name_is_refused_by_every_reader(tmp_path: Path, store_format: str, name: str) -> None:
    store = hostile_store(tmp_path / "store", store_format, name)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    asks: list[Callable[[], object]] = [
        lambda: open_targets(store),
        lambda: convert_targets(store, tmp_path / "new" / "store", format="zarr"),
        lambda: inspect_targets(store, tmp_path / "looks", masking=MaskSettings()),
    ]
    for ask in asks:
        with pytest.raises(DataError, match="not written by milan-pipe"):
            ask()
    assert any("not written by milan-pipe" in problem.what for problem in verify_store(store).problems)
    assert (victim / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "victim"]


@pytest.mark.parametrize("path", ["../../victim", "/etc/passwd", "features/../../x", "c/0", "features/c/0/x", ""])
@pytest.mark.parametrize("store_format", FORMATS)
def test_a_file_of_another_name_is_refused(tmp_path: Path, store_format: str, path: str) -> None:
    store = tmp_path / "store"
    write_store(store, header(format=store_format), [5])

    def name_another(values: Any) -> None:
        values["files"][path] = values["files"].pop(min(values["files"]))

    (store / "manifest.json").unlink()
    rewrite(store / "manifest" / "000000.json", name_another)
    with pytest.raises(DataError, match="not written by milan-pipe"):
        open_targets(store)
    assert verify_store(store).problems


CHANGES: dict[str, Callable[[Any], Any]] = {
    "no blocks": lambda values: values["blocks"].clear(),
    "fewer blocks": lambda values: [blocks.clear() for blocks in values["blocks"].values()],
    "blocks before the file": lambda values: [blocks.insert(0, [-5, 1]) for blocks in values["blocks"].values()],
    "blocks behind the file": lambda values: [blocks.insert(0, [2**70, 1]) for blocks in values["blocks"].values()],
    "no files": lambda values: values["files"].clear(),
    "files are a list": lambda values: values.update(files=[1, 2]),
    "no source": lambda values: values.pop("source"),
    "samples are words": lambda values: values["source"].update(samples="many"),
    "negative size": lambda values: [file.update(bytes=-1) for file in values["files"].values()],
    "more samples": lambda values: values["source"].update(samples=900),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("store_format", FORMATS)
def test_a_record_that_makes_no_sense_is_one_error(tmp_path: Path, store_format: str, change: str) -> None:
    if (store_format, change) == ("zarr", "no blocks"):
        pytest.skip("zarr's large files are then known by their digests")
    store = tmp_path / "store"
    write_store(store, header(format=store_format), [130])
    (store / "manifest.json").unlink()
    rewrite(store / "manifest" / "000000.json", CHANGES[change])

    def read() -> None:
        reader = open_targets(store)
        reader.keys("000000")
        for start in range(0, reader.samples("000000"), 128):
            reader.read("000000", 1, start, min(start + 128, reader.samples("000000")))

    with pytest.raises(MilanError) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert verify_store(store).problems


def test_keys_without_a_file_are_refused_and_bound_what_else_has_none(tmp_path: Path) -> None:
    write_store(tmp_path, header(), [5])
    (tmp_path / "manifest.json").unlink()

    without_values(tmp_path, "key")
    with pytest.raises(DataError, match="its record names 5 samples, and its keys are at most 0"):
        open_targets(tmp_path).keys("000000")


def test_a_member_of_negative_size_is_refused() -> None:
    header_of_tar = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header_of_tar[124:136] = b"-0000001000\0"
    with pytest.raises(ValueError, match="-512 bytes"):
        list(_members(memoryview(bytes(header_of_tar) * 2)))


@pytest.mark.parametrize("section", ["teacher", "views", "source"])
def test_a_header_of_impossible_sizes_is_refused(tmp_path: Path, section: str) -> None:
    key, value = {"teacher": ("grid", [-1, 4]), "views": ("count", 0), "source": ("shards", -3)}[section]
    write_store(tmp_path, header(), [5])
    content = json.loads((tmp_path / "shards" / "zarr.json").read_text())
    values = content["attributes"]["milan_pipe"]
    del values["sha256"]
    values[section][key] = value
    content["attributes"]["milan_pipe"] = with_digest(values)
    (tmp_path / "shards" / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(MilanError, match=f"{section}.{key}"):
        open_targets(tmp_path)


def test_a_tar_that_fits_its_digests_and_is_none_is_damage(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store, header(format="webdataset"), [5])
    tar = store / "shards" / "000000" / "view-0.tar"
    data = bytearray(tar.read_bytes())
    data[124:135] = b"not octal!!"
    tar.write_bytes(data)

    def fit(values: Any) -> None:
        values["files"][tar.name]["sha256"] = sha256_of(bytes(data))
        (start, _), (stop, _) = values["blocks"][tar.name]
        values["blocks"][tar.name][0][1] = crc32c(bytes(data[start:stop]))

    (store / "manifest.json").unlink()
    rewrite(store / "manifest" / "000000.json", fit)
    with pytest.warns(RuntimeWarning, match="no manifest"):
        opened = open_targets(store)
    for read in (lambda: opened.read("000000", 0, 0, 5), lambda: opened.keys("000000")):
        with pytest.raises(DataError, match=r"view-0\.tar"):
            read()


def resealed(store: Path, change: Callable[[Path], str]) -> Path:
    """A store with one file of its shard changed, and all digests fitted to it."""
    folder = store / "shards" / "000000"
    path = change(folder)
    data = (folder / path).read_bytes()

    def fit(values: Any) -> None:
        values["files"][path] = {"bytes": len(data), "sha256": sha256_of(data)}
        for block, end in zip(values["blocks"].get(path, []), values["blocks"].get(path, [])[1:], strict=False):
            block[1] = crc32c(data[block[0] : end[0]])

    (store / "manifest.json").unlink()
    rewrite(store / "manifest" / "000000.json", fit)
    return store


def described(array: str, change: Callable[[Any], None]) -> Callable[[Path], str]:
    """A change of a shard: of what the metadata of an array say."""

    def describe(folder: Path) -> str:
        file = folder / array / "zarr.json"
        metadata = json.loads(file.read_text())
        change(metadata)
        file.write_text(json.dumps(metadata))
        return f"{array}/zarr.json"

    return describe


@pytest.mark.parametrize("array", ["features", "attention", "view_bytes", "crop", "key"])
@pytest.mark.parametrize("size", [2**40, -1, 0, "9", 1.5, None])
def test_an_array_in_chunks_larger_than_memory_is_refused(tmp_path: Path, array: str, size: Any) -> None:
    """zarr's library would ask for memory that nobody has, which ends the process."""
    write_store(tmp_path, header(), [5])

    def change(metadata: Any) -> None:
        shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        shape[-1] = size if isinstance(size, str | float | None) or size < 1 else size * shape[-1]

    resealed(tmp_path, described(array, change))
    with pytest.warns(RuntimeWarning, match="no manifest"):
        opened = open_targets(tmp_path)
    with pytest.raises(DataError, match=f"array '{array}'"):
        opened.read("000000", 0, 0, 5)


def large_along_each_axis(metadata: Any) -> None:
    for shape in (
        metadata["chunk_grid"]["configuration"]["chunk_shape"],
        *(codec["configuration"]["chunk_shape"] for codec in metadata["codecs"] if "sharding" in codec["name"]),
    ):
        shape[:2] = [128, 128]


def one_value_a_chunk(metadata: Any) -> None:
    for codec in metadata["codecs"]:
        codec["configuration"]["chunk_shape"] = [1, 1, 1, 1]
    metadata["chunk_grid"]["configuration"]["chunk_shape"][1] = 128


def said(array: str, **values: Any) -> Callable[[Path], str]:
    return described(array, lambda metadata: metadata.update(values))


def views_at(*offsets: int) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        array: Any = zarr.open_array(folder / "view_offset", mode="r+")
        array[0, : len(offsets)] = offsets
        return values_of(folder, "view_offset").relative_to(folder).as_posix()

    return change


def keys_that_say_they_are_more(folder: Path) -> str:
    file = values_of(folder, "key")
    texts = bytes(Zstd().decode(file.read_bytes()[:-4]))
    packed = bytes(Zstd().encode((2**30).to_bytes(4, "little") + texts[4:]))
    file.write_bytes(packed + crc32c(packed).to_bytes(4, "little"))
    return file.relative_to(folder).as_posix()


def a_chunk_that_says_it_is_more(folder: Path) -> str:
    (file,) = [file for file in (folder / "features" / "c").rglob("0") if file.is_file() and file.parts[-4] == "0"]
    data = bytearray(file.read_bytes())
    metadata = json.loads((folder / "features" / "zarr.json").read_text())
    chunks, whole = metadata["codecs"][0]["configuration"]["chunk_shape"], metadata["chunk_grid"]["configuration"]
    start = len(data) - 4 - 16 * math.prod(of // n for of, n in zip(whole["chunk_shape"], chunks, strict=True))
    # The least frame that says how much it holds: RFC 8878, section 3.1.1.
    frame = bytes.fromhex("28b52ffde0") + (2**40).to_bytes(8, "little")
    data[: len(frame) + 4] = frame + crc32c(frame).to_bytes(4, "little")
    data[start : start + 16] = bytes(8) + (len(frame) + 4).to_bytes(8, "little")
    data[-4:] = crc32c(bytes(data[start:-4])).to_bytes(4, "little")
    file.write_bytes(data)
    return file.relative_to(folder).as_posix()


LIES: dict[str, tuple[Callable[[Path], str], str]] = {
    "features large along each axis": (described("features", large_along_each_axis), "'features'.*layout"),
    "crop large along each axis": (described("crop", large_along_each_axis), "'crop'.*layout"),
    "fewer bytes than views": (said("view_bytes", shape=[7]), "fewer bytes than the shard has views, 10"),
    "all views are one": (views_at(0, 0, 0, 0, 0), "views that overlap"),
    "views in another order": (views_at(900, 0), "views that overlap"),
    "a view behind all bytes": (views_at(*[2**63 - 9] * 5), "'view_offset'"),
    "keys that say they are more": (keys_that_say_they_are_more, "1073741824 texts, expected 5"),
    "one value a chunk": (described("features", one_value_a_chunk), "'features'.*layout"),
    "lengths of another kind": (said("view_length", data_type="float32"), "'view_length' is of float32"),
    "offsets without a sign": (said("view_offset", data_type="uint64"), "'view_offset' is of uint64"),
    "a chunk that says it is more": (
        a_chunk_that_says_it_is_more,
        "'features'.*a frame of 1099511627776 bytes, expected",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_makes_itself_larger_than_its_bytes_is_damage(
    tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milan_pipe.targets.zarr_store._USUAL_CHUNKS", 1000)
    change, words = LIES[lie]
    write_store(tmp_path, header(zstd_level=1), [5])
    resealed(tmp_path, change)
    with pytest.warns(RuntimeWarning, match="no manifest"):
        opened = open_targets(tmp_path)
    with pytest.raises(DataError, match=words):
        opened.read("000000", 0, 0, 5)


def test_zeros_that_are_said_to_be_a_word_are_damage(tmp_path: Path) -> None:
    write_store(tmp_path, header(), [5])
    resealed(tmp_path, said("label", fill_value="x"))
    without_values(tmp_path, "label")
    with pytest.warns(RuntimeWarning, match="no manifest"):
        opened = open_targets(tmp_path)
    with pytest.raises(DataError, match="array 'label' is damaged"):
        opened.keys("000000")


@pytest.mark.parametrize(
    ("name", "value"), [("label", 10**400), ("crop", [1, 2, 3]), ("crop", 2**40), ("key", 5), ("view", {}), ("flip", 1)]
)
def test_a_record_of_a_sample_that_makes_no_sense_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    write_store(tmp_path, header(format="webdataset"), [1])

    def change(folder: Path) -> str:
        file = folder / "view-0.tar"
        data = file.read_bytes()
        at = data.index(b'{"key"')
        size = int(data[at - 512 + 124 : at - 512 + 135], 8)
        record = json.dumps(json.loads(data[at : at + size]) | {name: value}).encode()
        # As many bytes as there were in whole blocks.
        body = record.ljust(max(len(record), size))
        head = bytearray(data[at - 512 : at])
        head[124:136] = b"%011o\0" % len(body)
        rest = data[at + size + -size % 512 :]
        file.write_bytes(data[: at - 512] + bytes(head) + body + bytes(-len(body) % 512) + rest)
        return file.name

    resealed(tmp_path, change)
    with pytest.warns(RuntimeWarning, match="no manifest"):
        opened = open_targets(tmp_path)
    if name in ("view", "flip"):
        # Of the one nothing is read, the other is a truth value.
        assert opened.read("000000", 0, 0, 1).keys == ["dir/k\u00e9y-0-0"]
        return
    with pytest.raises(DataError, match=r"view-0\.tar"):
        opened.read("000000", 0, 0, 1)


def test_a_header_of_features_wider_than_memory_is_one_error(tmp_path: Path) -> None:
    write_store(tmp_path, header(format="webdataset"), [5])
    content = json.loads((tmp_path / "header.json").read_text())
    content["milan_pipe"].pop("sha256")
    content["milan_pipe"]["teacher"]["width"] = 2**50
    (tmp_path / "header.json").write_text(json.dumps({"milan_pipe": with_digest(content["milan_pipe"])}))
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match="no manifest"):
        opened = open_targets(tmp_path)
    with pytest.raises(StoreError, match="out of memory"):
        opened.read("000000", 0, 0, 5)


def test_a_header_that_leaves_its_format_to_the_default_can_be_checked(tmp_path: Path) -> None:
    write_store(tmp_path, header(), [5])
    file = tmp_path / "shards" / "zarr.json"
    content = json.loads(file.read_text())
    values = content["attributes"]["milan_pipe"]
    del values["sha256"], values["format"]
    content["attributes"]["milan_pipe"] = with_digest(values)
    file.write_text(json.dumps(content))
    (tmp_path / "manifest.json").unlink()
    assert [problem.array for problem in verify_store(tmp_path).problems]
