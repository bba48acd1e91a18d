"""What a user installs: the wheel holds every file of the package and says the right things of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    out = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "milan_pipe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == ours
    kinds = {name.rpartition(".")[2] for name in held}
    assert {"py", "yaml", "j2", "css", "safetensors", "json", "typed"} <= kinds


def test_it_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    said = Parser().parsestr(wheel.read(name).decode())
    assert said["Name"] == "milan-pipe"
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert "## Licence" in str(said.get_payload())
    assert any(line.startswith("torch") for line in said.get_all("Requires-Dist", []))
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "milan-pipe = milan_pipe.cli:main" in wheel.read(entry).decode()


@pytest.mark.ci
def test_it_works_outside_of_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked elsewhere, with this environment's other packages, it is the one that runs, recipes and teacher too."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import milan_pipe, sys; from milan_pipe.config.params import load_params; "
        "from milan_pipe.config.teacher import TeacherSettings; from milan_pipe.teacher.clip import load_teacher; "
        "import torch; "
        "load_params('demo'); load_teacher(TeacherSettings(), torch.device('cpu')); "
        "from milan_pipe.drawing.page import render; render('gallery.html.j2', title='', facts={}, sheets=[]); "
        "print(milan_pipe.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site")
