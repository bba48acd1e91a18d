"""What ranks agree on, with two real processes that meet over gloo; one start serves all tests."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from milan_pipe.errors import MilanError, RankLostError, ReportedElsewhereError, SettingError
from milan_pipe.training.distributed import Ranks, joined, rank_of_environment


def caught(call: Any) -> str:
    try:
        call()
    except MilanError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def ends(error: Exception | None) -> Any:
    def run() -> None:
        with joined("cpu", lambda: "The state") as ranks:
            ranks.barrier()
            if error is not None:
                raise error

    return run


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    found: dict[str, Any] = {}

    def port(number: int) -> None:
        os.environ["MASTER_PORT"] = (Path(folder) / f"port-{number}").read_text()

    port(0)
    with joined("cpu", lambda: "The state") as ranks:
        found["rank"] = (ranks.rank, ranks.count, ranks.first)
        mine = torch.tensor([1.0, 10.0**16]) if rank else torch.tensor([2.5, -(10.0**16)])
        found["sum"] = ranks.all_reduce_sum(mine.double()).tolist()
        found["kept"] = mine.tolist()
        found["ints"] = ranks.all_reduce_sum(torch.tensor([2**40 + rank])).long().tolist()
        found["max"] = ranks.all_reduce_max([rank, 5 - rank, False])
        found["broadcast"] = ranks.broadcast({"from": rank, "path": Path("x") / str(rank)})
        found["same"] = caught(lambda: ranks.require_same({"a": [1]}, "things", "todo"))
        found["different"] = caught(lambda: ranks.require_same(f"r{rank}", "things", "do this"))
        module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(module.weight)
        call, exchange = ranks.parallelize(module, "ddp", (), module)
        gradients = []
        for wanted in (False, True):
            with exchange(wanted):
                call(torch.full((1, 1), 1.0 + 2 * rank)).sum().backward()
            assert module.weight.grad is not None
            gradients.append(module.weight.grad.item())
        found["gradients"] = gradients
        found["reports"] = ranks.all_reduce_sum(torch.tensor([ranks.reports()])).item()
    port(1)
    found["error"] = caught(ends(SettingError("wrong")))
    port(2)
    found["lost"] = caught(ends(RuntimeError("Connection closed by peer")))
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    import socket

    folder = tmp_path_factory.mktemp("ranks")
    sockets = [socket.socket() for _ in range(3)]
    for number, opened in enumerate(sockets):
        opened.bind(("127.0.0.1", 0))
        (folder / f"port-{number}").write_text(str(opened.getsockname()[1]))
    for opened in sockets:
        opened.close()
    # One import of torch for both.
    multiprocessing.set_forkserver_preload(["milan_pipe.training.distributed"])
    mp.start_processes(one_rank, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_values_that_differ_are_summed_exactly_and_the_callers_stay(two: list[dict[str, Any]]) -> None:
    assert [found["rank"] for found in two] == [(0, 2, True), (1, 2, False)]
    assert [found["sum"] for found in two] == [[3.5, 0.0]] * 2
    assert two[0]["kept"] == [2.5, pytest.approx(-(10.0**16))]
    assert [found["ints"] for found in two] == [[2**41 + 1]] * 2


def test_the_largest_and_the_first_ranks_value(two: list[dict[str, Any]]) -> None:
    assert [found["max"] for found in two] == [[1, 5, 0]] * 2
    assert [found["broadcast"] for found in two] == [{"from": 0, "path": Path("x/0")}] * 2


def test_ranks_that_see_different_things_are_refused_with_both(two: list[dict[str, Any]]) -> None:
    assert [found["same"] for found in two] == ["no error"] * 2
    for found in two:
        assert found["different"] == "MismatchError: the ranks see different things (rank 0: r0, rank 1: r1); do this"


def test_gradients_are_averaged_only_when_they_are_exchanged(two: list[dict[str, Any]]) -> None:
    # Accumulated alone: 1 and 3. With the second part, 2 and 6, exchanged: 4 on both.
    assert [found["gradients"] for found in two] == [[1.0, 4.0], [3.0, 4.0]]


def test_one_rank_reports(two: list[dict[str, Any]]) -> None:
    assert [found["reports"] for found in two] == [1, 1]
    for key, kind in (("error", SettingError), ("lost", RankLostError)):
        kinds = sorted(found[key].split(":")[0] for found in two)
        assert kinds == sorted([kind.__name__, ReportedElsewhereError.__name__]), key
    assert all("one of 2 ranks was lost. The state; the same command" in found["lost"] for found in two)


def test_one_process_agrees_with_itself() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    given = torch.tensor([1, 2], dtype=torch.int32)
    assert ranks.all_reduce_sum(given).tolist() == [1.0, 2.0]
    assert ranks.all_reduce_max([3, True]) == [3, 1]
    assert ranks.broadcast("x") == "x"
    assert ranks.reports()
    ranks.require_same(1, "things", "todo")
    ranks.barrier()
    module = nn.Linear(1, 1)
    assert ranks.parallelize(module, "fsdp", (), module)[0] is module


def test_a_world_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert rank_of_environment() == 0
    with pytest.raises(SettingError, match="RANK"), joined("cpu", str):
        pass
