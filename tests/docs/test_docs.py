"""The pages build, are up to date, and say only commands that the command line takes."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from support.pages import PAGES, ROOT, blocks, shell_lines
from support.project import SETTINGS, Project, params_file

from milan_pipe import api
from milan_pipe.cli import app
from milan_pipe.config.params import load_params


def milan_commands(page: Path) -> list[list[str]]:
    """Words after `milan-pipe`, of every such command in a page's shell blocks."""
    found = []
    for line in [line for block in blocks(page, "console", "bash") for line in shell_lines(block.text)]:
        for part in re.split(r"&&|\|(?!\|)|;", line):
            words = shlex.split(part, comments=True)
            for start, end in (("milan-pipe", 1), ("-m", 2)):
                if start in words and words[words.index(start) :][:end][-1] in ("milan-pipe", "milan_pipe"):
                    found.append(words[words.index(start) + end :])
                    break
    return found


def shown(value: object) -> str:
    return " ".join(value)[:60] if isinstance(value, list) else str(value)


ALL = [(page.name, words) for page in PAGES for words in milan_commands(page)]


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 80
    assert {"demo", "doctor", "report", "extract-targets", "pretrain", "segment"} <= {
        words[0] for _, words in ALL if words
    }


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value
)
def test_the_command_line_takes_every_command_of_the_docs(page: str, words: list[str]) -> None:
    """Command, options, number of arguments and every setting are known; nothing is run."""
    del page
    words = words[: words.index(">")] if ">" in words else words
    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("milan-pipe", list(words), resilient_parsing=False)
    except click.exceptions.Exit:
        return
    rest = [*context._protected_args, *context.args]
    if not rest:
        return
    name, command, arguments = group.resolve_command(context, rest)
    try:
        found = command.make_context(name, arguments, parent=context)
    except click.exceptions.Exit:
        return
    params, overrides = found.params.get("params"), found.params.get("overrides")
    if params is not None and Path(params).suffix:
        params = None
    load_params(params, overrides or [])


def test_generated_pages_are_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_commands.py"))["commands_page"]()
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == page, "run python docs/generate_commands.py"


def test_every_command_is_in_the_reference_with_an_example() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"## {name}\n" in text
        assert command.help, name


def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    scripts = r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//'
    styles = r'<link[^>]+rel="?(?:stylesheet|preconnect)[^>]+href="(?:https?:)?//'
    fetched = re.compile(f"{scripts}|{styles}")
    for page in pages:
        assert not fetched.search(page.read_text(encoding="utf-8")), page


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def names(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in names(part)]

    assert sorted(names(config["nav"])) == sorted(page.name for page in PAGES[1:])


@pytest.fixture(scope="module")
def both_formats(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `targets` and `tars`, as the page of other readers has them."""
    folder = tmp_path_factory.mktemp("reading")
    api.extract_targets(project.images[0], folder / "targets", load_params(None, [*SETTINGS, "codec.name=int8"]))
    api.convert_targets(folder / "targets", folder / "tars", format="webdataset")
    return folder


READERS = [block.text for block in blocks(ROOT / "docs" / "reading.md", "python")]


@pytest.mark.ci
def test_other_libraries_read_a_store_without_a_warning(both_formats: Path) -> None:
    """All in one process, as each imports torch or Dask."""
    assert len(READERS) == 4
    code = "\n".join(READERS)
    (both_formats / "page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning", "page.py"],
        capture_output=True, text=True, check=False, cwd=both_formats,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for shape in ("(64, 64, 3) (65, 128)", "(4, 65, 128)", "(128,)", "torch.Size([4, 3, 64, 64])"):
        assert shape in done.stdout
    assert "milan_pipe" not in code.replace('"milan_pipe"', "")


@pytest.mark.ci
def test_the_python_page_runs_as_a_script(tmp_path: Path) -> None:
    """In a process of its own, without the guard that processes of the standard library would need."""
    (tmp_path / "params.yaml").write_text(params_file())
    code = "\n".join(block.text for block in blocks(ROOT / "docs" / "python.md", "python"))
    (tmp_path / "page.py").write_text(code.replace("pretrain.epochs=5", "pretrain.epochs=2"))
    done = subprocess.run(
        [sys.executable, "page.py"], capture_output=True, text=True, check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "% by k-NN" in done.stdout
    assert "48 2 (8, 8) 128" in done.stdout
    assert "torch.Size([1, 65, 32])" in done.stdout
    assert (tmp_path / "report.html").is_file()
