"""Several ranks under torchrun: who this process is, what the ranks agree on, and which of them reports an error."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
from milan_pipe.training.stopping import errors_before_sigterm

T = TypeVar("T")

# What gloo and NCCL say when a peer has gone; torch has no type of its own for all of it.
_LOST = re.compile(r"connection (closed by peer|reset|refused)|broken pipe|gloo|nccl|timed out", re.IGNORECASE)


def rank_of_environment() -> int:
    """This process's rank as torchrun sets it; 0 without torchrun. Raises SettingError where that is no number."""
    return _environment("RANK", "0") if _environment("WORLD_SIZE", "1") > 1 else 0


@dataclass
class Ranks:
    """The processes that train together, `count` of them. With one of them everything here does nothing."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes checkpoints and metrics."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, on the CPU, in double precision."""
        # A copy: what a caller holds stays its own.
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Iterable[int]) -> list[int]:
        """The largest of each value over ranks."""
        tensor = torch.tensor(list(values))
        if self.count > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(value) for value in tensor]

    def broadcast(self, value: T) -> T:
        """The first rank's value."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def require_same(self, value: object, what: str, todo: str) -> None:
        """Refuse ranks that see different things.

        Raises:
            MismatchError: says what each rank found.
        """
        found: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            values = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(found))
            raise MismatchError(f"the ranks see different {what} ({values}); {todo}")

    def barrier(self) -> None:
        """Return when every rank is here."""
        # By a reduction on the CPU: dist.barrier would use the accelerators' backend, if there is one.
        self.all_reduce_max([0])

    def parallelize(
        self, module: nn.Module, parallel: Parallel, units: Iterable[nn.Module], root: nn.Module
    ) -> tuple[nn.Module, Callable[[bool], AbstractContextManager[Any]]]:
        """Have gradients averaged over ranks.

        Args:
            module: computes the loss; `root`, a part of it, is trained.
            units: parts of `root` that FSDP gathers one at a time.

        Returns:
            What to call in place of `module`, and a context for each forward and backward pass, given whether ranks
            exchange gradients in it.
        """
        if not dist.is_initialized():
            return module, lambda _: nullcontext()
        if parallel == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.count,))
            for unit in units:
                fully_shard(unit, mesh=mesh)
            sharded = fully_shard(root, mesh=mesh)
            assert isinstance(sharded, FSDPModule)

            def exchange(wanted: bool) -> AbstractContextManager[None]:
                sharded.set_requires_gradient_sync(wanted)
                return nullcontext()

            return module, exchange
        copied = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        return copied, lambda wanted: nullcontext() if wanted else copied.no_sync()

    def reports(self) -> bool:
        """True on the first rank that asks: the user gets one line, from whichever rank lives to write it."""
        if self.count == 1:
            return True
        try:
            return int(dist.distributed_c10d._get_default_store().add("milan_pipe/reported", 1)) == 1
        except RuntimeError:
            return True  # the store has gone with its process


def _environment(name: str, otherwise: str = "") -> int:
    value = os.environ.get(name) or otherwise
    if not value.isdecimal():
        raise SettingError(f"{name} is {value!r}, expected a number; start several ranks with torchrun")
    return int(value)


def _device_of(local: int, name: str, count: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise SettingError(f"device {name!r} names one device for {count} ranks; expected auto, cpu or cuda")
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if local >= torch.cuda.device_count():
        here = f"local rank {local} has no CUDA device ({torch.cuda.device_count()} here)"
        raise SettingError(f"{here}; start one rank a device, with --nproc-per-node")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: str, values: Callable[[], str]) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started; without torchrun, a single one.

    Args:
        device: a setting; with `auto` each rank takes the CUDA device of its local rank, if there is CUDA.
        values: a sentence about the run's state, for when a rank is lost.

    Raises:
        SettingError: no such device, or one device named for several ranks.
        RankLostError: another rank has died.
        ReportedElsewhereError: another rank reports the error.
    """
    count = _environment("WORLD_SIZE", "1")
    if count == 1:
        yield Ranks(0, 1, resolve_device(device))
        return
    rank, local = _environment("RANK"), _environment("LOCAL_RANK")
    if rank >= count:
        raise SettingError(f"RANK is {rank} and WORLD_SIZE {count}, expected less; start several ranks with torchrun")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"{count} ranks cannot meet: {reason}; start them with torchrun") from error
    ranks = Ranks(rank, count, torch.device("cpu"))
    try:
        ranks.device = _device_of(local, device, count)
        with errors_before_sigterm():
            yield ranks
    except (MilanError, RuntimeError) as error:
        known = error if isinstance(error, MilanError) else None
        if known is None and (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            todo = "the same command goes on with the run, on any number of ranks"
            known = RankLostError(f"one of {count} ranks was lost. {values()}; {todo}")
        # An unknown error ends with its traceback, which says more than the others could.
        if not ranks.reports() and known is not None:
            raise ReportedElsewhereError(known) from error
        if known is None or known is error:
            raise
        raise known from error
    finally:
        dist.destroy_process_group()
