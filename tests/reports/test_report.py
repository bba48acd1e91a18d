"""The report: complete, self-contained, the same each time, and readable in a browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import change_record
from support.images import png, write_tar
from support.project import SETTINGS, Project

from milan_pipe import api, cli
from milan_pipe.config.params import load_params
from milan_pipe.drawing.charts import Curve, bar_chart, line_chart
from milan_pipe.drawing.page import render
from milan_pipe.drawing.sheet import Panel, Row, Sheet, printable_line, printable_lines
from milan_pipe.evaluation.results import Evaluation, keep_evaluation, read_evaluations
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


def test_runs_of_the_same_weights_share_a_row(project: Project, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(project.runs[0], tmp_path / name)
    table = transfer_table(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert table is not None
    assert [row[0].text for row in table.rows] == ["MILAN student (a), MILAN student (b)"]


def test_the_scores_of_a_run_are_those_of_weights_that_are_there(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.runs[2], tmp_path / "tuned")
    (file,) = (tmp_path / "tuned").glob("checkpoints/*/checkpoint.json")
    change_record(file.parent, lambda record: record.update(finished=False))
    (run,) = read_runs([tmp_path / "tuned"])
    assert (tmp_path / "tuned" / "report.json").is_file()
    assert (run.report, run.finished) == ({}, False)


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@dataclass
class Shown:
    """A page in a browser, what it said (errors and what its policy refused, too) and what it asked for."""

    tab: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def attributes(self) -> set[str]:
        """Every element, and every attribute with the element that has it."""
        find = "[...document.querySelectorAll('*')].flatMap(e => [e, ...e.attributes])"
        return set(self.tab.evaluate(f"{find}.map(a => (a.ownerElement ?? a).tagName + ' ' + a.nodeName)"))


@contextlib.contextmanager
def shown(browser: Any, page: Path, width: int = 1280) -> Iterator[Shown]:
    tab = browser.new_page(viewport={"width": width, "height": 800})
    found = Shown(tab)
    tab.on("console", lambda message: found.said.append(message.text))
    tab.on("pageerror", lambda error: found.said.append(str(error)))
    tab.on("dialog", lambda dialog: (found.said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: found.asked.append(request.url))
    tab.goto(page.as_uri())
    yield found
    assert [url for url in found.asked if not url.startswith("data:")] == [page.as_uri()]
    tab.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(browser: Any, page: Path, width: int) -> None:
    """No error, nothing asked of the network, every image there, nothing wider than the window."""
    with shown(browser, page, width) as found:
        tab = found.tab
        for element in tab.query_selector_all("details"):
            element.query_selector("summary").click()
            assert element.get_attribute("open") is not None
        tab.click("nav a[href='#settings']")
        assert tab.evaluate("document.querySelector(':target').textContent") == "Settings"
        broken = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        images = tab.evaluate("document.images.length")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        small = tab.evaluate(
            "[...document.querySelectorAll('p, td, th, figcaption, pre, h1, h2, h3')]"
            ".filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length"
        )
        assert tab.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "1200px"
        # Curves are styled within their image, which the policy of the page leaves alone.
        drawn = tab.query_selector(".charts img").screenshot()
        colours = {colour for _, colour in Image.open(io.BytesIO(drawn)).convert("RGB").getcolors(1 << 24)}
        assert (0, 0x72, 0xB2) in colours
        assert found.said == []
    assert (broken, small) == (0, 0)
    assert images > 50
    assert wide == width


ATTACK = (
    "\"'><script>ran=1</script></title></style></pre></details>--><img src=x onerror=ran=1><svg onload=alert(1)>"
    '<a href="javascript:ran=1" style="color:red">]]>{{ 7*7 }}&lt;\u2028\u202e\x00'
)
NAME = "\"'><svg onload=alert(1)><img src=x onerror=ran=1>{{ 7*7 }}&lt;\u2028\u202e"
"""As ATTACK, as far as a file may be named so."""


@pytest.fixture(scope="module")
def attacked(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs, of a store and of results that say ATTACK wherever they may say what they like."""
    root = tmp_path_factory.mktemp("attacked")
    pixels = png(np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8))
    key = ATTACK.rstrip("\x00").replace(".", "")
    members = {f"{key}.png": pixels, "b.png": pixels, f"{key}2.png": b"bad"}
    api.extract_targets(
        write_tar(root / "a.tar", members), root / NAME, load_params(None, [*SETTINGS, "extract.max_bad_fraction=0.5"])
    )

    def change(record: dict[str, Any]) -> None:
        record |= {"command": ATTACK, "targets": str(root / NAME)}
        record["settings"][ATTACK] = ATTACK

    def change_target(record: dict[str, Any]) -> None:
        change(record)
        record["settings"]["target"] = ATTACK

    runs = [root / name / f"{NAME}{name}" for name in "ab"]
    for run, changes in zip(runs, (change, change_target), strict=True):
        shutil.copytree(project.runs[0], run)
        (file,) = run.glob("checkpoints/*/checkpoint.json")
        change_record(file.parent, changes)
    evaluation = Evaluation(
        task="knn", subject=ATTACK, identity="0", scores={"best": 0.5, ATTACK: 1}, data=ATTACK, train=1, test=1,
        command=ATTACK,
    )  # fmt: skip
    keep_evaluation(root / "kept", evaluation)
    extraction = {"views": 9, "seconds": 2.5, "views_per_second": 3.4, "phases": {ATTACK: 1.5}}
    with pytest.warns(RuntimeWarning, match="without predictions"):
        api.report(runs, root / "r.html", evaluations=[root / "kept"], extraction=extraction)
    return root / "r.html"


