"""What the errors of reports and of inspecting say, word for word. Each case has a folder of its own, with a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import change_record
from support.messages import require_message
from support.project import Project
from support.targets import header, write_store

from milan_pipe import api, cli
from milan_pipe.config.params import load_params
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.loader.dataset import open_targets
from milan_pipe.reports.runs import read_runs
from milan_pipe.reports.samples import choose_samples

STEP = "run/checkpoints/step-00000006"
CURVE = "run/metrics/plots/metrics/train/loss.tsv"
WITHOUT = "; remove it to have the report without"
LOCAL = "are written to a local folder only; name a folder, and copy it to the URL afterwards"


def report(**options: Any) -> object:
    return api.report(["run"], "r.html", **options)


def report_with(file: str, content: bytes) -> object:
    Path(file).write_bytes(content)
    return report()


def evaluation(content: str) -> object:
    next(Path("run/evaluations").iterdir()).write_text(content)
    return report()


def below_a_file(write: Callable[[str], object]) -> object:
    Path("file").touch()
    return write("file/o")


def student_of(project: Project, **targets: Any) -> object:
    write_store("t", header(**targets), [3])
    return api.inspect_student(project.runs[0], "t", "o")


def command(extraction: str | None) -> object:
    if extraction is not None:
        Path("x.json").write_text(extraction)
    return cli.report(["run"], Path("r.html"), extraction=Path("x.json"))


def sample(keys: tuple[str, ...], count: int) -> object:
    write_store("t", header(), [3])
    return choose_samples(open_targets("t"), keys, count)


CASES: dict[str, tuple[Callable[[Project], object], type[Exception], str]] = {
    "no run": (
        lambda _: api.report([], "r.html"),
        SettingError,
        "a report needs a run; name the folders that `milan-pipe pretrain` and others wrote",
    ),
    "run that is not there": (
        lambda _: api.report(["none"], "r.html"),
        MissingError,
        "none is not there; expected the folder of a run",
    ),
    "links that lead to each other": (
        lambda _: (Path("a").symlink_to("b"), Path("b").symlink_to("a"), api.report(["a", "b"], "r.html")),
        MissingError,
        "a is not there; expected the folder of a run",
    ),
    "checkpoint for a run": (
        lambda _: api.report([STEP], "r.html"),
        DataError,
        f"{STEP} is a checkpoint; name the folder of its run",
    ),
    "damaged curve": (
        lambda _: report_with(CURVE, b"step\tloss\n1\tx\n"),
        DataError,
        f"{CURVE} cannot be read (it ...){WITHOUT}",
    ),
    "curve of zeros": (
        lambda _: report_with(CURVE, bytes(200_000)),
        DataError,
        f"{CURVE} cannot be read (it ...){WITHOUT}",
    ),
    "damaged report of a run": (
        lambda _: report_with("run/report.json", b"{"),
        DataError,
        f"run/report.json cannot be read (JSONDecodeError){WITHOUT}",
    ),
    "damaged evaluation": (
        lambda _: evaluation('{"version": 1}'),
        DataError,
        "run/evaluations/knn-....json is no result that `milan-pipe knn`, `linear-probe` or `segment-probe` kept "
        "(...); remove it, and run them again",
    ),
    "no evaluations": (
        lambda _: report(evaluations=["none"]),
        SettingError,
        "--evaluations none: no such folder; name one that `milan-pipe knn --keep` wrote",
    ),
    "no extraction": (
        lambda _: report(extraction={"phases": {}}),
        DataError,
        "--extraction: this is no result of `milan-pipe extract-targets --json` that did some work (...)",
    ),
    "extraction that is not there": (lambda _: command(None), MissingError, "--extraction x.json is not there"),
    "damaged extraction": (lambda _: command("{"), DataError, "--extraction x.json cannot be read: Expecting ..."),
    "no store": (lambda _: report(targets="gone"), MissingError, "gone is not there; write targets with ..."),
    "report below a file": (
        lambda _: below_a_file(lambda file: api.report(["run"], file)),
        StoreError,
        "file/o cannot be written: ...",
    ),
    "report to a URL": (
        lambda _: api.report(["run"], "s3://bucket/r.html"),
        SettingError,
        f"s3://bucket/r.html is a URL, and reports {LOCAL}",
    ),
    "images below a file": (
        lambda project: below_a_file(lambda folder: api.inspect_targets(project.targets, folder, count=1)),
        StoreError,
        "file/o... cannot be written: ...",
    ),
    "images to a URL": (
        lambda project: api.inspect_targets(project.targets, "s3://bucket/o"),
        SettingError,
        f"s3://bucket/o is a URL, and images {LOCAL}",
    ),
    "no visible patch": (
        lambda project: api.inspect_targets(project.targets, "o", load_params(None, ["masking.ratio=0.999"])),
        SettingError,
        "...leaves 0 of 64 patches visible...",
    ),
    "other teacher": (
        lambda project: student_of(project, size=64, grid=(8, 8), width=128),
        MismatchError,
        "... learned from teacher 'demo' (weights ...), the store is of 'demo' (weights abababababab); name the "
        "targets that it was trained on, or others of the same teacher",
    ),
    "views of another size": (
        lambda project: student_of(project, size=16),
        MismatchError,
        "the store has views of 16 pixels, the student reads 64; set student.image_size=16, or extract with "
        "student.image_size=64",
    ),
    "run without a decoder": (
        lambda project: api.inspect_student(project.runs[2], project.targets, "o"),
        DataError,
        "... holds no decoder; name a checkpoint that `milan-pipe pretrain` wrote",
    ),
    "no such view": (
        lambda project: api.inspect_student("run", project.targets, "o", view=2),
        SettingError,
        "view 2: ... has views 0 to 1",
    ),
    "no such sample": (
        lambda _: sample(("nothing", "such"), 1),
        MissingError,
        "t has no sample nothing, such; its keys are such as dir/k...",
    ),
    "no samples": (lambda _: sample((), 0), SettingError, "number of images: found 0, expected at least 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project.runs[0], "run")
    provoke, kind, message = CASES[case]
    require_message((lambda: provoke(project), kind, message))


@pytest.mark.parametrize("text", ["5", "[]", "[" * 100_000])
def test_a_report_of_another_form_is_one_error(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    shutil.copytree(project.runs[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"report\.json cannot be read .*; remove it to have the report without"):
        report_with("run/report.json", text.encode())


def test_numbers_that_are_too_large_are_shown_or_refused(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project.runs[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for chart in ("line_chart", "bar_chart"):
        monkeypatch.setattr(f"milan_pipe.reports.report.{chart}", lambda *_: "")
    report_with("run/report.json", b'{"loss": 1%s}' % (b"0" * 400))
    with pytest.raises(DataError, match="this is no result of"):
        report(extraction={"views": 10**400, "seconds": 1, "views_per_second": 10**400, "phases": {"a": 1}})


def test_a_run_of_a_decoder_without_a_name_has_a_report(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.runs[0], tmp_path / "run")
    folder = next((tmp_path / "run" / "checkpoints").glob("*"))
    change_record(folder, lambda record: record["settings"]["decoder"].update(kind=["prompting"]))
    (run,) = read_runs([tmp_path / "run"])
    assert run.name == "run"
