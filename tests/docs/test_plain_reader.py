"""The store's page is exact enough: a reader that knows nothing else reads what was written, and notices damage."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.targets import header, write_store

from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import TargetBlock

STORES = [
    ("zarr", "int8", 1),
    ("zarr", "float16", 1),
    ("zarr", "klt", 1),
    ("zarr", "int8", 0),
    ("webdataset", "int8", 1),
    ("webdataset", "float16", 1),
    ("webdataset", "klt", 1),
    ("webdataset", "float16", 0),
]


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    path = Path(__file__).parent / "plain_reader.py"
    spec = importlib.util.spec_from_file_location("plain_reader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_reader"] = module
    spec.loader.exec_module(module)
    assert "milan_pipe" not in path.read_text().replace('"milan_pipe"', "")
    return module


def shape_of(block: TargetBlock) -> tuple[int, int]:
    return len(block.jpegs), len(block.keys)


@pytest.mark.parametrize(("store_format", "codec", "zstd_level"), STORES)
def test_it_reads_what_was_written(
    reader: ModuleType, tmp_path: Path, store_format: str, codec: str, zstd_level: int
) -> None:
    """Keys with folders and letters beyond ASCII, a block that is full and one that is not, no label, bad samples."""
    head = header(codec, format=store_format, zstd_level=zstd_level, shards=2, width=40)
    written = write_store(tmp_path / "t", head, [130, 3])
    found = iter(reader.read_store(tmp_path / "t").samples)
    decode = codec_of(head.codec).decode
    for shard, blocks in written.items():
        for view in range(head.views.count):
            for block in blocks:
                scale = None if block.scale_KNS is None else torch.from_numpy(block.scale_KNS[view])
                features = decode(torch.from_numpy(block.code_KNST[view]), scale).float().numpy()
                for row, key in enumerate(block.keys):
                    sample = next(found)
                    assert (sample.shard, sample.view, sample.key) == (shard, view, key)
                    assert sample.label == block.label_N[row]
                    assert sample.crop == tuple(block.crop_KN4[view, row])
                    assert sample.flip == block.flip_KN[view, row]
                    assert sample.jpeg == bytes(block.jpegs[view][row])
                    np.testing.assert_array_equal(sample.attention, block.attention_KNL[view, row].astype(np.float32))
                    np.testing.assert_allclose(sample.features, features[row], rtol=1e-5, atol=1e-6)
    assert next(found, None) is None


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_it_names_a_file_that_is_damaged(reader: ModuleType, tmp_path: Path, store_format: str) -> None:
    write_store(tmp_path / "t", header(format=store_format), [3])
    for path in sorted(path for path in (tmp_path / "t").rglob("*") if path.is_file() and path.stat().st_size):
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.json|\.tar|/c/"):
            reader.read_store(tmp_path / "t")
        path.write_bytes(data)
    reader.read_store(tmp_path / "t")
