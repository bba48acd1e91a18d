"""Every command of the pages is run as it stands, or by another test, or says that it needs what is not here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from support import processes
from support.pages import PAGES, ROOT, blocks, commands, run, shell_lines
from support.project import Project, params_file

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.student.model import build_student
from milan_pipe.student.published import published_state_dict

_IN_EVERY_RUN = ("README.md", "quick-start.md")
# What a page takes for granted.
GIVEN = {
    "README.md": (),
    "cluster.md": (),
    "commands.md": ("mae",),
    "embeddings.md": ("run",),
    "exchange.md": ("run",),
    "hub.md": ("targets", "run"),
    "repair.md": ("targets", "run"),
    "object-storage.md": (),
    "own-images.md": (),
    "plan.md": (),
    "pretraining.md": ("targets",),
    "quick-start.md": (),
    "recipes.md": (),
    "report.md": ("targets", "run", "mae", "tuned", "segmented"),
    "scale.md": (),
    "several-teachers.md": (),
    "transfer.md": ("run",),
}
MADE = {
    "README.md": ("targets/manifest.json", "looks/index.html", "vit-milan/config.json", "report.html", "tuned/best"),
    "embeddings.md": ("embeddings/000000.parquet", "validation/000000.zarr/patches"),
    "own-images.md": (
        "from-list/index.json",
        "looks/index.html",
        "guesses/index.html",
        "vit/config.json",
        "report.html",
    ),
    "report.md": ("extraction.json", "looks/scene-0000000012.png"),
}
# Lines that other tests run: which, and by what name. Those of `slow` are run by `pytest -m slow`.
ELSEWHERE = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -q -e '.[dev]' && python -m pytest": (
        ".ci/run",
        "readme_command 1",
    ),
    "python3 -m venv .venv && . .venv/bin/activate && pip install -q -e '.[dvc,report,segment]' && dvc repro": (
        "tests/docs/test_commands_run.py",
        "test_dvc_runs_as_the_pages_say",
    ),
    "dvc ": ("tests/docs/test_commands_run.py", "test_dvc_runs_as_the_pages_say"),
    "milan-pipe demo": ("tests/cli/test_doctor_and_demo.py", "test_demo_runs_every_stage_and_goes_on"),
    "sbatch examples/slurm/": ("tests/project/test_front_door.py", "test_the_scripts_of_slurm_run_all_stages"),
    "milan-pipe convert-targets targets tars ": ("tests/docs/test_docs.py", "both_formats"),
    "milan-pipe replay ": ("tests/pretraining/test_replay.py", "replay"),
    "dask scheduler": ("tests/extraction/test_cluster.py", "test_workers_join_and_leave"),
    "dask worker tcp": ("tests/extraction/test_cluster.py", "test_workers_join_and_leave"),
    "milan-pipe extract-targets s3://bucket/images s3://bucket/targets --scheduler": (
        "tests/extraction/test_cluster.py",
        "test_workers_join_and_leave",
    ),
}


# What takes long and changes nothing of what a line is run for.
SMALLER = {
    "milan-pipe plan ": "milan-pipe plan --sample 4 ",
    "prepare.train_scenes=100": "prepare.train_scenes=100 --set prepare.test_scenes=20",
    "pretrain.epochs=20": "pretrain.epochs=2",
    "segment.crop=128": "segment.crop=64",
}


def smaller(line: str) -> str:
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    return line


def elsewhere(line: str) -> tuple[str, str] | None:
    return next((test for start, test in ELSEWHERE.items() if line.startswith(start)), None)


def in_shell(page: Path) -> list[str]:
    """Blocks of a page that are shell scripts, and not lines of commands."""
    return [
        block.text for block in blocks(page, "bash") if not block.needs and "milan-pipe prepare imagenet" in block.text
    ]


def test_every_command_is_run_or_marked() -> None:
    for page in PAGES:
        if page.name in GIVEN:
            continue
        left = [line for line in commands(page) if elsewhere(line) is None]
        assert not left, f"{page.name}: run them in a test, or mark them with a line *Needs ...* before the block"


def test_tests_that_are_named_are_there() -> None:
    for file, name in ELSEWHERE.values():
        assert name in (ROOT / file).read_text(encoding="utf-8"), (file, name)
    assert set(GIVEN) <= {page.name for page in PAGES}


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(folder / f"{folder.name}-{number}.jpg")


def masked(folder: Path, count: int) -> None:
    images(folder / "images", count)
    (folder / "masks").mkdir()
    for image in (folder / "images").iterdir():
        mask = np.zeros((70, 90), np.uint8)
        mask[20:50, 30:60] = 1
        Image.fromarray(mask).save(folder / "masks" / f"{image.stem}.png")


def require_neighbours(scope: dict[str, Any]) -> None:
    """What the page's own code found: an image is nearest to itself, and what stays is alike to nothing before it."""
    keys, features = list(scope["keys"]), scope["features"]
    assert len(keys) == 64
    assert scope["nearest"][0] == 0
    expected: list[int] = []
    for row in range(len(keys)):
        if not any(features[row] @ features[other] >= 0.97 for other in expected):
            expected.append(row)
    assert scope["kept"] == [keys[row] for row in expected]


