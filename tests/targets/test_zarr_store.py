"""The store: what goes in comes out, damage is named, half-written work is unseen, other configurations are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, StoreError
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
    header_differences,
    require_same_header,
)
from milan_pipe.targets.zarr_store import ZarrTargetReader, ZarrTargetWriter

ARRAYS = ("features", "scale", "attention", "crop", "flip", "view_bytes", "view_offset", "view_length", "label", "key")


def header(views=2, codec="int8", **teacher):
    info = {"model": "demo", "pretrained": None, "weights_sha256": "ab" * 32, "normalization": "clip"}
    return StoreHeader(
        package_version="0.test",
        teacher=TeacherInfo(**{**info, "image_size": 16, "grid": (2, 2), "width": 6, **teacher}),
        views=ViewInfo(count=views, size=16, scale=(0.2, 1), ratio=(0.75, 1.25), flip=0.5, seed=3, jpeg_quality=95),
        codec=CodecInfo(name=codec),
        source=SourceInfo(shards=1, fingerprint="f" * 64),
    )


def random_blocks(head, samples, seed=0):
    rng = np.random.default_rng(seed)
    k, s, t = head.views.count, head.tokens, head.teacher.width
    for start in range(0, samples, BLOCK_SAMPLES):
        n = min(BLOCK_SAMPLES, samples - start)
        int8 = head.codec.name == "int8"
        code = rng.integers(-127, 128, (k, n, s, t), np.int8) if int8 else rng.normal(size=(k, n, s, t))
        yield TargetBlock(
            keys=[f"dir/k\u00e9y-{start + i}" for i in range(n)],
            label_N=rng.integers(-1, 9, n),
            code_KNST=code if int8 else code.astype(np.float16),
            scale_KNS=rng.random((k, n, s)).astype(np.float16) if int8 else None,
            attention_KNL=rng.random((k, n, head.patches)).astype(np.float16),
            crop_KN4=rng.integers(0, 500, (k, n, 4), np.int32),
            flip_KN=rng.random((k, n)) < 0.5,
            jpegs=[[rng.bytes(int(rng.integers(1, 60))) for _ in range(n)] for _ in range(k)],
        )


def source(samples, bad=()):
    return SourceShard(name="train-000000.tar", bytes=123, samples=samples, bad=tuple(bad))


def write(root, head, samples, name="000000", seed=0):
    writer = ZarrTargetWriter(root, head)
    shard = writer.open_shard(name)
    blocks = list(random_blocks(head, samples, seed))
    for block in blocks:
        shard.append(block)
    shard.commit(source(samples, [("worse", "damaged")]))
    writer.finish()
    return blocks


def read_all(root):
    reader = ZarrTargetReader(root)
    return [
        reader.read(shard, view, 0, reader.samples(shard))
        for shard in reader.shards
        for view in range(reader.header.views.count)
    ]


def same_runs(left, right):
    return len(left) == len(right) and all(
        list(a.keys) == list(b.keys)
        and list(a.jpegs) == list(b.jpegs)
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for name in ("label_N", "code_NST", "scale_NS", "attention_NL", "crop_N4", "flip_N")
        )
        for a, b in zip(left, right, strict=True)
    )


def check_run(run, blocks, view, start, stop):
    def joined(name, axis=1):
        return np.concatenate([getattr(block, name) for block in blocks], axis=axis)

    assert list(run.keys) == [key for block in blocks for key in block.keys][start:stop]
    np.testing.assert_array_equal(run.label_N, joined("label_N", 0)[start:stop])
    np.testing.assert_array_equal(run.code_NST, joined("code_KNST")[view, start:stop])
    assert run.code_NST.dtype == blocks[0].code_KNST.dtype
    if blocks[0].scale_KNS is None:
        assert run.scale_NS is None
    else:
        np.testing.assert_array_equal(run.scale_NS, joined("scale_KNS")[view, start:stop])
    np.testing.assert_array_equal(run.attention_NL, joined("attention_KNL")[view, start:stop])
    np.testing.assert_array_equal(run.crop_N4, joined("crop_KN4")[view, start:stop])
    np.testing.assert_array_equal(run.flip_N, joined("flip_KN")[view, start:stop])
    assert list(run.jpegs) == [jpeg for block in blocks for jpeg in block.jpegs[view]][start:stop]


# --- round trip ---------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.sampled_from([1, 2, 127, 128, 129, 300]),
    views=st.integers(1, 3),
    codec=st.sampled_from(["int8", "float16"]),
    cut=st.tuples(st.floats(0, 0.999), st.floats(0, 1)),
)
def test_round_trip(tmp_path_factory, samples, views, codec, cut):
    root = tmp_path_factory.mktemp("store") / "targets"
    head = header(views, codec)
    blocks = write(root, head, samples)
    reader = ZarrTargetReader(root)
    assert reader.header == head
    assert reader.shards == ("000000",)
    assert reader.samples("000000") == samples
    start = int(cut[0] * samples)
    stop = start + 1 + int(cut[1] * (samples - start - 1))
    for view in range(views):
        check_run(reader.read("000000", view, 0, samples), blocks, view, 0, samples)
        check_run(reader.read("000000", view, start, stop), blocks, view, start, stop)
    shutil.rmtree(root.parent)


def test_any_zarr_reader_opens_it(tmp_path):
    blocks = write(tmp_path / "t", header(), 130)
    plain = "zarr.core.codec_pipeline.BatchedCodecPipeline"
    with zarr.config.set({"codec_pipeline.path": plain}):
        group = zarr.open_group(tmp_path / "t" / "000000", mode="r")
        assert set(group.array_keys()) == set(ARRAYS)
        for name, field, axis in (
            ("features", "code_KNST", 1),
            ("scale", "scale_KNS", 1),
            ("attention", "attention_KNL", 1),
            ("crop", "crop_KN4", 1),
            ("flip", "flip_KN", 1),
            ("label", "label_N", 0),
        ):
            expected = np.concatenate([getattr(block, field) for block in blocks], axis=axis)
            np.testing.assert_array_equal(np.asarray(group[name][...]), expected)
        assert list(group["key"][...]) == [key for block in blocks for key in block.keys]
        offset, length = group["view_offset"][1, 129], group["view_length"][1, 129]
        assert bytes(group["view_bytes"][offset : offset + length]) == blocks[1].jpegs[1][1]


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_writing_again_gives_the_same_bytes(tmp_path):
    """Sixteen inner chunks a block: threads that race for the place in a shard would show."""
    head = header(width=1500)
    trees = []
    for name in "abcdef":
        write(tmp_path / name, head, 150)
        trees.append(tree(tmp_path / name))
    for other in trees[1:]:
        assert other.keys() == trees[0].keys()
        assert [path for path in other if other[path] != trees[0][path]] == []


def test_all_zeros_are_stored_and_read(tmp_path):
    """A store without any flip and of label 0 alone is whole: nothing of it is taken for a lost chunk."""
    head = header()
    (block,) = random_blocks(head, 3)
    zeros = {
        name: np.zeros_like(getattr(block, name))
        for name in ("label_N", "scale_KNS", "attention_KNL", "crop_KN4", "flip_KN")
    }
    writer = ZarrTargetWriter(tmp_path / "t", head)
    shard = writer.open_shard("000000")
    shard.append(dataclasses.replace(block, **zeros))
    shard.commit(source(3))
    for run in read_all(tmp_path / "t"):
        assert not run.flip_N.any()
        assert not run.label_N.any()


@pytest.mark.parametrize(("start", "stop"), [(65, 129), (127, 129), (128, 129), (0, 257), (255, 257)])
def test_run_that_ends_one_past_a_block(tmp_path, start, stop):
    blocks = write(tmp_path / "t", header(), 300)
    check_run(ZarrTargetReader(tmp_path / "t").read("000000", 1, start, stop), blocks, 1, start, stop)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "targets"
    write(root, header(), 130)
    return root


@pytest.fixture
def copy(store, tmp_path):
    shutil.copytree(store, tmp_path / "targets")
    return tmp_path / "targets"


def chunks(root, name):
    return sorted(path for path in (root / "000000" / name / "c").rglob("*") if path.is_file())


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def refusal(root, good):
    """What the reader says of a damaged store; None where it gave the true data."""
    try:
        assert same_runs(read_all(root), good)
    except MilanError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ARRAYS)
def test_flipped_byte(store, copy, name):
    """Reads take parts of chunks, whole chunks, and chunks that reach over the array's end: all must be checked."""
    path, good = chunks(copy, name)[-1], read_all(store)
    whole = path.read_bytes()
    refused = 0
    positions = np.linspace(0, len(whole) - 1, 40).astype(int).tolist()
    for position in positions:
        flip(path, position)
        # A byte that says nothing, as a reserved bit, may change without harm; wrong data never comes out.
        message = refusal(copy, good)
        if message is not None:
            refused += 1
            assert all(part in message for part in ("000000", repr(name), "extract-targets"))
        path.write_bytes(whole)
    assert refused >= len(positions) - 3
    flip(path, len(whole) // 3)
    reader = ZarrTargetReader(copy)
    with pytest.raises(DataError, match=repr(name)):
        [reader.read("000000", view, start, start + 1) for view, start in itertools.product((0, 1), range(130))]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("fault", ["cut", "emptied", "deleted", "no metadata", "broken metadata"])
def test_lost_bytes(copy, name, fault):
    path = chunks(copy, name)[-1]
    meta = copy / "000000" / name / "zarr.json"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "emptied":
        path.write_bytes(b"")
    elif fault == "deleted":
        path.unlink()
    elif fault == "no metadata":
        meta.unlink()
    else:
        meta.write_text("{")
    with pytest.raises(DataError, match=rf"000000.*{name!r}.*extract-targets"):
        read_all(copy)


@pytest.mark.parametrize("name", ["features", "view_bytes", "attention", "key"])
def test_damaged_metadata_never_gives_wrong_data(store, copy, name):
    path = copy / "000000" / name / "zarr.json"
    whole, good = path.read_bytes(), read_all(store)
    rng = np.random.default_rng(1)
    refused = 0
    for position in rng.choice(len(whole), 60, replace=False):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            assert same_runs(read_all(copy), good), (position, bytes(changed[position - 20 : position + 20]))
        except MilanError:
            refused += 1
    assert refused > 10


def test_short_view_bytes(copy):
    path = copy / "000000" / "view_bytes" / "zarr.json"
    meta = json.loads(path.read_text())
    meta["shape"] = [meta["shape"][0] - 1]
    path.write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"'view_bytes' is damaged: its shape"):
        read_all(copy)


