"""The store, in both formats, local and on S3: what goes in comes out; unfinished work is unseen."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import gc
import json
import tarfile
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import webdataset
import zarr
from support.targets import (
    check_store,
    commit,
    differences,
    header,
    joined,
    random_blocks,
    source,
    tree,
    write_blocks,
    write_store,
)
from zarr.core import sync as zarr_sync
from zarr.storage import LocalStore

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.storage import location_of
from milan_pipe.targets import manifest
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import StoreHeader, TargetBlock, header_differences, require_same_header
from milan_pipe.targets.store import TargetStoreWriter, open_targets
from milan_pipe.targets.tar_store import PackedCodes
from milan_pipe.targets.zarr_store import wait_for_writes

CODECS = [(codec, level) for codec in ("int8", "float16", "klt") for level in (0, 1)]
FORMATS = ("zarr", "webdataset")
# Codecs have nothing to do with where a store lies: a bucket has one with scales and one without.
LOCATIONS_OF_CODECS = [
    *(("local", store_format, *codec) for store_format in FORMATS for codec in CODECS),
    ("s3", "zarr", "float16", 0),
    ("s3", "webdataset", "int8", 1),
]
# Of every kind of array and of both ways to lay it down; `test_what_goes_in_comes_out` has all of them.
FEW_CODECS = [("int8", 0), ("float16", 1), ("klt", 1)]
LOCATIONS_OF_ZEROS = [
    *(("local", name, codec, level) for name in FORMATS for codec in ("int8", "float16") for level in (0, 1)),
    ("s3", "zarr", "int8", 1),
    ("s3", "webdataset", "float16", 0),
]


INDIRECT = ["where", "store_format"]


@pytest.fixture(params=FORMATS)
def store_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["local", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be begun: a folder, or a prefix of a bucket."""
    return str(tmp_path / "targets") if request.param == "local" else f"{request.getfixturevalue('bucket')}/targets"


def header_name(head: StoreHeader) -> str:
    return "shards/zarr.json" if head.format == "zarr" else "header.json"


def zeros(block: TargetBlock) -> TargetBlock:
    names = ("label_N", "code_KNST", "scale_KNS", "attention_KNL", "crop_KN4", "flip_KN")
    found: dict[str, Any] = {name: getattr(block, name) for name in names}
    return dataclasses.replace(block, **{n: None if v is None else np.zeros_like(v) for n, v in found.items()})


