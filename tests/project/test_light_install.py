"""Without any extra the core works, and what needs one says which in a line."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from support.light import ROOT, core, environment, modules_of, requirements
from support.project import params_file

from milan_pipe.extras import Extra

MOST = 95
# What Python tells its audit hooks before it asks something of a network.
ASKED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
IMPORT = f"""
import importlib, json, pkgutil, sys

asked = []
sys.addaudithook(lambda event, of: asked.append([event, str(of)]) if event in {ASKED} else None)
import milan_pipe
names = [module.name for module in pkgutil.walk_packages(milan_pipe.__path__, "milan_pipe.")]
for name in names:
    if name != "milan_pipe.__main__":
        importlib.import_module(name)
sys.argv = ["milan-pipe", "--help"]
try:
    milan_pipe.cli.main()
except SystemExit:
    print(json.dumps([len(names), asked]))
"""
# Runs lines of commands in one process; one JSON object for each on the last lines.
RUN = """
import contextlib, io, json, sys

asked = []
sys.addaudithook(lambda event, of: asked.append(event) if event in ASKED else None)
import milan_pipe.images.prepare, milan_pipe.planning.load
from milan_pipe.cli import main

milan_pipe.planning.load._LOADER_SECONDS = 0.05
milan_pipe.images.prepare.thread_count = lambda _: 1  # packing in several processes is tested where images are
for words in json.loads(sys.argv[1]):
    sys.argv = ["milan-pipe", *words]
    code, out, err = 0, io.StringIO(), sys.stderr
    told = io.StringIO()
    with contextlib.redirect_stdout(out):
        milan_pipe.cli.console.console.file = told
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, told.getvalue(), out.getvalue()]))
print(json.dumps([0, " ".join(asked), ""]))
"""
TRAIN, TEST = "images/train-*.tar", "images/test-*.tar"
CORE = (
    "doctor",
    "prepare demo images",
    "plan images targets --sample 16",
    f"extract-targets {TRAIN} targets",
    "verify-targets targets",
    "pretrain targets run",
    f"knn run {TRAIN} {TEST}",
    f"linear-probe run {TRAIN} {TEST} --quick",
    "export run vit",
    f"embed vit {TEST} vectors --format zarr",
    "convert-targets targets tars --format webdataset",
)
MISSING = {
    f"segment run {TRAIN} {TEST} out": ("segment", "segmentation_models_pytorch"),
    "report run": ("report", "matplotlib"),
    "inspect-targets targets out": ("report", "matplotlib"),
    "inspect-student run targets out": ("report", "matplotlib"),
    "pretrain targets out --set pretrain.plot_every=1": ("report", "matplotlib"),
    f"extract-targets {TRAIN} out --workers 2": ("cluster", "distributed"),
    f"extract-targets {TRAIN} out --scheduler tcp://127.0.0.1:1": ("cluster", "distributed"),
    "prepare rows.parquet out": ("hub", "pyarrow"),
    f"embed run {TEST} out": ("hub", "pyarrow"),
    "pretrain targets out/run --set pretrain.sinks=[tensorboard]": ("sinks", "tensorboard"),
    "pretrain targets out/run --set pretrain.sinks=[wandb]": ("sinks", "wandb"),
}
Done = tuple[int, str, str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Exit code, messages and output of every line, all run in one folder by a process without extras."""
    here = tmp_path_factory.mktemp("light")
    site = tmp_path_factory.mktemp("site")
    (here / "params.yaml").write_text(params_file())
    (here / "rows.parquet").write_bytes(b"PAR1")
    lines = [*CORE, *MISSING]
    process = subprocess.run(
        [sys.executable, "-c", f"ASKED = {ASKED}\n{RUN}", json.dumps([line.split() for line in lines])],
        cwd=here, env=environment(site), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = [json.loads(line) for line in process.stdout.splitlines()]
    found.append([0, str(here), ""])
    return dict(zip([*lines, "asked", "where"], map(tuple, found), strict=True))


@pytest.mark.ci
@pytest.mark.parametrize("line", CORE)
def test_the_core_works_without_extras(done: dict[str, Done], line: str) -> None:
    code, told, _ = done[line]
    assert code == 0, told
    assert "warning" not in told


@pytest.mark.ci
def test_metrics_are_kept_without_dvclive(done: dict[str, Done]) -> None:
    metrics = Path(done["where"][1]) / "run" / "metrics"
    rows = (metrics / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    assert rows[0] == "step\tloss"
    assert [int(row.split("\t")[0]) for row in rows[1:]] == list(range(1, 7))
    latest = json.loads((metrics / "metrics.json").read_text())
    assert latest["step"] == 6
    assert latest["train"]["loss"] == float(rows[-1].split("\t")[1])


@pytest.mark.ci
def test_nothing_is_asked_of_a_network_that_is_not_told_to(done: dict[str, Done]) -> None:
    assert done["asked"][1] == ""


@pytest.mark.slow
def test_nothing_is_asked_of_a_network_by_imports_and_help() -> None:
    """With every package that is installed here."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    modules, asked = json.loads(done.stdout.splitlines()[-1])
    assert modules > 150
    assert asked == []


@pytest.mark.ci
@pytest.mark.parametrize("line", MISSING)
def test_what_needs_an_extra_says_which_in_a_line(done: dict[str, Done], line: str) -> None:
    code, told, _ = done[line]
    extra, package = MISSING[line]
    assert code == 2
    expected = f"needs the package {package}, which is not installed: pip install 'milan-pipe[{extra}]'"
    assert re.fullmatch(rf"error: .+ {re.escape(expected)}\n", told), told
    assert not list(Path(done["where"][1]).glob("out/**/*.json")), "something was written first"


def test_help_of_every_command_is_there_without_extras(tmp_path: Path) -> None:
    code = (
        "import sys, typer.main; from milan_pipe.cli import app, main\n"
        "group = typer.main.get_command(app)\n"
        "for words in [[], *([name] for name in group.commands)]:\n"
        "    group([*words, '--help'], standalone_mode=False)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert shown.count("Usage:") > 15


def test_the_core_is_small() -> None:
    assert len(core() - {"pip", "setuptools"}) <= MOST, sorted(core())


def imports(tree: ast.AST) -> Iterator[tuple[str | None, str]]:
    """Every top module that code imports, and the extra of the `with needs(...)` around it."""

    def walk(node: ast.AST, extra: str | None) -> Iterator[tuple[str | None, str]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
            named = call.args[0] if ast.unparse(call.func) == "needs" else None
            extra = str(named.value) if isinstance(named, ast.Constant) else extra
        if isinstance(node, ast.Import):
            yield from ((extra, name.name) for name in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield extra, node.module
        for child in ast.iter_child_nodes(node):
            yield from walk(child, extra)

    return walk(tree, None)


IMPORTED = {
    (extra, module, file.relative_to(ROOT).as_posix())
    for file in (ROOT / "milan_pipe").rglob("*.py")
    for extra, module in imports(ast.parse(file.read_text(encoding="utf-8")))
}
# The same files are written without it.
OPTIONAL = ("dvclive.live", "milan_pipe/training/sinks.py")


def test_each_extra_has_what_the_code_imports_under_its_name() -> None:
    asked = requirements()
    assert set(asked) == {"core", *get_args(Extra)}
    assert {extra for extra, *_ in IMPORTED} == {None, *get_args(Extra)} - {"dvc"}  # whose files are written without
    for extra, module, file in IMPORTED:
        if extra is not None:
            top = "tensorboard" if module == "torch.utils.tensorboard" else module.partition(".")[0]
            # By its name too, as not every extra is installed for the tests.
            names = modules_of(asked[extra]) | {re.split(r"\W", line)[0] for line in asked[extra]}
            assert top in names, f"{file} imports {module} under extra {extra}, which does not have it"


def test_nothing_else_imports_a_package_of_an_extra() -> None:
    asked = requirements()
    of_extras = modules_of(line for extra in get_args(Extra) for line in asked[extra]) - modules_of(asked["core"])
    assert {"matplotlib", "distributed", "dvclive", "jinja2", "segmentation_models_pytorch"} <= of_extras
    found = [
        (module, file)
        for extra, module, file in IMPORTED
        if extra is None and module.partition(".")[0] in of_extras and (module, file) != OPTIONAL
    ]
    assert not found
