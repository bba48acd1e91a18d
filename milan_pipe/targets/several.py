"""Stores of the same images and views, of several teachers, read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from milan_pipe.config.teachers import Importance
from milan_pipe.errors import MismatchError
from milan_pipe.targets.schema import StoreHeader, ViewInfo, ViewRun
from milan_pipe.targets.store import TargetStore, open_targets


class SeveralStores:
    """What a loader reads of several stores: views of the first, features of all; alone, the first is as it was.

    Attributes:
        stores: one or more, each complete.
        importance: whose attention is handed out.
    """

    def __init__(self, stores: Sequence[TargetStore], importance: Importance = "first") -> None:
        """Compare the stores; nothing of their shards is read.

        Raises:
            MismatchError: they are not of the same images, views or grid; says both values.
        """
        self.stores, self.importance = tuple(stores), importance
        first = self.stores[0]
        self.header: StoreHeader = first.header
        self.location, self.shards = first.location, first.shards
        for other in self.stores[1:]:
            _require_same_views(first, other)

    @property
    def headers(self) -> tuple[StoreHeader, ...]:
        """One of each store."""
        return tuple(store.header for store in self.stores)

    def samples(self, shard: str) -> int:
        """Number of samples of a shard; LookupError where there is none."""
        return self.stores[0].samples(shard)

    def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
        """Samples `start` to `stop` of one view; the other stores' codes are `ViewRun.others`.

        Raises:
            DataError: a shard is damaged; names store, shard and array.
            IndexError: no such shard, view or samples.
        """
        run = self.stores[0].read(shard, view, start, stop)
        others = [store.read(shard, view, start, stop, with_views=False) for store in self.stores[1:]]
        if not others:
            return run
        attention_NL = run.attention_NL
        if self.importance == "mean":
            whole = np.mean([one.attention_NL.astype(np.float32) for one in (run, *others)], axis=0)
            attention_NL = whole.astype(np.float16)
        codes = tuple((one.code_NST, one.scale_NS) for one in others)
        return replace(run, others=codes, attention_NL=attention_NL)


def open_several(wheres: Sequence[str | Path], importance: Importance = "first") -> SeveralStores:
    """Open one store or several; raises as `open_targets` and `SeveralStores`."""
    return SeveralStores([open_targets(where) for where in wheres], importance)


def _require_same_views(first: TargetStore, other: TargetStore) -> None:
    here, there = first.location, other.location

    def refuse(what: str, found: object, expected: object) -> MismatchError:
        return MismatchError(
            f"{there} and {here} are not of the same images and views: {what} is {found}, and {expected}. Extract the "
            f"second with `milan-pipe extract-targets --views-from {here} ...`"
        )

    if str(here) == str(there):
        raise MismatchError(f"{here} is named twice; name the stores of different teachers")
    ours, theirs = first.header, other.header
    for name in ViewInfo.model_fields:
        if getattr(theirs.views, name) != getattr(ours.views, name):
            raise refuse(f"views.{name}", getattr(theirs.views, name), getattr(ours.views, name))
    if theirs.teacher.grid != ours.teacher.grid:
        raise refuse("the grid of patches", theirs.teacher.grid, ours.teacher.grid)
    if other.shards != first.shards:
        only = sorted({*other.shards} ^ {*first.shards})
        raise refuse(f"the number of shards (one of them alone has {only[0]})", len(other.shards), len(first.shards))
    for shard in first.shards:
        if other.samples(shard) != first.samples(shard):
            raise refuse(f"the number of samples of shard {shard}", other.samples(shard), first.samples(shard))
        found, expected = (store.views_sha256(shard) for store in (other, first))
        for store, digest in ((other, found), (first, expected)):
            if digest is None:
                raise MismatchError(
                    f"{store.location} was written before stores had digests of their views, so that it cannot be read "
                    "beside another; `milan-pipe convert-targets` writes it anew with them"
                )
        if found != expected:
            raise refuse(f"the digest of the views of shard {shard}", str(found)[:16], str(expected)[:16])