@pytest.fixture
def world(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder with what the pages speak of, small."""
    home, here = tmp_path / "home", tmp_path / "here"
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            images(home / "photos" / split / kind, 8)
    shutil.copytree(home / "photos", here / "photos")
    for split in ("train", "val"):
        masked(here / "own" / split, 4)
        (here / f"images-{split}").mkdir()
        for shard in (project.root / "images").glob(f"{'test' if split == 'val' else split}-*"):
            shutil.copy(shard, here / f"images-{split}")
    (here / "dataset").mkdir()
    pictures = [path.read_bytes() for path in sorted((here / "photos" / "train").rglob("*.jpg"))]
    pq.write_table(pa.table({"image": pictures}), here / "dataset" / "train-00000-of-00001.parquet")
    (here / "photos.csv").write_text("path,caption\nphotos/train/cat/cat-0.jpg,a cat\n")
    (here / "own" / "classes.txt").write_text("ground\nthing\n")
    (here / "classes.txt").write_text("ground\nthing\n")
    (here / "params.yaml").write_text(
        params_file(
            lars_probe={"batch_size": 16, "epochs": 2, "warmup_epochs": 1},
            clip={"batch_size": 16, "steps": 2, "width": 32, "layers": 2},
        )
    )
    model = build_student(
        StudentSettings(image_size=32, width=64, depth=2, heads=1), DecoderSettings(width=512, depth=1, heads=16), 24
    )
    torch.save({"model": published_state_dict(model)}, here / "milan_vit_base.pth")
    # Packing in several processes is tested where images are, how long a plan measures where plans are.
    monkeypatch.setattr("milan_pipe.images.prepare.thread_count", lambda _: 1)
    monkeypatch.setattr("milan_pipe.planning.load._LOADER_SECONDS", 0.05)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _IN_EVERY_RUN else pytest.mark.ci) for name in GIVEN]
)
def test_a_page_runs_as_it_stands(name: str, world: Path, project: Project, request: pytest.FixtureRequest) -> None:
    page = next(page for page in PAGES if page.name == name)
    prepared = {
        "targets": project.targets,
        **dict(zip(("run", "mae", "tuned", "", "segmented"), project.runs, strict=True)),
    }
    for given in GIVEN[name]:
        shutil.copytree(prepared[given], world / given)
    if name not in ("README.md", "own-images.md"):
        shutil.copytree(project.root / "images", world / "images")
    if "targets" in GIVEN[name]:
        # Those that it was made of.
        for shard in (world / "images").glob("test-*"):
            shard.unlink()
    lines = [line for line in commands(page) if elsewhere(line) is None]
    scripts = {line for text in in_shell(page) for line in shell_lines(text)}
    if any("s3://bucket" in line for line in lines):
        bucket = request.getfixturevalue("bucket")
        if name == "object-storage.md":
            from milan_pipe.storage import location_of

            for shard in sorted((project.root / "images").glob("train-*.tar")):
                location_of(f"{bucket}/images").write(shard.name, shard.read_bytes())
        lines = [line.replace("s3://bucket", bucket).replace("{000000..000127}", "{000000..000001}") for line in lines]
    with processes.forked_workers():
        for line in lines:
            if line not in scripts:
                run(smaller(line))
    for made in MADE.get(name, ()):
        assert (world / made).exists(), made
    if name == "embeddings.md":
        scope: dict[str, Any] = {}
        exec("\n".join(block.text for block in blocks(page, "python")), scope)
        require_neighbours(scope)
    assert lines, f"{name} has no command that is run: take it from the list"


def test_the_archives_of_imagenet_become_shards_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of transfer.md, by a shell, on small archives of that form."""
    (script,) = in_shell(ROOT / "docs" / "transfer.md")
    pack = tmp_path / "pack"
    for kind in ("n01514668", "n02088094"):
        images(pack / kind, 3)
        subprocess.run(["tar", "-cf", f"../{kind}.tar", "."], cwd=pack / kind, check=True)
    subprocess.run(
        ["tar", "-cf", "../ILSVRC2012_img_train.tar", "n01514668.tar", "n02088094.tar"], cwd=pack, check=True
    )
    images(tmp_path / "val", 2)
    names = []
    for number, image in enumerate(sorted((tmp_path / "val").iterdir()), 1):
        names.append(f"ILSVRC2012_val_0000000{number}")
        image.rename(tmp_path / "val" / f"{names[-1]}.JPEG")
    subprocess.run(["tar", "-cf", "../ILSVRC2012_img_val.tar", "."], cwd=tmp_path / "val", check=True)
    (tmp_path / "LOC_val_solution.csv").write_text(
        f"ImageId,PredictionString\n{names[0]},n01514668 1 2 3 4 \n{names[1]},n02088094 1 2 3 4 n02088094 5 6 7 8 \n"
    )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "shards").glob("*.tar"))
    assert made == ["train-000000.tar", "val-000000.tar"]


