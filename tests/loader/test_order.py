"""The order of samples: whole, fair, well mixed, and a function of nothing but its arguments."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from milan_pipe.loader.order import BatchPlan, Block, CanonicalStream, EpochOrder, batches_per_epoch
from milan_pipe.random_bits import permutation

orders = st.builds(
    EpochOrder,
    samples=st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple),
    views=st.integers(1, 5),
    block=st.integers(1, 16),
    shuffle_blocks=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
)


def sequence(order: EpochOrder, epoch: int) -> list[tuple[int, int, int]]:
    """(shard, view, row) of each sample in the order in which it is handed out."""
    result = []
    for blocks, sample_order in order.groups(epoch):
        end_to_end = [(b.shard, b.view, row) for b in blocks for row in range(b.start, b.stop)]
        result += [end_to_end[i] for i in sample_order]
    return result


def test_the_order_is_what_it_was() -> None:
    # Runs go on in it under every later version: change these numbers only with ORDER_VERSION.
    order = EpochOrder(samples=(5, 3), views=4, block=2, shuffle_blocks=3, seed=7)
    drawn = [[(b.shard, b.view, b.start, b.stop) for b in order.blocks(epoch)] for epoch in (0, 9)]
    assert drawn == [
        [(0, 3, 0, 2), (0, 3, 2, 4), (1, 1, 0, 2), (1, 1, 2, 3), (0, 3, 4, 5)],
        [(1, 1, 2, 3), (0, 1, 4, 5), (0, 1, 2, 4), (1, 1, 0, 2), (0, 1, 0, 2)],
    ]
    assert [rows.tolist() for _, rows in order.groups(0)] == [[4, 0, 1, 2, 3, 5], [0, 1]]
    assert [rows.tolist() for _, rows in order.groups(9)] == [[0, 3, 2, 1], [1, 0, 2, 3]]


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 1000))
def test_an_epoch_shows_every_sample_once_and_one_view_of_a_shard(order: EpochOrder, epoch: int) -> None:
    shown = sequence(order, epoch)
    assert sorted((shard, row) for shard, _, row in shown) == [
        (shard, row) for shard, count in enumerate(order.samples) for row in range(count)
    ]
    for shard in range(len(order.samples)):
        assert {view for s, view, _ in shown if s == shard} == {order.view_of(epoch, shard)}


@settings(max_examples=60, deadline=None)
@given(order=orders, cycle=st.integers(0, 200))
def test_every_cycle_shows_each_view_of_a_shard_once(order: EpochOrder, cycle: int) -> None:
    for shard in range(len(order.samples)):
        epochs = range(cycle * order.views, (cycle + 1) * order.views)
        assert sorted(order.view_of(epoch, shard) for epoch in epochs) == list(range(order.views))


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 50))
def test_blocks_lie_inside_their_shard_and_are_full_but_the_last(order: EpochOrder, epoch: int) -> None:
    for block in order.blocks(epoch):
        assert block.start % order.block == 0
        assert block.stop == min(block.start + order.block, order.samples[block.shard])
        assert block.start < block.stop


def plain_blocks(order: EpochOrder, epoch: int) -> list[Block]:
    """Every block made and laid down, as the obvious way has it."""
    in_place = [
        Block(shard, order.view_of(epoch, shard), start, min(start + order.block, count))
        for shard, count in enumerate(order.samples)
        for start in range(0, count, order.block)
    ]
    return [in_place[number] for number in permutation(len(in_place), "blocks", order.seed, epoch)]


def plain_cut(blocks: list[Block], start: int, stop: int) -> list[Block]:
    """Samples one by one, and those that follow each other in a block put together again."""
    samples = [(at, row) for at, block in enumerate(blocks) for row in range(block.start, block.stop)][start:stop]
    kept = []
    for at, rows in groupby(samples, key=lambda sample: sample[0]):
        numbers = [row for _, row in rows]
        kept.append(Block(blocks[at].shard, blocks[at].view, numbers[0], numbers[-1] + 1))
    return kept


@settings(max_examples=150, deadline=None)
@given(order=orders, epoch=st.integers(0, 50), data=st.data())
def test_blocks_made_when_they_are_asked_for_are_those_of_a_list(
    order: EpochOrder, epoch: int, data: st.DataObject
) -> None:
    expected = plain_blocks(order, epoch)
    found = order.blocks(epoch)
    assert list(found) == expected
    assert len(found) == len(expected)
    assert found[-1] == expected[-1]
    positions = st.integers(0, sum(order.samples))
    start, stop = data.draw(positions), data.draw(positions)
    cut = found.cut(start, stop)
    assert list(cut) == plain_cut(expected, start, stop)
    assert [cut[-1]] == plain_cut(expected, start, stop)[-1:] if len(cut) else start >= stop
    again = data.draw(positions), data.draw(positions)
    assert list(cut.cut(*again)) == plain_cut(plain_cut(expected, start, stop), *again)


def test_an_epoch_of_a_billion_samples_begins_at_once() -> None:
    order = EpochOrder(samples=(10_000,) * 100_000, views=8, block=128, shuffle_blocks=4, seed=0)
    blocks, rows = next(order.groups(3, CanonicalStream(1, 4, 250_000_001, 500_000_000)))
    assert (len(blocks), len(rows)) == (1, blocks[0].stop - blocks[0].start)


@settings(max_examples=30, deadline=None)
@given(order=orders)
def test_epoch_five_needs_no_epoch_before_it(order: EpochOrder) -> None:
    fresh = EpochOrder(
        samples=order.samples,
        views=order.views,
        block=order.block,
        shuffle_blocks=order.shuffle_blocks,
        seed=order.seed,
    )
    expected = [sequence(order, epoch) for epoch in range(6)][5]
    assert sequence(fresh, 5) == expected


def big(seed: int = 0, shuffle_blocks: int = 1000) -> EpochOrder:
    return EpochOrder(samples=(500, 300, 700), views=4, block=64, shuffle_blocks=shuffle_blocks, seed=seed)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = {
        tuple((shard, row) for shard, _, row in sequence(big(seed), epoch)) for seed in range(3) for epoch in range(4)
    }
    assert len(rows) == 12


def test_shards_do_not_move_through_their_views_in_step() -> None:
    order = EpochOrder(samples=(1,) * 200, views=4, block=1, shuffle_blocks=1, seed=0)
    counts = Counter(order.view_of(0, shard) for shard in range(200))
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 80  # 50 expected, deviation 6
    turns = {tuple(order.view_of(epoch, shard) for epoch in range(4)) for shard in range(200)}
    assert len(turns) == 24


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_wide_group_leaves_no_trace_of_the_stored_order(epoch: int) -> None:
    order = big()
    offsets = np.cumsum([0, *order.samples])
    stored = np.array([offsets[shard] + row for shard, _, row in sequence(order, epoch)])
    place = np.arange(len(stored))
    assert abs(np.corrcoef(stored, place)[0, 1]) < 0.1  # deviation 0.026
    assert abs(np.corrcoef(stored[:-1], stored[1:])[0, 1]) < 0.1  # neighbours in a batch are no neighbours on disk
    assert np.abs(stored - place).mean() == pytest.approx(len(stored) / 3, rel=0.1)


def test_a_narrow_group_still_takes_blocks_from_everywhere() -> None:
    order = EpochOrder(samples=(100,) * 20, views=1, block=10, shuffle_blocks=16, seed=0)
    first = sequence(order, 0)[:160]
    assert len({shard for shard, _, _ in first}) > 8
    assert [row for _, _, row in first[:10]] != sorted(row for _, _, row in first[:10])


def test_two_epochs_put_different_blocks_into_one_group() -> None:
    order = big(shuffle_blocks=4)
    groups = [{(b.shard, b.start) for b in next(iter(order.groups(epoch)))[0]} for epoch in range(3)]
    assert groups[0] != groups[1] != groups[2]


def test_whole_batches_are_counted() -> None:
    assert [batches_per_epoch(samples, 16) for samples in (16, 31, 32)] == [1, 1, 2]


def taken(plan: BatchPlan, epoch: int) -> list[list[tuple[int, int]]]:
    """(shard, row) of each sample of each batch, put together from the canonical_streams as the plan says."""
    pieces = plan.pieces()
    canonical_streams = {}
    for piece in pieces:
        canonical_streams[piece.stream.number] = [
            end_to_end[i]
            for blocks, sample_order in plan.order.groups(epoch, piece.stream)
            for end_to_end in [[(b.shard, row) for b in blocks for row in range(b.start, b.stop)]]
            for i in sample_order
        ]
    batches = []
    for step in range(plan.steps):
        batch = []
        for piece in pieces:
            first = step * piece.size
            batch += canonical_streams[piece.stream.number][first + piece.start : first + piece.stop]
        batches.append(batch)
    return batches


@settings(max_examples=150, deadline=None)
@given(
    order=orders,
    epoch=st.integers(0, 100),
    batch_size=st.integers(1, 30),
    canonical_streams=st.integers(1, 9),
    ranks=st.integers(1, 9),
)
def test_ranks_and_canonical_streams_share_an_epoch_whole(
    order: EpochOrder, epoch: int, batch_size: int, canonical_streams: int, ranks: int
) -> None:
    assume(ranks <= batch_size <= sum(order.samples))
    plan = BatchPlan(order=order, batch_size=batch_size, canonical_streams=canonical_streams)
    whole = taken(plan, epoch)
    assert len(whole) == sum(order.samples) // batch_size
    assert {len(batch) for batch in whole} == {batch_size}
    shown = [sample for batch in whole for sample in batch]
    assert len(set(shown)) == len(shown)
    shares = [plan.of_rank(rank, ranks) for rank in range(ranks)]
    sizes = [sum(piece.stop - piece.start for piece in share.pieces()) for share in shares]
    assert sum(sizes) == batch_size
    assert max(sizes) - min(sizes) <= 1
    parts = [taken(share, epoch) for share in shares]
    assert [[sample for part in parts for sample in part[step]] for step in range(plan.steps)] == whole


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 100), batch_size=st.integers(1, 30))
def test_one_canonical_stream_is_the_order_itself(order: EpochOrder, epoch: int, batch_size: int) -> None:
    assume(batch_size <= sum(order.samples))
    plan = BatchPlan(order=order, batch_size=batch_size)
    expected = [(shard, row) for shard, _, row in sequence(order, epoch)]
    assert [sample for batch in taken(plan, epoch) for sample in batch] == expected[: plan.steps * batch_size]


@pytest.mark.parametrize("canonical_streams", [1, 4, 8])
def test_canonical_streams_mix_as_far_as_one_does(canonical_streams: int) -> None:
    order = EpochOrder(samples=(1000,) * 16, views=1, block=50, shuffle_blocks=16, seed=0)
    batches = taken(BatchPlan(order=order, batch_size=64, canonical_streams=canonical_streams), 0)
    shards = [len({shard for shard, _ in batch}) for batch in batches]
    # 16 blocks of 320 in the air: of 16 shards, drawn 16 times, 1 - (15/16)^16 = 64 % are met, 10.3.
    assert 9 < sum(shards) / len(shards) < 12
