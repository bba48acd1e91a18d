"""`milan_pipe.open_targets`: every way to read gives what was written."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.targets import header, joined, write_store
from torch.utils.data import DataLoader

import milan_pipe
from milan_pipe.errors import DataError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.targets.codec import codec_of

SIZES = [3, 130, 1]
CODECS = [("zarr", "int8"), ("zarr", "float16"), ("zarr", "klt"), ("webdataset", "int8"), ("webdataset", "klt")]


@pytest.fixture(scope="module", params=CODECS, ids="-".join)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    store_format, codec = request.param
    where = tmp_path_factory.mktemp("targets") / "t"
    head = header(codec, format=store_format, shards=len(SIZES), views=3)
    return where, head, write_store(where, head, SIZES)


def features(head, run) -> np.ndarray:  # type: ignore[no-untyped-def]
    scale = None if run.scale_NS is None else torch.from_numpy(run.scale_NS)
    return codec_of(head.codec).decode(torch.from_numpy(run.code_NST), scale).float().numpy()


def test_every_sample_and_view_by_number_and_by_key(written: tuple) -> None:
    where, head, shards = written
    targets = milan_pipe.open_targets(where)
    assert (len(targets), targets.views, targets.grid, targets.width) == (134, 3, (2, 2), 6)
    assert targets.header == head
    number = 0
    for blocks in shards.values():
        runs = [joined(blocks, view) for view in range(3)]
        for row in range(len(runs[0].keys)):
            if row in (0, 1, 2, 127, 128, 129):
                for view, run in enumerate(runs):
                    found = targets[number, view]
                    assert (found.key, found.view) == (run.keys[row], view)
                    assert found.label == (None if run.label_N[row] < 0 else run.label_N[row])
                    assert np.array_equal(found.features_ST, features(head, run)[row])
                    assert np.array_equal(found.attention_L, run.attention_NL[row].astype(np.float32))
                    assert np.array_equal(found.pixels_HWC, decode_jpeg(run.jpegs[row]))
                    assert found.crop == tuple(run.crop_N4[row])
                    assert found.flip is bool(run.flip_N[row])
                by_key = targets[runs[0].keys[row], 2]
                assert (by_key.key, by_key.view) == (runs[2].keys[row], 2)
                assert targets[number - len(targets)].key == runs[0].keys[row]
            number += 1
    keys = [key for blocks in shards.values() for key in joined(blocks, 0).keys]
    assert list(targets.keys()) == keys
    assert keys[5] in targets
    assert "nothing" not in targets
    assert 5 not in targets
    assert [one.key for one in targets] == keys


def test_dask_has_the_same_values_in_chunks_of_a_block(written: tuple) -> None:
    where, head, shards = written
    arrays = milan_pipe.open_targets(where).as_dask()
    runs = [[joined(blocks, view) for blocks in shards.values()] for view in range(3)]
    assert arrays.features.shape == (3, 134, 5, 6)
    assert arrays.features.chunks[:2] == ((1, 1, 1), (3, 128, 2, 1))
    found = arrays.features.compute(scheduler="threads")
    assert np.array_equal(found, np.stack([np.concatenate([features(head, run) for run in view]) for view in runs]))
    for name, field in (("attention", "attention_NL"), ("crop", "crop_N4"), ("flip", "flip_N")):
        expected = np.stack([np.concatenate([getattr(run, field) for run in view]) for view in runs])
        assert np.array_equal(
            getattr(arrays, name).compute(scheduler="threads"),
            expected.astype(found.dtype) if name == "attention" else expected,
        )
    assert arrays.key.compute(scheduler="threads").tolist() == [key for run in runs[0] for key in run.keys]
    assert np.array_equal(arrays.label.compute(scheduler="threads"), np.concatenate([r.label_N for r in runs[0]]))
    assert arrays.features.name == milan_pipe.open_targets(where).as_dask().features.name


def test_a_data_loader_of_processes_gives_every_sample_once(tmp_path: Path) -> None:
    where = tmp_path / "t"
    write_store(where, header(shards=len(SIZES), views=3), SIZES)
    dataset = milan_pipe.open_targets(where).as_torch_dataset()
    views = {}
    for epoch in range(3):
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=32, num_workers=1, multiprocessing_context="spawn")
        batches = list(loader) if epoch == 0 else [dataset[number] for number in (0, 3, 133, -1)]
        if epoch == 0:
            assert [key for batch in batches for key in batch["key"]] == list(dataset.targets.keys())
            assert batches[0]["pixels"].shape == (32, 3, 16, 16)
            assert batches[0]["features"].dtype == torch.float32
        views[epoch] = [dataset[number]["view"] for number in (0, 3, 133)]
    assert all(sorted(views[epoch][at] for epoch in range(3)) == [0, 1, 2] for at in range(3))
    fixed = milan_pipe.open_targets(where).as_torch_dataset(view=2, transform=lambda target: (target.key, target.view))
    assert fixed[-1] == (list(dataset.targets.keys())[-1], 2)


def test_views_of_an_epoch_are_those_that_pretrain_reads(written: tuple) -> None:
    from milan_pipe.loader.order import EpochOrder

    dataset = milan_pipe.open_targets(written[0]).as_torch_dataset(seed=7)
    order = EpochOrder(samples=tuple(SIZES), views=3, block=128, shuffle_blocks=16, seed=7)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        shown = {block.shard: block.view for block in order.blocks(epoch)}
        assert [dataset[number]["view"] for number in (2, 3, 132, 133)] == [shown[0], shown[1], shown[1], shown[2]]


def test_a_pickled_store_is_opened_anew(written: tuple) -> None:
    targets = milan_pipe.open_targets(written[0])
    again = pickle.loads(pickle.dumps(targets))
    assert again[3].key == targets[3].key
    assert "134 samples, 3 views, teacher 'demo', grid 2 x 2" in repr(again)


@settings(max_examples=30, deadline=None)
@given(st.integers(-134, 133))
def test_locations_are_those_of_the_shards_end_to_end(number: int) -> None:
    targets = milan_pipe.Targets.__new__(milan_pipe.Targets)
    targets._ends = list(np.cumsum(SIZES))
    shard, row = targets.location(number)
    assert sum(SIZES[:shard]) + row == number % 134
    assert 0 <= row < SIZES[shard]


def test_damage_is_told_where_it_is_read(written: tuple, tmp_path: Path) -> None:
    where, _, _ = written
    shutil.copytree(where, tmp_path / "t")
    file = max(
        (tmp_path / "t" / "shards" / "000001").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    arrays = milan_pipe.open_targets(tmp_path / "t").as_dask()
    with pytest.raises(DataError, match="000001"):
        arrays.features.compute(scheduler="synchronous")
