"""What is around the package: citation, image, workflow, notebook and examples are valid, and do what they say."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from support import processes
from support.pages import ROOT
from support.project import SETTINGS, Project, params_file

from milan_pipe import __version__
from milan_pipe.cli import app

EXAMPLES = ROOT / "examples"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted((EXAMPLES / "slurm").glob("*.sh"))
# Writes down the command that it is given, for the test to run.
SRUN = '#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" >> "$CALLS"; printf \'\\n\' >> "$CALLS"\n'
SCONTROL = "#!/usr/bin/env bash\n[[ \"$*\" == 'show hostnames node[1-4]' ]] && printf 'localhost\\nnode2\\n'\n"
MODULES = {"milan-pipe": "milan_pipe", "torchrun": "torch.distributed.run"}


def check(tool: str, *words: str | Path) -> None:
    path = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([path, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("citation-file-format", "CITATION.cff"),
        *(("github-workflows", str(path.relative_to(ROOT))) for path in WORKFLOWS),
        ("compose-spec", "examples/docker-compose.yml"),
    ],
)
def test_a_file_is_what_its_reader_takes(schema: str, file: str) -> None:
    check("check-jsonschema", "--builtin-schema", f"vendor.{schema}", file)


def test_one_version_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert released[0] == (__version__, cited["date-released"])
    assert cited["version"] == __version__


def test_the_workflows_run_what_holds_here() -> None:
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text())["jobs"].values()]
    steps = [step for job in jobs for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert any("pip-audit" in step.get("run", "") for step in steps)
    # A tag may be moved to other code; a commit may not.
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_image_is_built_of_what_the_package_needs_and_not_as_root(tmp_path: Path) -> None:
    check("hadolint", "Dockerfile")
    text = (ROOT / "Dockerfile").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()}
    assert copied == kept
    for name in copied:
        file = ROOT / name
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / name)
    build = "from hatchling.build import build_wheel; print(build_wheel('.'))"
    made = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert __version__ in made.stdout
    assert re.search(r"^ARG BASE=\S+\nFROM \$\{BASE\}$", text, re.M)
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")


def test_the_cluster_of_compose_is_given_commands_that_exist() -> None:
    services = yaml.safe_load((EXAMPLES / "docker-compose.yml").read_text())["services"]
    for name in ("scheduler", "worker"):
        tool, kind = services[name]["entrypoint"]
        assert tool == "dask"
        main: Any = importlib.import_module(f"distributed.cli.dask_{kind}").main
        main.make_context(kind, list(services[name]["command"]))
    group: Any = typer.main.get_command(app)
    command, *words = services["extract"]["command"]
    group.commands[command].make_context(command, words)
    assert set(services) == {"scheduler", "worker", "extract"}


def test_scripts_are_clean() -> None:
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
    check("shellcheck", *SCRIPTS)


@pytest.mark.slow
def test_the_scripts_of_slurm_run_all_stages(project: Project, tmp_path: Path) -> None:
    """Each by a shell as SLURM would; what they give to `srun` is run then, pretraining in two ranks."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "params.yaml").write_text(params_file())
    shutil.copytree(project.root / "images", tmp_path / "images")
    given = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls), "OMP_NUM_THREADS": "1", "PORT": "0",
        "SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_ARRAY_TASK_COUNT": "2",
    }  # fmt: skip

    def submit(script: str, *words: str, task: int = 0, ranks: int = 1) -> None:
        calls.write_text("")
        environment = {**os.environ, **given, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_GPUS_ON_NODE": str(ranks)}
        subprocess.run([EXAMPLES / "slurm" / script, *words], env=environment, cwd=tmp_path, check=True)
        for call in calls.read_text().split("\0\n")[:-1]:
            tool, *rest = call.split("\0")
            done = processes.run(
                [sys.executable, "-m", MODULES[tool], *rest],
                env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

    train, test = "images/train-*.tar", "images/test-*.tar"
    for task in range(2):
        submit("extract.sh", train, "targets", task=task)
    assert (tmp_path / "targets" / "manifest.json").is_file()
    settings = ("--set", "pretrain.epochs=1", "--set", "pretrain.canonical_streams=2")
    submit("pretrain.sh", "targets", "run", *settings, ranks=2)
    assert (tmp_path / "run" / "report.json").is_file()
    submit("evaluate.sh", "run", train, test)
    assert "k-NN" in (tmp_path / "run-report.html").read_text()
    assert (tmp_path / "run-finetuned" / "report.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_without_arguments_says_what_it_needs(script: Path) -> None:
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "name the" in done.stderr


@pytest.fixture
def notebook() -> Any:
    """The notebook with small settings."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    found = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    nbformat.validate(found)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in found.cells), "clear its outputs"
    (settings,) = (cell for cell in found.cells if "SETTINGS = []" in cell.source)
    settings.source = settings.source.replace("SETTINGS = []", f"SETTINGS = {SETTINGS}")
    return found


def require_results(text: str) -> None:
    assert "48 images, 96 views" in text
    assert re.search(r"teacher +\d+\.\d % of test images right", text)
    assert "torch.Size([1, 32])" in text


@pytest.mark.ci
def test_the_code_of_the_notebook_runs(notebook: Any, tmp_path: Path) -> None:
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    done = processes.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MPLBACKEND": "agg"}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    require_results(done.stdout)


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(notebook: Any, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    require_results("".join(output.get("text", "") for output in outputs))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