class TestContract:
    """What every format promises wherever it lies."""

    @pytest.mark.parametrize(("where", "store_format", "codec", "level"), LOCATIONS_OF_CODECS, indirect=INDIRECT)
    def test_what_goes_in_comes_out(self, where: str, store_format: str, codec: str, level: int) -> None:
        head = header(codec, format=store_format, zstd_level=level, shards=2)
        written = write_store(where, head, [131, 1])
        store = open_targets(where)
        assert store.header == head
        check_store(store, written)
        runs = [joined(written["000000"], view) for view in range(2)]
        for start, stop in ((0, 1), (127, 129), (65, 130), (128, 131), (130, 131), (5, 7), (0, 128)):
            for view in (1, 0):
                assert differences(store.read("000000", view, start, stop), runs[view], start, stop) == []

    def test_many_blocks_and_one_view(self, where: str, store_format: str) -> None:
        written = write_store(where, header(format=store_format, views=1), [257])
        store, run = open_targets(where), joined(written["000000"], 0)
        for start, stop in ((0, 257), (100, 240), (127, 129), (128, 256), (256, 257), (255, 257)):
            assert differences(store.read("000000", 0, start, stop), run, start, stop) == []

    def test_keys_of_any_kind(self, where: str, store_format: str) -> None:
        keys = ["a/b/c", "\u6f22\u5b57/\U0001f600", "long/" + "x" * 240, "\u00e9" * 60, "plain", " space ", "q'\"\\"]
        head = header(format=store_format)
        written = write_blocks(where, head, [random_blocks(head, len(keys), keys=keys)])
        check_store(open_targets(where), written)

    @pytest.mark.parametrize(("where", "store_format", "codec", "level"), LOCATIONS_OF_ZEROS, indirect=INDIRECT)
    def test_zeros_are_not_taken_for_lost_chunks(self, where: str, store_format: str, codec: str, level: int) -> None:
        head = header(codec, format=store_format, zstd_level=level)
        written = write_blocks(where, head, [[zeros(block) for block in random_blocks(head, 130)]])
        check_store(open_targets(where), written)

    def test_the_same_bytes_each_time(self, where: str, store_format: str, tmp_path: Path) -> None:
        """Many inner chunks a block: threads that race for the place in a shard would show."""
        head = header(format=store_format, width=1500)
        trees = []
        for number, folder in enumerate([tmp_path, tmp_path, where]):
            write_store(f"{folder}/{number}", head, [130])
            trees.append(tree(f"{folder}/{number}"))
        for other in trees[1:]:
            assert other.keys() == trees[0].keys()
            assert [path for path in other if other[path] != trees[0][path]] == []

    def test_unfinished_work_is_unseen_and_cleared_away(self, where: str, store_format: str) -> None:
        head = header(format=store_format, shards=2)
        written = write_store(f"{where}/whole", head, [130, 5])
        writer = TargetStoreWriter(f"{where}/t", head)
        commit(writer, "000000", written["000000"])
        half = writer.open_shard("000001")
        half.append(random_blocks(head, 128, 9)[0])
        assert list(writer.committed()) == ["000000"]
        with pytest.warns(RuntimeWarning, match="1 of 2"):
            check_store(open_targets(f"{where}/t"), {"000000": written["000000"]})
        again = TargetStoreWriter(f"{where}/t", head)
        commit(again, "000001", written["000001"])
        again.finish()
        assert tree(f"{where}/t") == tree(f"{where}/whole")
        assert not half._scratch.exists()

    def test_a_shard_that_is_forgotten_is_done_again(self, where: str, store_format: str) -> None:
        head = header(format=store_format, shards=2)
        written = write_store(where, head, [130, 5])
        before = tree(where)
        writer = TargetStoreWriter(where, head)
        writer.forget("000000")
        assert list(writer.committed()) == ["000001"]
        with pytest.warns(RuntimeWarning, match="1 of 2"):
            assert open_targets(where).shards == ("000001",)
        commit(writer, "000000", written["000000"])
        writer.finish()
        assert tree(where) == before

    def test_records_and_summary(self, where: str, store_format: str) -> None:
        head = header(format=store_format, shards=2)
        write_store(where, head, [130, 5])
        files, committed = tree(where), TargetStoreWriter(where, head).committed()
        for name, samples in (("000000", 130), ("000001", 5)):
            record = manifest.read_record(location_of(where), name)
            assert committed[name].source == record.source
            assert record.source == source(samples, f"train-{name}.tar", [("worse", "damaged")])
            folder = f"shards/{name}/"
            own = {path.removeprefix(folder): len(data) for path, data in files.items() if path.startswith(folder)}
            assert {path: file.bytes for path, file in record.files.items()} == own
        summary = json.loads(files["manifest.json"])["shards"]
        assert {name: (s["samples"], s["bad"]) for name, s in summary.items()} == {"000000": (130, 1), "000001": (5, 1)}
        assert [json.loads(line) for line in files["bad_samples.jsonl"].splitlines()] == [
            {"shard": name, "source": f"train-{name}.tar", "key": "worse", "reason": "damaged"} for name in committed
        ]

    def test_reads_of_what_is_not_there(self, where: str, store_format: str) -> None:
        write_store(where, header(format=store_format), [5])
        store = open_targets(where)
        for read in (
            ("000000", 2, 0, 1),
            ("000000", -1, 0, 1),
            ("000000", 0, 3, 3),
            ("000000", 0, 0, 6),
            ("x", 0, 0, 1),
        ):
            with pytest.raises(IndexError, match=read[0]):
                store.read(*read)

    def test_another_configuration_is_refused_and_the_first_ones_version_stays(
        self, where: str, store_format: str
    ) -> None:
        head = header(format=store_format)
        write_store(where, head, [3])
        before = tree(where)
        other = header("float16", format=store_format, views=3, grid=(2, 3), precision="bfloat16")
        with pytest.raises(MismatchError) as caught:
            TargetStoreWriter(where, other)
        for setting in ("teacher.grid", "teacher.precision", "views.count", "codec.name"):
            assert f"{setting}: store has" in str(caught.value)
        with pytest.raises(MismatchError, match="format"):
            TargetStoreWriter(where, header(format="webdataset" if store_format == "zarr" else "zarr"))
        TargetStoreWriter(where, head.model_copy(update={"package_version": "9"})).finish()
        assert tree(where) == before

    def test_a_store_that_names_no_renderer_is_pillows(
        self, where: str, store_format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As all that were written before there was a second one."""

        def without(self: StoreHeader, **options: Any) -> dict[str, Any]:
            found = pydantic.BaseModel.model_dump(self, **options)
            del found["views"]["renderer"]
            return found

        head = header(format=store_format)
        with monkeypatch.context() as patch:
            patch.setattr(StoreHeader, "model_dump", without)
            write_store(where, head, [3])
        assert b"renderer" not in location_of(where).read(header_name(head))
        store = open_targets(where)
        assert store.header == head
        assert len(store.read("000000", 1, 0, 3).keys) == 3
        other = head.model_copy(update={"views": head.views.model_copy(update={"renderer": "torch"})})
        with pytest.raises(MismatchError, match=r"views\.renderer: store has 'pillow', this run has 'torch'"):
            TargetStoreWriter(where, other)

    def test_a_store_that_does_not_say_how_its_teacher_is_built_agrees_with_any(
        self, where: str, store_format: str
    ) -> None:
        head = header(format=store_format)
        write_store(where, head, [3])
        said = [head.model_copy(update={"teacher": head.teacher.model_copy(update={"structure_sha256": 64 * digit})})
                for digit in "12"]  # fmt: skip
        TargetStoreWriter(where, said[0]).finish()
        assert open_targets(where).header == head
        assert header_differences(head, said[0]) == header_differences(said[0], head) == []
        (difference,) = header_differences(*said)
        assert difference.startswith("teacher.structure_sha256: store has '1111")

    def test_a_header_of_another_version_of_another_store_and_none(self, where: str, store_format: str) -> None:
        head = header(format=store_format)
        write_store(where, head, [3])
        before, location, name = tree(where), location_of(where), header_name(head)
        content = json.loads(location.read(name))
        content.get("attributes", content)["milan_pipe"]["schema_version"] = 99
        location.write(name, json.dumps(content).encode())
        for attempt in (open_targets, lambda root: TargetStoreWriter(root, head)):
            with pytest.raises(MismatchError, match="version 99"):
                attempt(where)
        TargetStoreWriter(f"{where}-other", header(format=store_format, weights_sha256="ef" * 32))
        location.write(name, tree(f"{where}-other")[name])
        with pytest.raises(DataError, match="digest"):
            open_targets(where)
        # One that is lost comes back, and no other.
        location.remove(name)
        with pytest.raises(DataError, match="not empty"):
            TargetStoreWriter(where, header(format=store_format, views=3))
        with pytest.raises((DataError, MissingError), match="extract-targets"):
            open_targets(where)
        TargetStoreWriter(where, head)
        assert tree(where) == before

    def test_what_cannot_be_committed_leaves_nothing(self, where: str, store_format: str) -> None:
        head = header(format=store_format)
        writer = TargetStoreWriter(where, head)
        for samples in (0, 4, 6):
            shard = writer.open_shard("000000")
            if samples:
                shard.append(random_blocks(head, 5)[0])
                assert any(shard._scratch.iterdir())
                # None follows a short one.
                with pytest.raises(StoreError, match="follow"):
                    shard.append(random_blocks(head, 5)[0])
            with pytest.raises(StoreError, match="announced"):
                shard.commit(source(samples))
            shard.discard()
            assert not shard._scratch.exists()
        assert writer.committed() == {}
        assert list(tree(where)) == [header_name(head)]

    def test_who_is_overtaken_fails_and_harms_nothing(self, where: str, store_format: str) -> None:
        """A worker that was taken for dead goes on writing while another does its shard."""
        head = header(format=store_format)
        blocks = random_blocks(head, 130)
        slow = TargetStoreWriter(where, head).open_shard("000000")
        slow.append(blocks[0])
        quick = TargetStoreWriter(where, head).open_shard("000000")
        quick.append(blocks[0])
        with pytest.raises(StoreError, match="removed"):  # noqa: PT012
            slow.append(blocks[1])
            slow.commit(source(130))
        slow.discard()
        quick.append(blocks[1])
        quick.commit(source(130))
        TargetStoreWriter(where, head).finish()
        check_store(open_targets(where), {"000000": blocks})

    def test_two_commit_one_shard_at_once(self, where: str, store_format: str) -> None:
        head = header(format=store_format)
        blocks = random_blocks(head, 130)
        writer = TargetStoreWriter(where, head)
        first = writer.open_shard("000000")
        for block in blocks:
            first.append(block)
        # Beginning the second would clear the first away; here both have come to the commit.
        kept = first._scratch.with_name("kept")
        first._scratch.rename(kept)
        second = writer.open_shard("000000")
        kept.rename(first._scratch)
        for block in blocks:
            second.append(block)
        threads = [threading.Thread(target=shard.commit, args=(source(130),)) for shard in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
        check_store(open_targets(where), {"000000": blocks})

    def test_a_file_that_vanishes_while_the_store_is_open(self, where: str, store_format: str) -> None:
        write_store(where, header(format=store_format), [130])
        store = open_targets(where)
        store.read("000000", 0, 0, 128)
        location_of(where).child("shards/000000").remove("features/c/1" if store_format == "zarr" else "view-1.tar")
        with pytest.raises(DataError, match="--redo"):
            store.read("000000", 1, 0, 128)

    def test_begun_and_not_there(self, where: str, store_format: str) -> None:
        with pytest.raises(MissingError, match="extract-targets"):
            open_targets(where)
        TargetStoreWriter(where, header(format=store_format))
        with pytest.raises(DataError, match="committed"):
            open_targets(where)

    def test_only_so_many_shards_stay_open_and_others_go_at_once(
        self, where: str, store_format: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("milan_pipe.targets.store._OPEN_SHARDS", 2)
        written = write_store(where, header(format=store_format, shards=3), [3] * 3)
        store = open_targets(where)
        check_store(store, written)
        check_store(store, written)
        assert list(store._open) == ["000001", "000002"]
        gc.disable()
        try:
            shard = weakref.ref(store._open["000001"])
            assert shard() is not None
            store.read("000000", 0, 0, 3)
            assert list(store._open) == ["000002", "000000"]
            assert shard() is None, "something leads back to it: its arrays stay until the garbage collector comes"
        finally:
            gc.enable()


# --- other readers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "level"), FEW_CODECS)
def test_zarr_alone_reads_a_zarr_store(tmp_path: Path, codec: str, level: int) -> None:
    blocks = write_store(tmp_path / "t", header(codec, zstd_level=level, width=70), [130])["000000"]
    fields = {
        "features": "code_NST",
        "scale": "scale_NS",
        "attention": "attention_NL",
        "crop": "crop_N4",
        "flip": "flip_N",
    }
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        group: Any = zarr.open_group(tmp_path / "t" / "shards" / "000000", mode="r")
        for view in range(2):
            run = joined(blocks, view)
            for name, field in fields.items():
                assert (name in group) == (getattr(run, field) is not None)
                if name in group:
                    np.testing.assert_array_equal(np.asarray(group[name][view]), getattr(run, field))
            np.testing.assert_array_equal(np.asarray(group["label"][...]), run.label_N)
            assert list(group["key"][...]) == run.keys
            offset, length = group["view_offset"][view, 129], group["view_length"][view, 129]
            assert bytes(group["view_bytes"][offset : offset + length]) == run.jpegs[129]


@pytest.mark.parametrize(("codec", "level"), FEW_CODECS)
def test_webdataset_alone_reads_each_tar(tmp_path: Path, codec: str, level: int) -> None:
    head = header(codec, format="webdataset", zstd_level=level)
    blocks = write_store(tmp_path / "t", head, [130])["000000"]
    packer = PackedCodes(codec_of(head.codec), head.tokens, head.teacher.width)
    plain = level == 0 and codec != "klt"
    for view in range(2):
        run = joined(blocks, view)
        path = tmp_path / "t" / "shards" / "000000" / f"view-{view}.tar"
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode("rgb8"))
        assert [sample["__key__"] for sample in samples] == run.keys
        for row, sample in enumerate(samples):
            np.testing.assert_array_equal(sample["jpg"], decode_jpeg(run.jpegs[row]))
            assert sample["json"] == {
                "key": run.keys[row],
                "label": run.label_N[row],
                "view": view,
                "crop": run.crop_N4[row].tolist(),
                "flip": run.flip_N[row],
            }
            np.testing.assert_array_equal(sample["attention.npy"], run.attention_NL[row])
            assert ("scale.npy" in sample) == (run.scale_NS is not None)
            if run.scale_NS is not None:
                np.testing.assert_array_equal(sample["scale.npy"], run.scale_NS[row])
            assert (("features.npy" in sample), ("features" in sample)) == (plain, not plain)
            code = np.empty_like(run.code_NST[0])
            if plain:
                code = sample["features.npy"]
            else:
                packer.unpack(sample["features"], code)
            assert code.dtype == run.code_NST.dtype
            np.testing.assert_array_equal(code, run.code_NST[row])


def test_members_of_a_tar_are_plain_files_in_a_fixed_order(tmp_path: Path) -> None:
    head = header(format="webdataset")
    keys = ["k", "long/" + "x" * 200]
    write_blocks(tmp_path / "t", head, [random_blocks(head, 2, keys=keys)])
    path = tmp_path / "t" / "shards" / "000000" / "view-0.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [
        f"{key}.{part}" for key in keys for part in ("jpg", "json", "features", "scale.npy", "attention.npy")
    ]
    assert {(m.isreg(), m.mode, m.mtime, m.uid, m.uname) for m in members} == {(True, 0o644, 0, 0, "")}
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


@pytest.mark.parametrize(("codec", "level"), FEW_CODECS)
def test_without_zarrs_the_values_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, level: int
) -> None:
    head = header(codec, zstd_level=level)
    fast = write_store(tmp_path / "fast", head, [130])
    true_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "zarrs":
            raise ImportError(name)
        return true_import(name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
            with pytest.warns(RuntimeWarning, match="not installed"):
                slow = write_store(tmp_path / "slow", head, [130])
            check_store(open_targets(tmp_path / "fast"), fast)
    check_store(open_targets(tmp_path / "slow"), slow)


@pytest.mark.timeout(60)
def test_a_thread_that_zarr_does_not_get_is_an_error_and_no_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_start = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "zarr_io":
            raise RuntimeError("can't start new thread")
        true_start(self)

    zarr_sync.reset_resources_after_fork()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                write_store(tmp_path / "t", header(), [5])
    written = write_store(tmp_path / "u", header(), [5])
    check_store(open_targets(tmp_path / "u"), written)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_differences_name_both_values_and_cut_long_ones(tmp_path: Path) -> None:
    found, expected = header("klt", width=12), header(views=3, weights_sha256="ef" * 32, width=12)
    assert header_differences(found, found.model_copy(update={"package_version": "9"})) == []
    differing = header_differences(found, expected)
    assert differing[:3] == [
        f"teacher.weights_sha256: store has {'ab' * 32!r}, this run has {'ef' * 32!r}",
        "views.count: store has 2, this run has 3",
        "codec.name: store has 'klt', this run has 'int8'",
    ]
    assert any("codec.basis" in line and "characters" in line and len(line) < 250 for line in differing)
    with pytest.raises(MismatchError) as caught:
        require_same_header(found, expected, tmp_path)
    assert all(line in str(caught.value) for line in [str(tmp_path), *differing])


@pytest.mark.parametrize("value", [None, [1], "text", 7])
def test_header_of_another_kind(tmp_path: Path, value: Any) -> None:
    (tmp_path / "zarr.json").write_text(json.dumps({"attributes": {"milan_pipe": value}}))
    with pytest.raises(DataError, match="header"):
        open_targets(tmp_path)


def test_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither"):
        open_targets(tmp_path)
    zarr.create_group(tmp_path / "other", zarr_format=3, attributes={"x": 1})
    with pytest.raises(DataError, match="header"):
        open_targets(tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        TargetStoreWriter(tmp_path / "mine", header())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_location_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file" / "targets", tmp_path / "file"):
        with pytest.raises(StoreError, match="file"):
            TargetStoreWriter(root, header())


@pytest.mark.parametrize("name", ["zarr", "webdataset"])
def test_a_full_disk_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    head = header(format=name)
    shard = TargetStoreWriter(tmp_path / "t", head).open_shard("000000")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard._files, "append", full)
    with pytest.raises(StoreError, match="space"):
        shard.append(random_blocks(head, 3)[0])


def test_nothing_is_written_after_a_shard_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zarr writes several files at once: one fails, and another, on a slow disk, makes its folders only later."""
    head = header(format="zarr")
    shard = TargetStoreWriter(tmp_path / "t", head).open_shard("000000")
    shard.append(random_blocks(head, 3)[0])
    exists, put = LocalStore.exists, LocalStore.set

    async def slow(store: LocalStore, key: str) -> bool:
        await asyncio.sleep(0.3)
        return await exists(store, key)

    async def full(store: LocalStore, key: str, value: object) -> None:
        if key == "crop/zarr.json":
            raise OSError(28, "No space left on device")
        await put(store, key, value)

    monkeypatch.setattr(LocalStore, "exists", slow)
    monkeypatch.setattr(LocalStore, "set", full)
    with pytest.raises(StoreError, match="space"):
        shard.commit(source(3))
    shard.discard()
    wait_for_writes()
    assert not shard._scratch.exists()


def test_an_unfinished_header_is_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "t"
    root.mkdir()
    (root / (".partial-zarr.json-" + "0" * 32)).write_text('{"half')
    written = write_store(root, header(), [3])
    check_store(open_targets(root), written)
    found = sorted(path.name for path in root.iterdir())
    assert found == ["bad_samples.jsonl", "manifest", "manifest.json", "shards"]


def test_a_finished_store_opens_without_a_warning(tmp_path: Path) -> None:
    written = write_store(tmp_path / "t", header(), [3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_store(open_targets(tmp_path / "t"), written)
