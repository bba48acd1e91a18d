"""Files that are nearly right, for every reader of what comes from outside; `fuzz.harness` says what must hold."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from fuzz.harness import TIMERS, Corpus, Failure, Reader, each, run_reader
from fuzz.readers import READERS
from support import processes

from milan_pipe.errors import DataError

SEED = 0
CASES = 200


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By reader; of those alone that are asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    names = {item.callspec.params["name"] for item in items if "name" in item.callspec.params}
    out = tmp_path_factory.mktemp("fuzz") / "table.json"
    words = [
        sys.executable,
        "-m",
        "fuzz",
        *sorted(names),
        "--seed",
        str(SEED),
        "--cases",
        str(CASES),
        "--out",
        str(out),
    ]
    done = processes.run(
        words,
        cwd=str(Path(__file__).parents[1]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr[-4000:]
    return {row["reader"]: row for row in json.loads(out.read_text())}


@pytest.mark.ci
@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_what_it_cannot_read_and_harms_nothing(outcomes: dict[str, Any], name: str) -> None:
    row = outcomes[name]
    assert row["cases"] == CASES
    assert not row["failures"], "\n".join(f"{Failure(**one)}\n{one['trace']}" for one in row["failures"][:3])


# --- the watch itself ---------------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    (folder / "0").mkdir()
    (folder / "0" / "a.txt").write_text("whole")


def _only_when_changed(do: Any) -> Any:
    def read(folder: Path) -> None:
        if not (folder / "a.txt").exists() or (folder / "a.txt").read_text(errors="replace") != "whole":
            do(folder)

    return read


def _raise(error: BaseException) -> Any:
    def do(_: Path) -> None:
        raise error

    return do


def _unpickle(_: Path) -> None:
    pickle.loads(b"cos\ngetcwd\n.")


def _loop(_: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("do", "what"),
    [
        (_raise(KeyError("a")), "KeyError"),
        (_raise(DataError("a")), ""),
        (_raise(SystemExit(3)), "SystemExit"),
        (lambda folder: (folder / "b").write_text("inside"), ""),
        (lambda folder: (folder.parent / "b").write_text("outside"), "outside of the folder"),
        (lambda folder: (folder / ".." / "b").mkdir(), "outside of the folder"),
        (lambda folder: (folder / "a.txt").replace(folder.parent / "b"), "outside of the folder"),
        (lambda folder: (folder.parents[1] / "now").read_text(), "outside of the folder"),
        (lambda _: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda _: socket.create_connection(("127.0.0.1", 9)), "socket."),
        (_unpickle, "pickle.find_class"),
        (lambda _: os.kill(os.getpid(), signal.SIGTERM), "os.kill"),
        # More than the pages of libraries that the kernel may take back meanwhile.
        (lambda _: b"x" * 2**29, "memory grew"),
        (lambda _: bytearray(2**33), "MemoryError"),
        (lambda _: os.abort(), "ended with -6"),
        (_loop, "computed for 1 s"),
        (lambda _: time.sleep(1000), "waited for 1 s"),
    ],
)
def test_the_watch_sees(do: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (timer, _, doing) in TIMERS.items():
        if what.startswith(doing):
            monkeypatch.setitem(TIMERS, number, (timer, 1, doing))
    reader = Reader(name="r", make=_make, read=_only_when_changed(do), memory=2**26)
    found = run_reader(reader, tmp_path, seed=1, cases=2)
    assert found.cases == 2
    if what:
        assert found.failures
        assert all(what in failure.what for failure in found.failures)
    else:
        assert not found.failures


@pytest.mark.parametrize("reads", [1, 2])
def test_what_a_case_took_is_given_back_before_the_next(reads: int, tmp_path: Path) -> None:
    held: list[weakref.ref[set[int]]] = []

    def refuse() -> None:
        decoded = {1}
        held.append(weakref.ref(decoded))
        raise DataError("never")

    def do(_: Path) -> None:
        assert not any(one() for one in held)
        each(refuse, refuse) if reads > 1 else refuse()

    gc.disable()
    try:
        found = run_reader(Reader(name="r", make=_make, read=_only_when_changed(do)), tmp_path, seed=1, cases=20)
    finally:
        gc.enable()
    assert found.refused > 2
    assert not found.failures


def test_a_case_is_a_function_of_its_seed_and_number(tmp_path: Path) -> None:
    reader = READERS["class-list"]
    trees = []
    for name, first in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        corpus = Corpus(reader, tmp_path / name)
        for number in range(first, 6):
            folder = corpus.case(7, number)
            trees.append({path.name: path.read_bytes() for path in folder.iterdir()})
            corpus.restore(folder)
    assert trees[3:6] == trees[6:]
    assert len({str(tree) for tree in trees[:6]}) > 3


def test_what_is_whole_must_be_read(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not read what is whole"):
        run_reader(Reader(name="r", make=_make, read=_raise(DataError("never"))), tmp_path, seed=1, cases=2)
