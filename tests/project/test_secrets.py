"""Commands that meet a token or a password, marked here: nothing that they write or say has it in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.hub import Hub, hub_of, use_hub
from support.project import Project, params_file
from support.wild import Command

MARK = "MARKEDSECRET"
TOKEN, PASSWORD, KEY = f"hf_{MARK}Token", f"{MARK}Password", f"{MARK}Key"


@dataclass
class World:
    """What commands are given, and what they said.

    Attributes:
        web: URL with a password, of a folder with images and targets on a web server.
        hub: the same in a private repository, which the token opens.
        bucket: URL that the marked key opens.
    """

    milan: Command
    web: str
    hub: str
    bucket: str
    said: str = ""

    def run(self, *words: object, code: int | None = 0) -> None:
        done = self.milan(*words)
        assert code is None or done.code == code, done.err
        self.said += f"{words[0]}: {done.out}{done.err}\n"


def leaks(said: str, folders: list[Path]) -> list[str]:
    """Lines that were said, and files, that have the mark in them or in their name."""
    files = [file for folder in folders for file in folder.rglob("*")]
    found = [line for line in said.splitlines() if MARK in line]
    found += [str(file) for file in files if file.is_file() and MARK.encode() in file.read_bytes()]
    return found + [str(file) for file in files if MARK in file.name]


@pytest.fixture
def hub(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(tmp_path / "served") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        files = {
            path.relative_to(project.root).as_posix(): path
            for folder in ("images", "targets")
            for path in (project.root / folder).rglob("*")
            if path.is_file()
        }
        for repository in ("datasets/org/open", "datasets/org/data"):
            hub.commit(repository, files)
        hub.behave(private={"datasets/org/data"}, token=TOKEN)
        yield hub


@pytest.fixture
def world(
    hub: Hub,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setattr("milan_pipe.planning.load._LOADER_SECONDS", 0.05)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(
        params_file(
            clip={"batch_size": 16, "steps": 2, "width": 32, "layers": 2}, pretrain={"batch_size": 16, "epochs": 1}
        )
    )
    host = hub.endpoint.removeprefix("http://")
    web = f"http://someone:{PASSWORD}@{host}/datasets/org/open/resolve/main"
    return World(Command(capsys, monkeypatch), web, "hf://datasets/org/data", bucket)


@pytest.mark.ci
def test_what_works(world: World, tmp_path: Path) -> None:
    web, train, test = world.web, "images/train-{000000..000001}.tar", "images/test-000000.tar"
    world.run("doctor", f"{web}/targets", f"{world.hub}/targets", world.bucket)
    world.run("plan", f"{web}/{train}", "planned", "--sample", 2, "--json")
    world.run("extract-targets", f"{web}/{train}", "from-web", "--json")
    world.run("extract-targets", f"{world.hub}/{train}", f"{world.bucket}/targets", "--json")
    for name, where in (("web", web), ("hub", world.hub), ("s3", world.bucket)):
        world.run("pretrain", f"{where}/targets", f"run-{name}", "--json")
    world.run("verify-targets", f"{web}/targets", "--json")
    world.run("verify-targets", f"{world.hub}/targets", "--json")
    world.run("convert-targets", f"{web}/targets", "converted", "--format", "webdataset", "--json")
    world.run("inspect-targets", f"{web}/targets", "looks", "--count", 1, "--json")
    world.run("inspect-student", "run-web", f"{web}/targets", "guesses", "--count", 1, "--json")
    images = (f"{web}/{train}", f"{web}/{test}")
    world.run("knn", "run-web", *images, "--features", "kept", "--json")
    world.run("linear-probe", "run-web", *images, "--quick", "--features", "kept", "--json")
    world.run("finetune", "run-web", *images, "tuned", "--json")
    world.run("segment", "run-web", *images, "segmented", "--set", "segment.classes=64", "--json")
    world.run("train-clip", f"{web}/{train}", "clip", "--json")
    world.run("report", "run-web", "tuned", "segmented", "--out", "report.html", "--json")
    world.run("export", "run-web", "exported", "--json")
    world.run("push", "run-web", "org/student", "--scores", "tuned", "--json")
    world.run("push", "from-web", "org/targets", "--json")
    assert leaks(world.said, [tmp_path]) == []
    # It is looked for where it could be.
    assert "someone" not in Path("report.html").read_text()
    assert "***@127.0.0.1" in Path("report.html").read_text()


@pytest.mark.ci
@pytest.mark.usefixtures("short_patience")
def test_what_fails(world: World, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web, run = world.web, project.runs[0]
    for where in (
        f"{web}/gone.tar",
        f"ftp://someone:{PASSWORD}@host/a.tar",
        f"s3://someone:{KEY}@bucket/a.tar",
        f"http:/someone:{PASSWORD}@host/a.tar",
        f"hf://someone:{TOKEN}@datasets/org/data/a.tar",
        f"https://localhost:1/a.tar?X-Amz-Signature={KEY}&sig={KEY}",
    ):
        world.run("extract-targets", where, "t", code=2)
        world.run("verify-targets", where, code=2)
        world.run("convert-targets", project.targets, where, "--format", "zarr", code=2)
        world.run("extract-targets", "i", "t", where, code=2)
    for words in (
        ("plan", where),
        ("pretrain", where, "r"),
        ("pretrain", project.targets, where),
        ("knn", where, where, where),
        ("embed", run, where, where),
        ("finetune", run, where, where, "r"),
        ("prepare", where, "i"),
        ("inspect-targets", where, "l"),
        ("push", where, "org/x"),
        ("push", run, where),
        ("export", where, "e"),
        ("report", where),
        ("pretrain", "t", "r", "--params", where),
        ("pretrain", "t", "r", "--set", f"pretrain.epochs={where}"),
        ("pretrain", "t", "r", "--set", f"pretrain.{where}=1"),
        ("extract-targets", "i", "t", "--set", f"teacher.pretrained={where}"),
        ("extract-targets", "i", "t", "--set", f"teacher.model={where}"),
        ("extract-targets", "i", "t", "--scheduler", where),
        ("extract-targets", "i", "t", f"--sheduler={where}"),
    ):
        world.run(*words, code=2)
    world.run("doctor", where, f"http://someone:{PASSWORD}@localhost:1", f"s3://someone:{KEY}@bucket", code=None)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}Other")
    world.run("verify-targets", f"{world.hub}/targets", code=2)
    world.run("push", run, "org/x", code=2)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\nwith a line break")
    world.run("verify-targets", f"{world.hub}/targets", code=2)
    assert leaks(world.said, [tmp_path]) == []
