"""The bytes of a zarr store depend on its content alone, however many shards are written at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zarr
from support.targets import header, random_blocks, source, tree

from milan_pipe.targets.store import TargetStoreWriter


def test_arrays_are_made_for_one_thread_while_other_shards_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more threads `zarrs` lays inner chunks down in the order in which they get ready (6 % of such files)."""
    made = zarr.Group.create_array
    seen: list[Any] = []
    turn = iter(range(10_000))

    def slow(group: zarr.Group, name: str, **layout: Any) -> Any:
        # Uneven waits, so that one thread leaves the setting while another is about to make its array.
        time.sleep(0.001 * (next(turn) % 5))
        seen.append(zarr.config.get("threading.max_workers"))
        return made(group, name, **layout)

    monkeypatch.setattr(zarr.Group, "create_array", slow)
    head = header(format="zarr")
    writer = TargetStoreWriter(tmp_path / "targets", head)

    def write(numbers: range) -> None:
        for number in numbers:
            shard = writer.open_shard(f"{number:06d}")
            shard.append(random_blocks(head, 5)[0])
            shard.commit(source(5))

    threads = [threading.Thread(target=write, args=(range(start, 12, 3),)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) >= 12 * 8
    assert set(seen) == {1}


def test_one_content_gives_one_store(tmp_path: Path) -> None:
    head = header(format="zarr")
    blocks = random_blocks(head, 300)
    trees = []
    for number in range(3):
        writer = TargetStoreWriter(tmp_path / str(number), head)
        shard = writer.open_shard("000000")
        for block in blocks:
            shard.append(block)
        shard.commit(source(300))
        writer.finish()
        trees.append(tree(tmp_path / str(number)))
    assert all(other == trees[0] for other in trees)
