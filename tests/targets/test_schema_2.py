"""Stores of schema 2, written by the versions that had it: read to the bit, converted, and never added to.

`data/schema-2.tar.xz` holds one of each kind, as `support.targets` wrote them then.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from support.targets import check_store, differences, header, random_blocks, tree, write_store

from milan_pipe import api
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.params import Params
from milan_pipe.errors import MismatchError
from milan_pipe.targets.schema import TargetBlock
from milan_pipe.targets.store import TargetStoreWriter, open_targets

KINDS = ("int8-1", "int8-0", "float16-1", "klt-1")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schema-2")
    with tarfile.open(Path(__file__).parent / "data" / "schema-2.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


def written(kind: str, store_format: str) -> dict[str, list[TargetBlock]]:
    codec, level = kind.split("-")
    head = header(codec, format=store_format, zstd_level=int(level))
    return {f"{number:06d}": random_blocks(head, samples, number) for number, samples in enumerate((3, 2))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_it_is_read_and_verified(old: Path, store_format: str, kind: str) -> None:
    folder = old / f"{store_format}-{kind}"
    store = open_targets(folder)
    assert store.header.schema_version == 2
    check_store(store, written(kind, store_format))
    assert api.verify_targets(folder).problems == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [("zarr", "webdataset"), ("webdataset", "zarr"), ("zarr", "zarr")])
def test_it_is_converted_to_what_is_written_now(old: Path, tmp_path: Path, before: str, after: str, kind: str) -> None:
    api.convert_targets(old / f"{before}-{kind}", tmp_path / "new", format=after)  # type: ignore[arg-type]
    store = open_targets(tmp_path / "new")
    assert store.header.schema_version == 3
    check_store(store, written(kind, after))
    codec, level = kind.split("-")
    write_store(tmp_path / "now", header(codec, format=after, zstd_level=int(level), shards=2), [3, 2])
    assert tree(tmp_path / "new").keys() == tree(tmp_path / "now").keys()


def test_codes_are_stored_plain_on_the_way(old: Path, tmp_path: Path) -> None:
    api.convert_targets(old / "webdataset-int8-1", tmp_path / "new", format="webdataset", zstd_level=0)
    store = open_targets(tmp_path / "new")
    assert store.header.codec.zstd_level == 0
    check_store(store, written("int8-1", "webdataset"))
    with tarfile.open(tmp_path / "new" / "shards" / "000000" / "view-0.tar") as tar:
        assert any(name.endswith(".features.npy") for name in tar.getnames())


def test_nothing_is_added_to_it(old: Path) -> None:
    folder = old / "zarr-int8-1"
    before = tree(folder)
    now = header("int8", zstd_level=1, shards=2)
    with pytest.raises(MismatchError, match=r"schema_version: store has 2, this run has 3.*convert-targets"):
        TargetStoreWriter(folder, now)
    assert tree(folder) == before


@pytest.mark.parametrize("kind", ["zarr-klt-1", "webdataset-int8-0"])
def test_another_teacher_sees_its_views(old: Path, tmp_path: Path, kind: str) -> None:
    params = Params(extract=ExtractSettings(device="cpu"))
    api.extract_targets(None, tmp_path / "new", params, views_from=old / kind)
    before, store = open_targets(old / kind), open_targets(tmp_path / "new")
    assert (store.header.schema_version, store.header.views) == (3, before.header.views)
    assert store.header.views.renderer == "pillow"
    for shard in before.shards:
        assert store.record(shard).source == before.record(shard).source
        for view in range(2):
            then, now = (one.read(shard, view, 0, one.samples(shard)) for one in (before, store))
            assert not {"keys", "jpegs", "label_N", "crop_N4", "flip_N"} & {*differences(now, then)}
    assert store.views_sha256("000001") is not None


def test_damage_is_found(old: Path, tmp_path: Path) -> None:
    for name in ("zarr-int8-1", "webdataset-int8-1"):
        copy = tmp_path / name
        for path, data in tree(old / name).items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(data)
        damaged = max((copy / "000001").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        content = bytearray(damaged.read_bytes())
        content[len(content) // 3] ^= 4
        damaged.write_bytes(content)
        assert {problem.shard for problem in api.verify_targets(copy).problems} == {"000001"}
