"""`doctor` says what is wrong with a location; `demo` runs everything, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support import processes
from support.s3 import create_bucket
from support.targets import header, write_store

from milan_pipe import api, cli
from milan_pipe.config.params import load_params


def test_locations_of_every_kind(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(shards=3), [2, 3])
    before = sorted(path.name for path in (tmp_path / "t").iterdir())
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    locations = [tmp_path / name for name in ("t", "full", "none/deeper", "file/below")]
    report = api.doctor(locations, write=True)
    store, full, none, below = report.locations
    assert store.found.startswith("target store, zarr: 5 images, 2 views, teacher 'demo', grid 2 x 2, codec 'int8'")
    assert "2 of 3 shards, not complete" in store.found
    assert full.found.startswith("no target store; 1 entries")
    assert (none.found, none.problem) == ("not there yet", None)
    assert none.free_bytes is not None
    assert below.problem is not None
    assert below.problem.endswith("file is no folder")
    assert len(report.problems) == 1
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == before
    assert report.pipeline == "zarrs"
    assert report.threads >= 1
    assert report.packages["core"]["torch"] is not None
    assert set(report.packages["segment"]) == {"segmentation-models-pytorch"}


def test_a_damaged_store_and_an_unknown_scheme_are_problems(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(), [2])
    (tmp_path / "t" / "manifest.json").write_text("{}")
    report = api.doctor([tmp_path / "t", "ftp://host/x"])
    assert "manifest.json is damaged" in report.problems[0]
    assert "ftp" in report.problems[1]


@pytest.mark.usefixtures("aws_environment")
def test_a_bucket_is_reached_and_written(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    bucket = "looked-at"
    create_bucket(s3_endpoint, bucket)
    good, bad = api.doctor([f"s3://{bucket}/targets", "s3://not-a-bucket-here/targets"], write=True).locations
    assert good.problem is None
    assert good.found == "empty; written to and cleaned"
    assert bad.problem is not None


def test_the_exit_code_says_whether_something_is_wrong(tmp_path: Path) -> None:
    for location, code in ((tmp_path, 0), ("ftp://x/y", 1)):
        done = processes.run(
            [sys.executable, "-m", "milan_pipe", "doctor", str(location), "--json"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["params"] is None


def test_demo_runs_every_stage_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "demo.yaml"
    small.write_text(
        "prepare: {seed: 2, train_scenes: 32, test_scenes: 12, samples_per_shard: 16}\n"
        "views: {count: 2}\n"
        "student: {width: 32, depth: 2, heads: 2}\n"
        "decoder: {width: 16, depth: 1}\n"
        "pretrain: {batch_size: 16, epochs: 2}\n"
        "knn: {neighbours: [1, 5]}\n"
        "linear_probe: {l2: [0.1, 1.0]}\n"
    )
    monkeypatch.setattr(import_module("milan_pipe.cli.demo"), "_RECIPE", small)
    # Packing in several processes is tested where images are.
    monkeypatch.setattr("milan_pipe.images.prepare.thread_count", lambda _: 1)
    monkeypatch.chdir(tmp_path)
    page = cli.demo(Path("here"))
    shown = capsys.readouterr().out
    for word in ("extract-targets", "verify-targets", "MILAN student", "teacher", "here/report.html"):
        assert word in shown, word
    text = page.read_text()
    assert "untrained" in text
    assert "teacher" in text
    cli.demo(Path("here"))
    again = capsys.readouterr().out
    assert "finished before, nothing was done" in again
    assert "(2 were there)" in again
    assert page.read_text() == text
    page.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli.demo(Path("here"))
    assert "without a report: here/report.html needs the package matplotlib" in capsys.readouterr().out
    assert not page.exists()


def test_the_demo_recipe_is_small() -> None:
    params = load_params("demo")
    assert params.prepare.train_scenes * params.pretrain.epochs <= 60_000
    assert params.teacher.model == "demo"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_shown(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "milan_pipe", "--show-completion", shell],
        capture_output=True, text=True, check=False,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "milan" in done.stdout.lower()


def test_the_shell_completes_commands_and_recipes() -> None:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from milan_pipe.cli import main; sys.argv[0] = 'milan-pipe'; main()"],
            capture_output=True, text=True, check=False,
            env={
                **os.environ,
                "_MILAN_PIPE_COMPLETE": "complete_bash",
                "COMP_WORDS": line,
                "COMP_CWORD": str(len(words) - 1),
            },
        )  # fmt: skip
        return done.stdout.split()

    assert {"inspect-targets", "inspect-student"} <= set(complete("milan-pipe inspect"))
    assert "imagenet1k-vit-b-16" in complete("milan-pipe pretrain targets run --params imagenet")
