"""Batches: the right values under each key, none twice, and threads that end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from milan_pipe.background import Background
from milan_pipe.errors import DataError
from milan_pipe.images.views import decode_jpeg, encode_jpeg
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Batch, Loader
from milan_pipe.targets.schema import CodecInfo, SourceInfo, StoreHeader, TeacherInfo, ViewInfo, ViewRun

PATCHES, WIDTH, VIEWS, SIZE = 4, 3, 2, 16


class MemoryReader:
    """A target store in memory; every value names its shard, view and row."""

    def __init__(self, sizes: tuple[int, ...], *, with_scale: bool = True) -> None:
        self.header = StoreHeader(
            package_version="0",
            teacher=TeacherInfo(
                model="demo",
                pretrained=None,
                weights_sha256="0",
                normalization="clip",
                precision="float32",
                image_size=SIZE,
                grid=(2, 2),
                width=WIDTH,
            ),
            views=ViewInfo(count=VIEWS, size=SIZE, scale=(0.2, 1), ratio=(1, 1), flip=0, seed=0, jpeg_quality=95),
            codec=CodecInfo(name="int8" if with_scale else "float16"),
            source=SourceInfo(shards=len(sizes), fingerprint="0"),
        )
        self.shards = tuple(f"{number:06d}" for number in range(len(sizes)))
        self._sizes = dict(zip(self.shards, sizes, strict=True))
        self.with_scale = with_scale
        self.damaged: set[str] = set()

    def samples(self, shard: str) -> int:
        return self._sizes[shard]

    def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
        assert 0 <= start < stop <= self._sizes[shard]
        keys = [f"{shard}/{row}" for row in range(start, stop)]
        draws = [np.random.default_rng([int(shard), view, row]) for row in range(start, stop)]
        jpegs = [encode_jpeg(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), 95) for rng in draws]
        count = stop - start
        return ViewRun(
            keys=keys,
            label_N=np.zeros(count, np.int64),
            code_NST=np.stack([rng.integers(-127, 128, (PATCHES + 1, WIDTH)) for rng in draws]).astype(np.int8),
            scale_NS=np.stack([rng.random(PATCHES + 1) for rng in draws]).astype(np.float16)
            if self.with_scale
            else None,
            attention_NL=np.stack([rng.random(PATCHES) for rng in draws]).astype(np.float16),
            crop_N4=np.zeros((count, 4), np.int32),
            flip_N=np.zeros(count, np.bool_),
            jpegs=[
                jpeg[: len(jpeg) // 2] if key in self.damaged else jpeg for key, jpeg in zip(keys, jpegs, strict=True)
            ],
        )


def order_of(reader: MemoryReader, shuffle_blocks: int = 2, block: int = 4) -> EpochOrder:
    samples = tuple(reader.samples(shard) for shard in reader.shards)
    return EpochOrder(samples=samples, views=VIEWS, block=block, shuffle_blocks=shuffle_blocks, seed=7)


def read(
    reader: MemoryReader, plan: BatchPlan, epoch: int = 0, skip: int = 0, threads: int = 1, with_targets: bool = True
) -> list[Batch]:
    with Loader(reader, plan, threads=threads, with_targets=with_targets) as loader:
        return list(loader.batches(epoch, skip))


def batches(
    reader: MemoryReader,
    epoch: int = 0,
    size: int = 5,
    *,
    threads: int = 1,
    shuffle_blocks: int = 2,
    with_targets: bool = True,
) -> list[Batch]:
    plan = BatchPlan(order=order_of(reader, shuffle_blocks), batch_size=size)
    return read(reader, plan, epoch, threads=threads, with_targets=with_targets)


@pytest.mark.parametrize("with_scale", [True, False], ids=["scale", "no scale"])
@pytest.mark.parametrize("shuffle_blocks", [1, 2, 100])
@pytest.mark.parametrize("epoch", [0, 1])
def test_each_key_comes_with_its_own_values(epoch: int, shuffle_blocks: int, with_scale: bool) -> None:
    reader = MemoryReader((9, 6, 1), with_scale=with_scale)
    order = order_of(reader, shuffle_blocks)
    for batch in batches(reader, epoch, size=5, shuffle_blocks=shuffle_blocks):
        for row, key in enumerate(batch.keys):
            shard, position = key.split("/")
            view = order.view_of(epoch, int(shard))
            run = reader.read(shard, view, int(position), int(position) + 1)
            assert np.array_equal(batch.pixels_BHWC[row].numpy(), decode_jpeg(run.jpegs[0]))
            assert np.array_equal(batch.code_BST[row].numpy(), run.code_NST[0])
            assert np.array_equal(batch.attention_BL[row].numpy(), run.attention_NL[0])
            assert (batch.scale_BS is None) == (run.scale_NS is None)
            if batch.scale_BS is not None and run.scale_NS is not None:
                assert np.array_equal(batch.scale_BS[row].numpy(), run.scale_NS[0])


@pytest.mark.parametrize("size", [1, 3, 5, 16])
def test_batches_are_whole_and_follow_the_order(size: int) -> None:
    reader = MemoryReader((9, 6, 1))
    expected = []
    for blocks, sample_order in order_of(reader).groups(0):
        keys = [f"{reader.shards[b.shard]}/{row}" for b in blocks for row in range(b.start, b.stop)]
        expected += [keys[i] for i in sample_order]
    found = batches(reader, size=size)
    assert len(found) == 16 // size
    assert all(len(batch.keys) == len(batch.pixels_BHWC) == len(batch.code_BST) == size for batch in found)
    assert [key for batch in found for key in batch.keys] == expected[: 16 // size * size]


def test_stored_types_reach_the_batch() -> None:
    batch = batches(MemoryReader((9, 6, 1)))[0]
    assert batch.scale_BS is not None
    types = (batch.pixels_BHWC.dtype, batch.code_BST.dtype, batch.scale_BS.dtype, batch.attention_BL.dtype)
    assert types == (torch.uint8, torch.int8, torch.float16, torch.float16)


def test_threads_change_nothing() -> None:
    reader = MemoryReader((9, 6, 1))
    for one, four in zip(batches(reader), batches(reader, threads=4), strict=True):
        assert one.keys == four.keys
        assert torch.equal(one.pixels_BHWC, four.pixels_BHWC)


def test_a_batch_without_targets_still_has_pixels_and_attention() -> None:
    reader = MemoryReader((9, 6, 1))
    for bare, full in zip(batches(reader, with_targets=False), batches(reader), strict=True):
        assert len(bare.code_BST) == 0
        assert bare.scale_BS is None
        assert bare.keys == full.keys
        assert torch.equal(bare.pixels_BHWC, full.pixels_BHWC)
        assert torch.equal(bare.attention_BL, full.attention_BL)


def test_a_damaged_view_stops_the_epoch_and_names_its_batch() -> None:
    reader = MemoryReader((9, 6, 1))
    key = batches(reader)[1].keys[2]
    reader.damaged.add(key)
    with pytest.raises(DataError, match="decode"):
        batches(reader)


@pytest.mark.parametrize("canonical_streams", [1, 2, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_ranks_share_the_same_batches(canonical_streams: int, ranks: int, skip: int) -> None:
    reader = MemoryReader((9, 6, 1, 13))
    plan = BatchPlan(order=order_of(reader), batch_size=5, canonical_streams=canonical_streams)
    whole = read(reader, plan)
    parts = [read(reader, plan.of_rank(rank, ranks), skip=skip) for rank in range(ranks)]
    assert len(whole) == 5
    for number, batch in enumerate(whole[skip:]):
        shares = [part[number] for part in parts]
        assert [key for share in shares for key in share.keys] == list(batch.keys)
        for name in ("pixels_BHWC", "code_BST", "scale_BS", "attention_BL"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(batch, name))


def test_a_rank_with_streams_of_its_own_reads_what_it_uses_and_no_more() -> None:
    class CountingReader(MemoryReader):
        read_samples = 0

        def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
            self.read_samples += stop - start
            return super().read(shard, view, start, stop)

    reader = CountingReader((40, 40, 48))
    plan = BatchPlan(order=order_of(reader), batch_size=16, canonical_streams=4)
    for rank in range(4):
        reader.read_samples = 0
        read(reader, plan.of_rank(rank, 4))
        assert reader.read_samples == 32
    reader.read_samples = 0
    read(reader, plan.of_rank(3, 4), skip=7)
    assert reader.read_samples <= 8  # the last group


def test_the_next_group_is_read_while_one_is_handed_out_and_no_more() -> None:
    class CountingReader(MemoryReader):
        def __init__(self) -> None:
            super().__init__((160, 160))
            self.begun: list[str] = []

        def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
            self.begun.append(threading.current_thread().name)
            return super().read(shard, view, start, stop)

    reader = CountingReader()
    plan = BatchPlan(order=order_of(reader, shuffle_blocks=2, block=32), batch_size=16)
    with Loader(reader, plan, threads=1, with_targets=True) as loader:
        found = loader.batches(0)
        next(found)
        loader._readers.shutdown(wait=True)
        # Two groups of two blocks: batches that are under way lie in the first.
        assert len(reader.begun) == 4
        assert all(name.startswith("read") for name in reader.begun)


def test_epochs_follow_each_other() -> None:
    reader = MemoryReader((9, 6, 1))
    plan = BatchPlan(order=order_of(reader), batch_size=5)
    with Loader(reader, plan, threads=2, with_targets=True) as loader:
        found = [batch.keys for batch in loader.batches(1, 2, 4)]
    parts = [batch.keys for epoch in (1, 2, 3) for batch in read(reader, plan, epoch)]
    assert found == parts[2:]


def test_noise_is_drawn_for_the_epoch_and_the_keys_of_each_sample() -> None:
    def draw(epoch: int, keys: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1000.0 * epoch + sum(key.encode())] * PATCHES for key in keys])

    reader = MemoryReader((90, 60, 1))
    plan = BatchPlan(order=order_of(reader), batch_size=37)
    with Loader(reader, plan, threads=2, with_targets=False, draw_noise=draw) as loader:
        for batch in loader.batches(3):
            assert batch.noise_BL is not None
            assert torch.equal(batch.noise_BL, draw(3, batch.keys))


def test_a_view_of_another_size_is_refused() -> None:
    class OtherReader(MemoryReader):
        def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
            run = super().read(shard, view, start, stop)
            jpeg = encode_jpeg(np.zeros((self.side, self.side, 3), np.uint8), 95)
            return replace(run, jpegs=[jpeg for _ in run.jpegs])

    reader = OtherReader((9,))
    for side in (SIZE - 1, SIZE + 1):
        reader.side = side
        with pytest.raises(DataError, match=r"the stored view of 000000/. does not decode: JPEG"):
            batches(reader)


class BoomError(Exception):
    pass


def some_batch() -> Batch:
    return batches(MemoryReader((9, 6, 1)))[0]


def test_prefetched_batches_are_all_there_in_order() -> None:
    whole = batches(MemoryReader((9, 6, 1)), size=3)
    prefetcher = Background(iter(whole), 1, "prefetch")
    try:
        assert [batch.keys for batch in prefetcher] == [batch.keys for batch in whole]
    finally:
        prefetcher.close()


def test_an_error_comes_after_the_batches_before_it() -> None:
    batch = some_batch()

    def broken() -> Iterator[Batch]:
        yield batch
        yield batch
        raise BoomError("the disk")

    prefetcher = Background(broken(), 8, "prefetch")
    seen = 0
    with pytest.raises(BoomError, match="the disk"):  # noqa: PT012
        for _ in prefetcher:
            seen += 1
    prefetcher.close()
    assert seen == 2


def test_reading_ahead_is_bounded_and_ends_when_the_consumer_stops() -> None:
    batch = some_batch()
    made = 0
    full = threading.Event()

    def endless() -> Iterator[Batch]:
        nonlocal made
        while True:
            made += 1
            if made == 5:  # 1 taken, 3 waiting, 1 in hand
                full.set()
            yield batch

    before = threading.active_count()
    prefetcher = Background(endless(), 3, "prefetch")
    next(iter(prefetcher))
    assert full.wait(10)
    closer = threading.Thread(target=prefetcher.close, daemon=True)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
    assert threading.active_count() == before
    assert made == 5