SMALL = """
prepare: {train_scenes: 96, test_scenes: 24, samples_per_shard: 48}
views: {count: 2}
student: {width: 32, depth: 2, heads: 2}
decoder: {width: 16, depth: 1}
pretrain: {batch_size: 16, epochs: 2, warmup_epochs: 1}
knn: {neighbours: [1, 5]}
finetune: {batch_size: 16, epochs: 1, train_fraction: 1.0}
segment: {steps: 4, batch_size: 4, eval_every: 4, channels: 8}
segment_probe: {steps: 4}
"""


@pytest.mark.slow
def test_dvc_runs_as_the_pages_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a clone with small settings: all stages once, nothing the second time, and what the README shows after it."""
    here = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(here)], check=True)
    settings = yaml.safe_load((here / "params.yaml").read_text())
    for section, values in yaml.safe_load(SMALL).items():
        settings[section].update(values)
    (here / "params.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(here))
    for key in ("NAME", "EMAIL"):
        monkeypatch.setenv(f"GIT_AUTHOR_{key}", "someone@example.org")
        monkeypatch.setenv(f"GIT_COMMITTER_{key}", "someone@example.org")
    subprocess.run(["git", "commit", "-qam", "small"], cwd=here, check=True)

    def dvc(line: str) -> str:
        done = subprocess.run(["bash", "-c", line], cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    dvc("dvc repro")
    assert (here / "report.html").is_file()
    assert "Data and pipelines are up to date." in dvc("dvc repro")
    lines = [line for line in commands(ROOT / "README.md") if line.startswith("dvc ")]
    assert len(lines) == 4
    for line in lines:
        dvc(line.replace("pretrain.epochs=40", "pretrain.epochs=3"))
