"""Files of metrics, with dvclive and without; damaged by a power loss, a run goes on and no file is lost."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

from milan_pipe.training.metrics import cut_metrics, read_metric
from milan_pipe.training.sinks import open_sinks

ROWS = ["step\tloss\n", "10\t2.5\n", "20\t1.25\n", "30\t0.5\n"]
WHOLE = "".join(ROWS).encode()
DAMAGED = {
    "empty": (b"", None),
    "no header": (b"10\t2.5\n20\t1.25\n", None),
    "cut header": (b"ste", None),
    "zeros": (bytes(200_000), None),
    "zeros at the end": (WHOLE[:-7] + bytes(4000), ROWS[:3]),
    "zeros inside": (b"step\tloss\n10\t2.5\n\0\0\0\0\n20\t1.25\n", ROWS[:3]),
    "not UTF-8": (b"\xff\xfe\x80\n\x81\t2\n", None),
    "a row that is not UTF-8": (b"step\tloss\n10\t2.5\n\xff\t2\n20\t1.25\n", ROWS[:3]),
    "words": (b"step\tloss\nten\t2.5\n20\t1.25\n", [ROWS[0], ROWS[2]]),
    "a row too long": (b"step\tloss\n10\t2.5\t3\n20\t1.25\n", [ROWS[0], ROWS[2]]),
}


@pytest.fixture(params=["dvclive", "without dvclive"], autouse=True)
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "dvclive":
        monkeypatch.setitem(sys.modules, "dvclive.live", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metrics = tmp_path / "metrics"
    (metrics / "plots" / "metrics" / "train").mkdir(parents=True)
    return metrics


@pytest.fixture
def loss(folder: Path) -> Path:
    return folder / "plots" / "metrics" / "train" / "loss.tsv"


def goes_on(folder: Path, step: int) -> None:
    """As a run does that goes on after `step`."""
    cut_metrics(folder, step)
    with open_sinks(folder, (), step, {}) as sinks:
        for sink in sinks:
            sink.point(step + 10, {"train/loss": 0.25})


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_renamed_and_the_run_goes_on(folder: Path, loss: Path, kind: str) -> None:
    data, kept = DAMAGED[kind]
    loss.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"loss\.tsv\.damaged"):
        goes_on(folder, 20)
    assert loss.with_name("loss.tsv.damaged").read_bytes() == data
    assert loss.read_text() == "".join([*(kept or ROWS[:1]), "30\t0.25\n"])


def test_a_second_one_does_not_replace_the_first(folder: Path, loss: Path) -> None:
    for data in (b"", b"x"):
        loss.write_bytes(data)
        with pytest.warns(RuntimeWarning, match="damaged"):
            cut_metrics(folder, 20)
    assert loss.with_name("loss.tsv.damaged").read_bytes() == b""
    assert loss.with_name("loss.tsv.damaged-2").read_bytes() == b"x"


@pytest.mark.parametrize("tail", ["", "30\t0.5\n", "30\t0.", "3", "20"])
def test_a_last_line_that_was_cut_is_no_damage(folder: Path, loss: Path, tail: str) -> None:
    loss.write_text("".join(ROWS[:3]) + tail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        goes_on(folder, 20)
    assert loss.read_text() == "".join([*ROWS[:3], "30\t0.25\n"])


@pytest.mark.parametrize(
    "data", [b"", b"{", bytes(500), b"\xff", b"[]", b"null", b'{"step": "x"}', b'{"train": 1, "step": 20}']
)
def test_damaged_last_values_are_moved(folder: Path, data: bytes) -> None:
    (folder / "metrics.json").write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"metrics\.json\.damaged"):
        goes_on(folder, 20)
    assert (folder / "metrics.json.damaged").read_bytes() == data
    assert json.loads((folder / "metrics.json").read_text()) == {"train": {"loss": 0.25}, "step": 30}


def test_whole_last_values_are_kept(folder: Path) -> None:
    (folder / "metrics.json").write_text(json.dumps({"train": {"loss": 1.0}, "val": {"top1": 0.5}, "step": 20}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        goes_on(folder, 20)
    assert json.loads((folder / "metrics.json").read_text())["val"] == {"top1": 0.5}


def test_the_files_are_the_same_without_dvclive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(1, {"train/loss": 0.1 + 0.2, "train/lr": 1e-7}), (2, {"train/loss": float("nan"), "alone": 3.0})]

    def written(folder: Path) -> dict[str, bytes]:
        # What an earlier run left is removed by a new one, and kept by one that goes on.
        for first, some in ((0, points[:1]), (0, points), (2, [(3, {"val/top1": 1.0})])):
            with open_sinks(folder, (), first, {}) as sinks:
                for step, values in some:
                    sinks[0].point(step, values)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "dvclive.live", raising=False)
        theirs = written(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "dvclive.live", None)
    assert written(tmp_path / "ours") == theirs
    assert len(theirs) == 5


def test_values_that_are_not_finite_are_no_damage(loss: Path) -> None:
    loss.write_text("step\tloss\n10\tnan\n20\t-inf\n")
    assert read_metric(loss).damage is None
