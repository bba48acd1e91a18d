"""A store says of itself which shards and files it has. What it says leads nowhere outside of it, digests or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.targets import header, write_store

from milan_pipe.config.student import MaskSettings
from milan_pipe.digests import sha256_of, with_digest
from milan_pipe.errors import DataError, MilanError
from milan_pipe.reports.inspect_targets import inspect_targets
from milan_pipe.targets import manifest
from milan_pipe.targets.checksum import crc32c
from milan_pipe.targets.convert import convert_targets
from milan_pipe.targets.store import open_targets
from milan_pipe.targets.verify import verify_store

FORMATS = ["zarr", "webdataset"]


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a file with a digest and give it the digest of its new content."""
    values = json.loads(file.read_text())
    del values["sha256"]
    change(values)
    file.write_bytes(manifest.to_file(values))


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
