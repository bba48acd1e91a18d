"""The report: complete, self-contained, the same each time, and readable in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.checkpoints import change_record
from support.project import SETTINGS, Project

from milan_pipe import api, cli
from milan_pipe.config.params import load_params
from milan_pipe.drawing.page import render
from milan_pipe.evaluation.results import Evaluation, read_evaluations
from milan_pipe.reports.runs import read_runs
from milan_pipe.reports.scores import transfer_table
from milan_pipe.targets.store import open_targets

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extraction = {
        "views": 96, "seconds": 2.5, "views_per_second": 38.4, "phases": {"teacher": 1.5, "jpeg": 0.5},
    }  # fmt: skip
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    report = api.report(project.runs, out, evaluations=[project.root / "bounds"], extraction=extraction)
    assert report.left_out == ()
    assert report.bytes == out.stat().st_size
    return out


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a report's time."""
    for chart in ("line_chart", "bar_chart"):
        monkeypatch.setattr(f"milan_pipe.reports.report.{chart}", lambda *_: "")


def test_it_has_every_part(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("runs", "transfer", "curves", "targets", "predictions", "segmentation", "commands", "settings"):
        assert f'<h2 id="{part}">' in text
        assert f'href="#{part}"' in text
    for word in ("untrained", "75.0 %", "decoder.kind", "int8", "mean cosine 0.9999", "0 skipped"):
        assert word in text, word
    # Two samples of two views and four rows; four samples of six panels for each of two students.
    assert text.count("<figure><img") >= 2 * 2 * 4 + 2 * 4 * 6
    assert "not recorded" not in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_first_screen_tells_the_story(page: Path) -> None:
    first = page.read_text(encoding="utf-8").split("<nav>")[0]
    assert re.search(r"<h1>MILAN student, MAE student</h1>", first)
    assert "features of the teacher demo" in first
    assert "its own pixels" in first
    assert '<td class="best">' in first
    for caption in ("teacher&#39;s attention", "seen: ", "target", "prediction"):
        assert f"<figcaption>{caption}" in first
    # The scene of the first screen is not drawn again below.
    assert page.read_text(encoding="utf-8").count("<figcaption>teacher&#39;s attention") == 8


def test_the_same_runs_give_the_same_bytes(project: Project, tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        api.report(project.runs[:2], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_scores_stand_in_the_row_of_their_student(project: Project) -> None:
    runs = read_runs(list(project.runs))
    table = transfer_table(runs, read_evaluations(project.root / "bounds"))
    assert table is not None
    rows = {row[0].text: dict(zip(table.columns, (cell.text for cell in row), strict=True)) for row in table.rows}
    assert list(rows) == ["untrained", "MILAN student", "MAE student", "teacher"]
    assert table.columns == ["student", "k-NN", "linear probe, quick", "fine-tuned", "mIoU"]
    tuned = json.loads((project.runs[2] / "report.json").read_text())["scores"]["top1"]
    assert rows["MILAN student"]["fine-tuned"] == f"{100 * tuned:.1f} %"
    assert (
        rows["MAE student"]["fine-tuned"]
        == rows["teacher"]["mIoU"]
        == rows["MILAN student"]["linear probe, quick"]
        == "-"
    )
    best = [cell.best for row in table.rows for cell in row if cell.best]
    assert len(best) >= 4
    assert not any(cell.best for cell in table.rows[-1])


def test_two_untrained_students_are_two_rows_and_two_bars() -> None:
    def result(identity: str, best: float) -> Evaluation:
        return Evaluation(
            task="knn", subject="random", identity=identity, scores={"best": best}, data="a -> b", train=1, test=1,
            command=f"milan-pipe knn random a b --set pretrain.seed={identity}",
        )  # fmt: skip

    table = transfer_table((), [result("0", 0.1), result("1", 0.2)])
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [["untrained 1", "10.0 %"], ["untrained 2", "20.0 %"]]
    assert table.shares == {"k-NN": {"untrained 1": 0.1, "untrained 2": 0.2}}
    assert [command[0] for command in table.commands] == ["untrained 1", "untrained 2"]


def test_each_head_of_a_probe_has_a_column() -> None:
    def result(subject: str, **scores: float) -> Evaluation:
        return Evaluation(
            task="segment-probe", subject=subject, identity=subject, scores=scores, data="a -> b", train=1, test=1,
            command=f"milan-pipe segment-probe {subject} a b",
        )  # fmt: skip

    table = transfer_table((), [result("random", knn_miou=0.1), result("teacher", linear_miou=0.3, knn_miou=0.2)])
    assert table is not None
    assert table.columns == ["student", "mIoU, linear head", "mIoU, k-NN"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["untrained", "-", "10.0 %"], ["teacher", "30.0 %", "20.0 %"],
    ]  # fmt: skip


def test_each_command_is_the_command_that_made_the_number(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back by the parser of the command line, it names the same settings and paths."""
    monkeypatch.chdir(tmp_path)  # where no params.yaml changes what is built in
    for run in read_runs(list(project.runs)):
        words = shlex.split(run.record["command"])
        assert words[:2] == ["milan-pipe", run.task]
        assert words[2 + len(words[2 : words.index("--set")]) - 1] == str(project.root / run.folder)
        given = load_params(None, [words[at + 1] for at, word in enumerate(words) if word == "--set"])
        for section, values in run.record["settings"].items():
            found = getattr(given, section)
            found = found.model_dump(mode="json") if section != "target" else found
            assert found == values, section
    evaluation = read_evaluations(project.runs[0] / "evaluations")[0]
    words = shlex.split(evaluation.command)
    again = api.knn(words[2], words[3], words[4], load_params(None, words[6::2]), keep=tmp_path / "kept")
    assert again.best == evaluation.scores["best"]
    assert again.kept is not None
    assert json.loads(Path(again.kept).read_text())["identity"] == evaluation.identity


def test_probes_of_the_same_weights_are_kept_once(project: Project, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(project.runs[0], copy)
    for _ in range(2):
        api.knn(copy, *project.images, project.params)
    assert len(read_evaluations(copy / "evaluations")) == 2  # the copied one names another folder
    api.knn(copy, *project.images, load_params(None, [*SETTINGS, "knn.temperature=0.5"]))
    assert len(read_evaluations(copy / "evaluations")) == 3


@pytest.mark.usefixtures("no_charts")
def test_a_store_that_is_gone_is_named_and_left_out(project: Project, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(project.runs[0], copy)
    (file,) = copy.glob("checkpoints/*/checkpoint.json")
    change_record(file.parent, lambda record: record.update(targets=str(tmp_path / "gone")))
    with pytest.warns(RuntimeWarning, match="without store"):
        report = api.report([copy], tmp_path / "r.html")
    assert "name its location with --targets" in report.left_out[0]
    assert "gone is not there" in (tmp_path / "r.html").read_text()
    assert api.report([copy], tmp_path / "r.html", targets=project.targets).left_out == ()


@pytest.mark.usefixtures("no_charts")
def test_a_run_that_goes_on_has_a_report_too(project: Project, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(project.runs[0], copy)
    (copy / "report.json").unlink()
    (file,) = copy.glob("checkpoints/*/checkpoint.json")
    change_record(file.parent, lambda record: record.update(finished=False))
    api.report([copy], tmp_path / "r.html")
    assert "6, not finished" in (tmp_path / "r.html").read_text()


def test_names_that_are_alike_are_told_apart_and_none_is_taken_twice(project: Project, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(project.runs[0], tmp_path / name / "run")
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "a" / "run" / ".." / "run"])
    assert [run.name for run in runs] == ["MILAN student (a/run)", "MILAN student (b/run)"]


def test_what_is_put_into_a_page_is_escaped() -> None:
    text = render("gallery.html.j2", title="<script>x</script>", facts={"a&b": "<i>"}, sheets=[])
    assert "<script>" not in text
    assert "&lt;i&gt;" in text


def test_fidelity_is_kept_in_the_store_and_by_conversion(project: Project, tmp_path: Path) -> None:
    store = open_targets(project.targets)
    cosines = [store.record(shard).mean_cosine for shard in store.shards]
    assert all(cosine is not None and 0.9999 < cosine <= 1 for cosine in cosines)
    api.convert_targets(project.targets, tmp_path / "tars", format="webdataset")
    tars = open_targets(tmp_path / "tars")
    assert [tars.record(shard).mean_cosine for shard in tars.shards] == cosines


def test_the_command(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.report([str(project.runs[0])], tmp_path / "r.html", as_json=True)
    assert json.loads(capsys.readouterr().out)["page"] == str(tmp_path / "r.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(page: Path, width: int) -> None:
    """No error, nothing asked of the network, every image there, nothing wider than the window."""
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        for element in tab.query_selector_all("details"):
            element.evaluate("e => { e.open = true }")
        broken = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        images = tab.evaluate("document.images.length")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        small = tab.evaluate(
            "[...document.querySelectorAll('p, td, th, figcaption, pre, h1, h2, h3')]"
            ".filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length"
        )
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert (broken, small) == (0, 0)
    assert images > 50
    assert wide == width