def test_what_runs_and_stores_say_is_shown_and_never_run(browser: Any, page: Path, attacked: Path) -> None:
    with shown(browser, page) as usual:
        may = usual.attributes()
    with shown(browser, attacked) as found:
        # The list of skipped images has no like in the other.
        assert found.attributes() <= may | {"UL UL", "LI LI"}
        for element in found.tab.query_selector_all("summary"):
            element.click()
        text = found.tab.inner_text("body")
        assert text.count(printable_line(ATTACK)) > 10
        assert text.count(NAME.partition("\u2028")[0]) > 10
        assert found.tab.evaluate("typeof ran") == "undefined"
        assert found.tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
        assert found.tab.evaluate("[...document.links].every(a => a.getAttribute('href').startsWith('#'))")
        assert found.said == []


@pytest.mark.parametrize(
    "markup",
    [
        "<script>ran=1</script>",
        "<img src='data:,' onerror='ran=1'>",
        "<script src='data:text/javascript,ran=1'></script>",
        "<style>main { color: red }</style>",
        "<iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
        "<base href='http://127.0.0.1:9/'>",
        "<form id='f' action='http://127.0.0.1:9/'></form>",
    ],
)
def test_markup_that_got_into_a_page_would_be_refused(browser: Any, tmp_path: Path, markup: str) -> None:
    text = render("gallery.html.j2", title="x", facts={}, sheets=[])
    (tmp_path / "x.html").write_text(text.replace("<h1>", f"{markup}<h1>"))
    with shown(browser, tmp_path / "x.html") as found:
        # A form is no inline code: it is refused when it is sent.
        found.tab.evaluate("document.getElementById('f')?.submit()")
        while not any("Content Security Policy" in line for line in found.said):
            found.tab.wait_for_timeout(20)
        assert found.tab.evaluate("typeof ran") == "undefined"
        assert found.tab.evaluate("getComputedStyle(document.querySelector('main')).color") == "rgb(27, 31, 36)"


class Parsed(HTMLParser):
    """Elements with the names of their attributes, in order, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[str]]] = []
        self.texts: list[str] = []
        self.alternatives: list[str | None] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attrs]))
        self.alternatives += [value for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def gallery(text: str) -> Parsed:
    panel = Panel(np.zeros((1, 1, 3), np.uint8), text)
    sheets = [Sheet(text, [Row(f"x{text}", [panel])])]
    return Parsed(render("gallery.html.j2", title=text, facts={text: text}, sheets=sheets))


PIECES = (
    *("<", ">", '"', "'", "&", "/", "=", "--", "]]>", "<!--", "</title>", "</style>", "<script>", "&#60;", "{{", "{%"),
    *("\n", "\r", "\0", "x", " on", "\u2028", "\ud800"),
)


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=60, deadline=None)
@example(ATTACK)
@example("x" * 100_000)
def test_any_text_in_a_page_stays_text(text: str) -> None:
    found = gallery(text)
    assert found.elements == gallery("x").elements
    assert found.alternatives == [printable_lines(text)]
    assert text == "" or {printable_lines(text), printable_line(text)} <= set(found.texts)


OF_CHARTS = {
    *("svg", "metadata", "RDF", "Work", "type", "format", "creator", "Agent", "title"),
    *("defs", "style", "g", "path", "use", "clipPath", "rect"),
}


@pytest.mark.parametrize(
    "text", ["", "\0", "\x01", "\ud800", "\ufffe", "--><x/>", "]]>", "$x^", "x" * 5000, "_x", ATTACK]
)
def test_any_name_is_drawn_in_a_chart_that_stays_xml(text: str) -> None:
    for url in (
        line_chart(text, "x", "y", {text: Curve([1, 2], [1, 2]), "b": Curve([1], [1])}),
        bar_chart("t", "y", {text: {text: 1, "b": 2}}),
    ):
        head, _, data = url.partition(",")
        assert head == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        assert {element.tag.rpartition("}")[2] for element in root.iter()} <= OF_CHARTS
