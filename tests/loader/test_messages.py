"""What the errors of the loader say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.messages import Case, require_message
from support.targets import header, random_blocks, write_blocks

from milan_pipe.errors import DataError, MissingError, SettingError
from milan_pipe.loader.dataset import Targets
from milan_pipe.loader.order import BatchPlan, EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Loader
from milan_pipe.loader.workers import WorkerLoader
from milan_pipe.targets.several import open_several
from milan_pipe.targets.store import open_targets


def store(jpeg: bytes | None = None) -> Targets:
    """Five samples with two views; the views of the last sample are `jpeg`."""
    keys = [f"k{row}" for row in range(5)]
    (block,) = random_blocks(header(), 5, keys=keys)
    if jpeg is not None:
        block = dataclasses.replace(block, jpegs=[[*view[:-1], jpeg] for view in block.jpegs])
    write_blocks("t", header(), [[block]])
    return Targets(open_targets("t"))


def order(**change: Any) -> EpochOrder:
    return EpochOrder(**{"samples": (3, 2), "views": 2, "block": 128, "shuffle_blocks": 1, "seed": 0, **change})


def plan(**change: int) -> BatchPlan:
    return BatchPlan(**{"order": order(), "batch_size": 4, "ranks": 2, **change})  # type: ignore[arg-type]


def load() -> None:
    targets = store(b"no image")
    sizes = BatchPlan(order=order(samples=(5,)), batch_size=5)
    with Loader(targets.store, sizes, threads=1, with_targets=True) as loader:
        list(loader.batches(0))


def load_in_processes(**change: int) -> None:
    store()
    reader, sizes = open_several(["t"]), plan(**{"order": order(samples=(5,)), "batch_size": 4, "ranks": 1, **change})
    WorkerLoader(reader, sizes, workers=3, threads=1, with_targets=True)


def little_shared_memory() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
        patch.setattr("milan_pipe.loader.workers.Batch.bytes", 2**20)
        load_in_processes()


INDEX = "targets are indexed by number or key, and view, as targets[3], targets['key', 1]; found "
AT_LEAST = (
    "an order needs samples, views, block and shuffle_blocks of at least 1, found {} samples, {} views, block {}, "
    "shuffle_blocks {}"
)
CANNOT_SHARE = (
    "a batch of 4 in {} canonical streams cannot be shared by {} ranks; pretrain.batch_size is over all ranks and must "
    "be at least their number"
)
CASES: dict[str, Case] = {
    "more processes than samples of a batch": (
        lambda: load_in_processes(ranks=2),
        SettingError,
        "pretrain.batch_size is 4 for 2 ranks of 3 worker processes each; every process needs a sample of each batch: "
        "lower pretrain.workers",
    ),
    "little shared memory": (
        little_shared_memory,
        SettingError,
        "pretrain.workers=3 needs 36 MiB of shared memory, /dev/shm has 3 MiB free; give the container more "
        "(--shm-size), or set pretrain.workers=0",
    ),
    "no such sample": (lambda: store()[5], IndexError, "t has no sample 5; it has samples 0 to 4"),
    "no such sample from the end": (lambda: store()[-6], IndexError, "t has no sample -6; it has samples 0 to 4"),
    "no such view": (lambda: store()[0, 2], IndexError, "t has no view 2; it has views 0 to 1"),
    "no such key": (
        lambda: store()["k9"],
        MissingError,
        "t has no sample 'k9'; its keys are such as k0, k1, k2",
    ),
    "slice": (lambda: store()[:3], TypeError, f"{INDEX}slice(None, 3, None)"),  # type: ignore[index]
    "fraction": (lambda: store()[1.5], TypeError, f"{INDEX}1.5"),  # type: ignore[index]
    "nothing": (lambda: store()[None], TypeError, f"{INDEX}None"),  # type: ignore[index]
    "yes or no": (lambda: store()[True], TypeError, f"{INDEX}True"),
    "view that does not decode": (
        lambda: store(b"no image")["k4", 1],
        DataError,
        "the stored view 1 of k4 does not decode: ...",
    ),
    "dataset of another view": (
        lambda: store().as_torch_dataset(view=2),
        SettingError,
        "view is 2; t has views 0 to 1",
    ),
    "batch that does not decode": (load, DataError, "the stored view of k4 does not decode: ..."),
    "order without shards": (lambda: order(samples=()), SettingError, AT_LEAST.format(0, 2, 128, 1)),
    "order of empty shards": (lambda: order(samples=(0, 0)), SettingError, AT_LEAST.format(0, 2, 128, 1)),
    "order without views": (lambda: order(views=0), SettingError, AT_LEAST.format(5, 0, 128, 1)),
    "order of empty blocks": (lambda: order(block=0), SettingError, AT_LEAST.format(5, 2, 0, 1)),
    "order that reads nothing": (lambda: order(shuffle_blocks=0), SettingError, AT_LEAST.format(5, 2, 128, 0)),
    "batch above the data": (
        lambda: batches_per_epoch(15, 16),
        SettingError,
        "the store has 15 samples, fewer than one batch of 16; lower pretrain.batch_size",
    ),
    "more ranks than samples of a batch": (
        lambda: plan(ranks=5),
        SettingError,
        CANNOT_SHARE.format(1, 5),
    ),
    "no canonical stream": (
        lambda: plan(canonical_streams=0),
        SettingError,
        CANNOT_SHARE.format(0, 2),
    ),
    "rank above the last": (lambda: plan(rank=2), SettingError, CANNOT_SHARE.format(1, 2)),
    "rank below the first": (lambda: plan(rank=-1), SettingError, CANNOT_SHARE.format(1, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