def test_broken_shard_attributes(copy):
    (copy / "000000" / "zarr.json").write_text("{}")
    with pytest.raises(DataError, match=r"000000.*remove this folder"):
        ZarrTargetReader(copy)


# --- commit -------------------------------------------------------------------------------------------------------


def test_half_written_shard_is_invisible_and_cleaned(tmp_path):
    root, head = tmp_path / "t", header()
    write(root, head, 5)
    writer = ZarrTargetWriter(root, head)
    shard = writer.open_shard("000001")
    shard.append(next(random_blocks(head, 5)))
    assert ZarrTargetReader(root).shards == ("000000",)
    assert list(writer.committed()) == ["000000"]
    left = [path for path in root.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    again = ZarrTargetWriter(root, head)
    assert not left[0].exists()
    retry = again.open_shard("000001")
    retry.append(next(random_blocks(head, 3)))
    retry.commit(source(3))
    assert ZarrTargetReader(root).samples("000001") == 3


def test_discard_leaves_nothing(tmp_path):
    writer = ZarrTargetWriter(tmp_path / "t", header())
    shard = writer.open_shard("000000")
    shard.append(next(random_blocks(header(), 5)))
    shard.discard()
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["zarr.json"]


@pytest.mark.parametrize("samples", [0, 4, 6])
def test_commit_of_another_count_is_refused(tmp_path, samples):
    writer = ZarrTargetWriter(tmp_path / "t", header())
    shard = writer.open_shard("000000")
    if samples:
        shard.append(next(random_blocks(header(), 5)))
    with pytest.raises(StoreError, match="written"):
        shard.commit(source(samples))
    assert writer.committed() == {}


def test_no_block_after_a_short_one(tmp_path):
    shard = ZarrTargetWriter(tmp_path / "t", header()).open_shard("000000")
    shard.append(next(random_blocks(header(), 5)))
    with pytest.raises(StoreError, match="cannot follow 5"):
        shard.append(next(random_blocks(header(), 5)))


def test_killed_while_the_header_was_written(tmp_path):
    root = tmp_path / "t"
    root.mkdir()
    (root / "zarr.0123456789abcdef.partial").write_text('{"half')
    write(root, header(), 3)
    assert ZarrTargetReader(root).samples("000000") == 3
    assert sorted(path.name for path in root.iterdir()) == ["000000", "bad_samples.jsonl", "zarr.json"]


def test_bad_samples_file(tmp_path):
    write(tmp_path / "t", header(), 3)
    lines = (tmp_path / "t" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"shard": "000000", "source": "train-000000.tar", "key": "worse", "reason": "damaged"}
    ]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_differences_name_both_values(tmp_path):
    found, expected = header(views=2), header(views=3, codec="float16", weights_sha256="cd" * 32)
    assert header_differences(found, found.model_copy(update={"package_version": "9"})) == []
    told = header_differences(found, expected)
    assert told == [
        f"teacher.weights_sha256: store has {'ab' * 32!r}, this run has {'cd' * 32!r}",
        "views.count: store has 2, this run has 3",
        "codec.name: store has 'int8', this run has 'float16'",
    ]
    with pytest.raises(MismatchError) as caught:
        require_same_header(found, expected, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(line in str(caught.value) for line in told)


@pytest.mark.parametrize(
    "other", [header(views=3), header(codec="float16"), header(grid=(2, 3)), header(normalization="imagenet")]
)
def test_writer_refuses_another_configuration(store, other):
    with pytest.raises(MismatchError, match=r"store has .* this run has"):
        ZarrTargetWriter(store, other)


def change_header(root, change):
    meta = json.loads((root / "zarr.json").read_text())
    change(meta["attributes"])
    (root / "zarr.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("open_store", [ZarrTargetReader, lambda root: ZarrTargetWriter(root, header())])
def test_another_schema_version(copy, open_store):
    change_header(copy, lambda attributes: attributes["milan_pipe"].update(schema_version=99))
    with pytest.raises(MismatchError, match=r"schema version 99.* reads 1"):
        open_store(copy)


@pytest.mark.parametrize("value", [None, [1], "text", 7])
def test_header_of_another_kind(copy, value):
    change_header(copy, lambda attributes: attributes.update(milan_pipe=value))
    with pytest.raises(DataError, match="not the header of a target store"):
        ZarrTargetReader(copy)


def test_not_a_store(tmp_path):
    with pytest.raises(MissingError, match="extract-targets"):
        ZarrTargetReader(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a target store"):
        ZarrTargetReader(tmp_path)
    zarr.create_group(tmp_path / "other", zarr_format=3, attributes={"x": 1})
    with pytest.raises(DataError, match="not the header"):
        ZarrTargetReader(tmp_path / "other")
    ZarrTargetWriter(tmp_path / "begun", header())
    with pytest.raises(DataError, match="no committed shard"):
        ZarrTargetReader(tmp_path / "begun")


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not a target store"):
        ZarrTargetWriter(tmp_path, header())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be made"):
        ZarrTargetWriter(tmp_path / "file" / "targets", header())
    with pytest.raises(StoreError, match="cannot be made"):
        ZarrTargetWriter(tmp_path / "file", header())
