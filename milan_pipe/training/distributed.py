"""Several ranks under torchrun: who this process is, what the ranks agree on, and which of them speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from milan_pipe.config.training import Parallel
from milan_pipe.devices import resolve_device
from milan_pipe.errors import MilanError, MismatchError, RankLostError, ReportedElsewhereError, SettingError

T = TypeVar("T")

# What gloo and NCCL say when a peer has gone; torch has no type of its own for all of it.
_LOST = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "gloo",
    "nccl",
    "timed out",
)


def rank_of_environment() -> int:
    """This process's rank as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


class Ranks:
    """The processes that train together. With one of them everything here does nothing.

    Attributes:
        rank: 0 to `count` - 1; the first one writes checkpoints and metrics.
        device: of this process.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank = rank
        self.count = count
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, on the CPU, in double precision."""
        values = values.detach().to("cpu", torch.float64)
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def all_reduce_max(self, values: Iterable[int]) -> list[int]:
        """The largest of each value over ranks."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(list(values))
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(value) for value in tensor]

    def broadcast(self, value: T) -> T:
        """What the first rank has."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def require_same(self, value: object, what: str, todo: str) -> None:
        """Refuse ranks that see different things.

        Raises:
            MismatchError: says what each rank found.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            values = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(found))
            raise MismatchError(f"the ranks see different {what} ({values}); {todo}")

    def barrier(self) -> None:
        """Return when every rank is here."""
        # Not a barrier, which would take the accelerators' backend where there is one.
        self.all_reduce_max([0])

    def parallelize(
        self, module: nn.Module, parallel: Parallel, units: Iterable[nn.Module], root: nn.Module
    ) -> tuple[nn.Module, Callable[[bool], AbstractContextManager[Any]]]:
        """Have gradients averaged over ranks.

        Args:
            module: computes the loss.
            units: parts of `root` that FSDP gathers one at a time.
            root: what is trained, a part of `module`.

        Returns:
            What to call in place of `module`, and a context for each forward and backward pass, values whether
            gradients are to be exchanged in it.
        """
        if self.count == 1:
            return module, lambda _: nullcontext()
        if parallel == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.count,))
            for unit in units:
                fully_shard(unit, mesh=mesh)
            sharded = fully_shard(root, mesh=mesh)

            @contextmanager
            def exchange(wanted: bool) -> Iterator[None]:
                assert isinstance(sharded, FSDPModule)
                sharded.set_requires_gradient_sync(wanted)
                yield

            return module, exchange
        copied = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        return copied, lambda wanted: nullcontext() if wanted else copied.no_sync()

    def speaks(self) -> bool:
        """True for the first process that asks: one line to the user is enough, whoever lives to say it."""
        if self.count == 1:
            return True
        try:
            store = dist.distributed_c10d._get_default_store()
            return int(store.add("milan_pipe/spoken", 1)) == 1
        except RuntimeError:
            return True  # the store has gone with its process


def _environment(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise SettingError(f"WORLD_SIZE is set and {name} is {value!r}; start several ranks with torchrun")
    return int(value)


def _device_of(local: int, name: str, count: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise SettingError(f"device {name!r} names one device for {count} ranks; expected auto, cpu or cuda")
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if local >= torch.cuda.device_count():
        raise SettingError(
            f"local rank {local} has no CUDA device ({torch.cuda.device_count()} here); start one rank a device, "
            "with --nproc-per-node"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _LOST)


@contextmanager
def joined(device: str, values: Callable[[], str]) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started; without torchrun, a single one.

    Args:
        device: a setting; with `auto` each rank takes the CUDA device of its local rank, where there is CUDA.
        values: what to say of the run's state when a rank is lost.

    Raises:
        SettingError: no such device, or one device named for several ranks.
        RankLostError: another rank has died.
        ReportedElsewhereError: another rank has said what is wrong.
    """
    count = int(os.environ.get("WORLD_SIZE", "1") or "1")
    if count == 1:
        yield Ranks(0, 1, resolve_device(device))
        return
    rank, local = _environment("RANK"), _environment("LOCAL_RANK")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise SettingError(
            f"{count} ranks cannot meet: {str(error).splitlines()[0]}; start them with torchrun"
        ) from error
    ranks = Ranks(rank, count, torch.device("cpu"))
    try:
        ranks.device = _device_of(local, device, count)
        yield ranks
    except MilanError as error:
        if not ranks.speaks():
            raise ReportedElsewhereError(error) from error
        raise
    except RuntimeError as error:
        if not _lost(error):
            ranks.speaks()  # this one's traceback says more than the others could
            raise
        lost = RankLostError(
            f"one of {count} ranks was lost. {values()}; the same command goes on with the run, on any number of ranks"
        )
        if not ranks.speaks():
            raise ReportedElsewhereError(lost) from error
        raise lost from error
    finally:
        dist.destroy_process_group()
