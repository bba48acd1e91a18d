"""The reader of single files beside zarr's own: the same values, and every flipped byte is seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from milan_pipe.targets.mapped_array import MappedArray, decode_column, local_file


def mapped_array(folder, metadata):
    return MappedArray.of(lambda path: local_file(folder / path), metadata)


def read_column(folder, metadata):
    path = folder / "c" / "0"
    return decode_column(path.read_bytes() if path.exists() else None, metadata)


ZSTD, CRC = ZstdCodec(level=1, checksum=True), Crc32cCodec()
SAMPLES = 21
KINDS = {
    "raw, one row a chunk": {"shape": (2, SAMPLES, 3, 5), "chunks": (1, 1, 3, 5), "shards": (1, 16, 3, 5)},
    "zstd, rows in chunks": {"shape": (2, SAMPLES, 3, 5), "chunks": (1, 4, 3, 5), "shards": (1, 16, 3, 5)},
    "all views in a shard": {"shape": (2, SAMPLES, 5), "chunks": (1, 8, 5), "shards": (2, 24, 5)},
    "no tail": {"shape": (2, SAMPLES), "chunks": (1, 8), "shards": (2, 24)},
    "flat": {"shape": (SAMPLES,), "chunks": (4,), "shards": (8,)},
}


def make(folder, layout, dtype="int8", compressors=(ZSTD, CRC), seed=0):
    array = zarr.create_array(folder, dtype=dtype, filters=None, compressors=compressors, **layout)
    values = np.random.default_rng(seed).integers(0, 3, layout["shape"])
    values[..., 5:9] = 0
    array[...] = values.astype(dtype)
    metadata = json.loads((folder / "zarr.json").read_text())
    return np.asarray(array[...]), mapped_array(folder, metadata)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    root = tmp_path_factory.mktemp("arrays")
    made = {}
    for kind, layout in KINDS.items():
        for dtype in ("int8", "float16", "int64", "bool"):
            compressors = (CRC,) if kind.startswith("raw") else (ZSTD, CRC)
            made[kind, dtype] = make(root / f"{kind}-{dtype}", layout, dtype, compressors)
    return made


@pytest.mark.parametrize("dtype", ["int8", "float16", "int64", "bool"])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_values_are_zarrs(arrays, kind, dtype, data):
    values, mapped = arrays[kind, dtype]
    start = data.draw(st.integers(0, SAMPLES - 1))
    stop = data.draw(st.integers(start + 1, SAMPLES))
    view = data.draw(st.integers(0, 1)) if values.ndim > 1 else 0
    found = mapped.rows(view, start, stop)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[view, start:stop] if values.ndim > 1 else values[start:stop])


@pytest.mark.parametrize("compressors", [(CRC,), (ZSTD, CRC)], ids=["raw", "zstd"])
def test_every_flipped_byte_is_seen(tmp_path, compressors):
    layout = {"shape": (1, 4, 6), "chunks": (1, 1, 6), "shards": (1, 4, 6)}
    zarr.create_array(tmp_path / "a", dtype="int8", filters=None, compressors=compressors, **layout)[...] = 7
    path = tmp_path / "a" / "c" / "0" / "0" / "0"
    metadata, data = json.loads((tmp_path / "a" / "zarr.json").read_text()), path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            mapped_array(tmp_path / "a", metadata).rows(0, 0, 4)
    for size in (1, 20, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"checksum|its index alone needs"):
            mapped_array(tmp_path / "a", metadata).rows(0, 0, 4)


def test_rows_that_lie_in_a_row_are_read_only_and_not_copied_again(arrays):
    _, mapped = arrays["raw, one row a chunk", "int8"]
    rows = mapped.rows(1, 16, 20)
    assert not rows.flags.writeable
    assert not rows.flags.owndata


@pytest.mark.parametrize(
    ("layout", "compressors"),
    [
        ({"shape": (1, 4, 6), "chunks": (1, 1, 3), "shards": (1, 4, 6)}, (ZSTD, CRC)),
        ({"shape": (1, 4, 6), "chunks": (1, 1, 6)}, (ZSTD, CRC)),
        ({"shape": (1, 4, 6), "chunks": (1, 1, 6), "shards": (1, 4, 6)}, (BloscCodec(), CRC)),
        ({"shape": (1, 4, 6), "chunks": (1, 1, 6), "shards": (1, 4, 6), "fill_value": 1}, (CRC,)),
    ],
    ids=["coefficient chunks", "no shards", "another coder", "another fill value"],
)
def test_other_arrays_are_left_to_zarr(tmp_path, layout, compressors):
    zarr.create_array(tmp_path / "a", dtype="int8", filters=None, compressors=compressors, **layout)
    assert mapped_array(tmp_path / "a", json.loads((tmp_path / "a" / "zarr.json").read_text())) is None


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20))
@settings(deadline=None, max_examples=30)
def test_columns(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("column")
    layout = {"shape": (len(keys),), "chunks": (len(keys),), "filters": None, "compressors": (ZSTD, CRC)}
    for name, values, dtype in (("key", np.array(keys, object), str), ("label", np.zeros(len(keys), int), np.int64)):
        array = zarr.create_array(folder / name, dtype=dtype, **layout)
        array[...] = values
        found = read_column(folder / name, json.loads((folder / name / "zarr.json").read_text()))
        assert found.tolist() == values.tolist()
    path = folder / "key" / "c" / "0"
    if not path.exists():
        return
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="checksum"):
        read_column(folder / "key", json.loads((folder / "key" / "zarr.json").read_text()))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_pieces_are_runs_of_bytes(tmp_path_factory, data):
    size, chunk = 40, data.draw(st.sampled_from([1, 3, 8]))
    folder = tmp_path_factory.mktemp("bytes")
    layout = {"shape": (size,), "chunks": (chunk,), "shards": (3 * chunk,)}
    values, mapped = make(folder, layout, "uint8", compressors=(CRC,))
    starts = data.draw(st.lists(st.integers(0, size), min_size=1, max_size=6))
    sizes = [data.draw(st.integers(0, size - start)) for start in starts]
    found = mapped.pieces(starts, sizes)
    assert [bytes(piece) for piece in found] == [
        values[start : start + count].tobytes() for start, count in zip(starts, sizes, strict=True)
    ]
