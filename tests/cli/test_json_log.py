"""With --log-json stderr is one JSON object a line, of every command, with numbers as numbers."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support import processes
from support.project import Project, params_file
from support.wild import Command

from milan_pipe.cli import json_log
from milan_pipe.cli.console import as_command
from milan_pipe.errors import MilanError


def told(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
        assert line["level"] in ("info", "warning", "error")
        assert line["event"] in ("progress", "warning", "error", "report")
    return lines


def run(
    words: list[str], folder: Path, code: int = 0, *before: str
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    words = [sys.executable, "-m", *before, "milan_pipe", "--log-json", *words]
    done = processes.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    # torchrun has a warning of its own.
    text = done.stderr[done.stderr.index("{") :] if before else done.stderr
    return told(text), done


@pytest.mark.ci
def test_commands(project: Project, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(params_file())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    images = str(project.root / "images" / "train-*.tar")
    progress, report = run(["extract-targets", images, "targets"], tmp_path)[0][-2:]
    assert (progress["completed"], progress["total"], progress["views"], progress["bad"]) == (2, 2, 96, 0)
    assert {"rate", "seconds_left", "views_per_second"} <= progress.keys()
    assert (report["command"], report["event"], report["samples"]) == ("extract-targets", "report", 48)
    lines, done = run(["pretrain", "targets", "run", "--json"], tmp_path)
    assert lines[-2]["event"] == "progress"
    assert lines[-2]["completed"] == lines[-2]["total"] == lines[-1]["steps"] == 6
    assert all(type(lines[-2][name]) is float for name in ("loss", "lr", "images_per_second", "data_wait"))
    # What --json prints on stdout stays as it is, and is what the log has.
    assert json.loads(done.stdout) == {name: lines[-1][name] for name in json.loads(done.stdout)}
    plan = run(["plan", images, "--sample", "2"], tmp_path)[0]
    assert next(line["event"] for line in plan if line["event"] != "progress") == "report"
    (error,) = run(["knn", "none", images, images], tmp_path, 2)[0]
    assert (error["event"], error["level"], error["command"]) == ("error", "error", "knn")
    assert "none is not there" in error["message"]
    (refused,) = run(["prepare", "photos", "out"], tmp_path, 2)[0][-1:]
    assert refused["message"].startswith("none of the 1 images")


@pytest.mark.slow
def test_ranks_and_workers(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks the first tells, and each says which it is; workers of a cluster say nothing else."""
    (tmp_path / "params.yaml").write_text(params_file())
    images = str(project.root / "images" / "train-*.tar")
    lines = run(["extract-targets", images, "targets", "--workers", "2"], tmp_path)[0]
    assert lines[-2]["workers"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or torchrun says that it sets it
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
    lines = run(["pretrain", "targets", "run"], tmp_path, 0, *torchrun)[0]
    assert [(line["rank"], line["event"]) for line in lines[-2:]] == [(0, "progress"), (0, "report")]
    assert {line["event"] for line in lines[:-2]} <= {"warning"}


@pytest.mark.parametrize(
    ("words", "command", "part"),
    [
        (["--log-json"], "milan-pipe", "Missing command"),
        (["--log-json", "--bad"], "milan-pipe", "--bad"),
        (["--log-json", "nose"], "milan-pipe", "'nose'"),
        (["--log-json", "knn", "a"], "knn", "'TRAIN'"),
        (["knn", "--log-json"], "knn", "--log-json"),
        (["--log-json", "knn", "--s3://u:SECRET@b"], "knn", "--s3://***@b"),
    ],
)
def test_usage_errors(
    words: list[str], command: str, part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Command(capsys, monkeypatch)(*words)
    (line,) = told(done.err)
    assert (done.code, line["event"], line["command"]) == (2, "error", command)
    assert part in line["message"]
    assert re.search("; see `.*milan-pipe.* --help`$", line["message"])
    # The next command of the process is one for people again.
    assert "Usage:" in Command(capsys, monkeypatch)("knn").err


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, {"message": "interrupted: what was committed stays"}),
        (ZeroDivisionError('of "https://u:SECRET@h/a?b=SECRET"\nhere'), 1,
         {"message": 'of "https://***@h/a?***" here', "type": "ZeroDivisionError"}),
        (ZeroDivisionError(), 1, {"message": "ZeroDivisionError", "type": "ZeroDivisionError"}),
    ],
)  # fmt: skip
def test_what_ends_a_command(
    error: BaseException,
    code: int,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(json_log.VARIABLE, "1")

    @as_command()
    def command() -> None:
        logging.Logger("library").warning("%d things\nare odd", 2)
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    first, last = told(capsys.readouterr().err)
    assert (first["event"], first["message"]) == ("warning", "2 things are odd")
    assert (ended.value.code, last["event"]) == (code, "error")
    assert last.items() >= expected.items()
    assert ("in command" in last.get("traceback", "")) == (code == 1)
    assert "SECRET" not in str(last)


def test_long_lists_of_a_report_are_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(json_log.VARIABLE, "1")
    bad = [(f"{number}.jpg", "is empty") for number in range(1000)]
    json_log.tell_report("photos", {"bad": bad, "files": dict(bad), "few": [1, 2]})
    (line,) = told(capsys.readouterr().err)
    assert (line["bad_count"], line["files_count"], line["few"]) == (1000, 1000, [1, 2])
    assert line["bad"] == [list(one) for one in bad[:20]]
    assert line["files"] == dict(bad[:20])
    assert "few_count" not in line


def test_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    error = MilanError("of s3://user:SECRET@host/x\x1b[2J\n")
    json_log.tell("error", message=str(error), folder=Path("a"), url="https://u:SECRET@host/", loss=float("nan"), n=1)
    (line,) = told(capsys.readouterr().err)
    assert (line["rank"], line["loss"], line["n"], line["folder"]) == (3, None, 1, "a")
    assert line["url"] == "https://***@host/"
    assert line["message"] == "of s3://***@host/x\\x1b[2J\n"


def test_the_environment_asks_for_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILAN_PIPE_LOG_JSON", "1")
    done = processes.run(
        [sys.executable, "-m", "milan_pipe", "export", "none", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert [line["event"] for line in told(done.stderr)] == ["error"]
