"""The command line as users meet it: the whole chain, help without delay, and mistakes in one line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan_pipe import __version__, cli
from milan_pipe.cli import console
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.errors import DataError

SMALL = {
    "prepare.seed": 2,
    "prepare.train_scenes": 32,
    "prepare.test_scenes": 16,
    "prepare.samples_per_shard": 16,
    "views.count": 2,
    "extract.threads": 1,
    "embed.threads": 1,
    "pretrain.epochs": 2,
    "pretrain.batch_size": 16,
    "pretrain.device": "cpu",
    "student.width": 32,
    "student.depth": 1,
    "knn.neighbours": [1, 5],
    "linear_probe.l2": [0.1, 1.0],
    "segment_probe.steps": 2,
}
SETTINGS = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
COMMANDS = {
    "prepare": ["SOURCE", "IMAGES"],
    "extract-targets": ["IMAGES", "TARGETS"],
    "pretrain": ["TARGETS", "RUN"],
    "knn": ["CHECKPOINT", "TRAIN", "TEST"],
    "linear-probe": ["CHECKPOINT", "TRAIN", "TEST"],
    "embed": ["CHECKPOINT", "IMAGES", "OUT"],
    "finetune": ["CHECKPOINT", "TRAIN", "VAL", "RUN"],
    "segment": ["CHECKPOINT", "TRAIN", "VAL", "RUN"],
    "segment-probe": ["CHECKPOINT", "TRAIN", "VAL"],
    "train-clip": ["IMAGES", "OUT"],
}


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """`milan-pipe WORDS` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["milan-pipe", *map(str, words)])
    for one in (console.console, console.results):
        monkeypatch.setattr(one, "width", 80)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, targets and a run, made by the installed command."""
    root = tmp_path_factory.mktemp("chain")
    for words in (["prepare", "demo", "images"], ["extract-targets", "images/train-*.tar", "targets"]):
        done = external(root, *words, *SETTINGS, "--json")
        assert done.returncode == 0, done.stderr
        (root / f"{words[0]}.json").write_text(done.stdout)
    return root


def external(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "milan_pipe", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def last_json(text: str) -> dict[str, Any]:
    found = json.loads(text.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_from_images_to_scores(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    prepared = last_json(Path("prepare.json").read_text())
    assert (prepared["samples"], prepared["shards"], prepared["bad"]) == (48, 3, 0)
    extracted = last_json(Path("extract-targets.json").read_text())
    assert (extracted["shards"], extracted["samples"], extracted["views"]) == (2, 32, 64)
    assert extracted["mean_cosine"] > 0.999
    assert extracted["bytes"] == sum(path.stat().st_size for path in Path("targets").rglob("*") if path.is_file())

    code, out, err = run(capsys, monkeypatch, "extract-targets", "images/train-*.tar", "targets", *SETTINGS, "--json")
    assert code == 0, err
    assert (last_json(out)["skipped"], last_json(out)["views"], last_json(out)["mean_cosine"]) == (2, 0, None)

    code, out, err = run(capsys, monkeypatch, "pretrain", "targets", "run", *SETTINGS, "--json")
    assert code == 0, err
    trained = last_json(out)
    assert len(out.splitlines()) == 1
    assert trained.keys() == {
        "steps", "epochs", "loss", "images_per_second", "data_wait", "seconds", "checkpoint", "resumed_from",
        "steps_now", "scores", "best", "best_step", "best_checkpoint", "bad",
    }  # fmt: skip
    assert (trained["scores"], trained["best"], trained["bad"]) == ({}, {}, 0)
    assert (trained["resumed_from"], trained["steps_now"]) == (0, 4)
    assert (trained["steps"], trained["checkpoint"]) == (4, "run/checkpoints/step-00000004")
    assert Path(trained["checkpoint"]).is_dir()
    assert max(len(line) for line in err.splitlines()) <= 80

    code, out, err = run(capsys, monkeypatch, "pretrain", "targets", "run", *SETTINGS, "--json")
    assert (code, last_json(out)["steps_now"], last_json(out)["loss"]) == (0, 0, trained["loss"]), err
    assert "finished before" in err
    code, out, err = run(capsys, monkeypatch, "pretrain", "targets", "run", *SETTINGS, "--set", "pretrain.lr=0.5")
    assert (code, out) == (2, "")
    assert f"pretrain.lr: the run has {PretrainSettings().lr}, the settings say 0.5" in " ".join(err.split())

    shards = ["images/train-*.tar", "images/test-*.tar"]
    for subject, name in (("run", trained["checkpoint"]), ("random", "random"), ("teacher", "teacher")):
        code, out, err = run(capsys, monkeypatch, "knn", subject, *shards, *SETTINGS, "--json")
        assert code == 0, err
        found = last_json(out)
        assert (found["subject"], found["train"], found["test"], found["bad"]) == (name, 32, 16, 0)
        assert found["accuracy"].keys() == {"1", "5"}
        assert found["best"] == max(found["accuracy"].values())
    code, out, err = run(capsys, monkeypatch, "linear-probe", "run", *shards, "--quick", *SETTINGS, "--json")
    assert code == 0, err
    assert last_json(out).keys() == {
        "subject", "accuracy", "train_accuracy", "l2", "converged", "train", "test", "bad", "kept",
    }  # fmt: skip
    code, out, err = run(capsys, monkeypatch, "segment-probe", "run", *shards, *SETTINGS, "--json")
    assert code == 0, err
    found = last_json(out)
    assert found.keys() == {"subject", "heads", "train", "test", "bad", "kept"}
    for head, words in (("linear", "mIoU, linear head"), ("knn", "mIoU, k-NN")):
        assert found["heads"][head].keys() == {"miou", "aacc", "macc", "classes"}
        assert len(found["heads"][head]["classes"]) == 22
        assert re.search(f"{words} +│ {100 * found['heads'][head]['miou']:.2f} %", err), err


def test_a_report_is_on_stdout_and_nothing_else_is(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    code, out, err = run(capsys, monkeypatch, "extract-targets", "images/train-*.tar", "targets", *SETTINGS)
    assert (code, err) == (0, "")
    assert "2 (2 were there)" in out


def test_what_is_trained_and_tested_on_is_told(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    train, told = "images/train-*.tar", "have images in common"
    small = ("--set", "finetune.batch_size=8", "--set", "finetune.epochs=1", *SETTINGS)
    for words in (["knn", "random", train], ["segment-probe", "random", train], ["finetune", "random", train, "t"]):
        where = [train, f"{chain}/./images/train-000000.tar", *words[3:]]
        code, _, err = run(capsys, monkeypatch, *words[:2], *where, *(small if words[3:] else SETTINGS))
        assert code == 0, err
        assert f"warning: {train} and {chain}/./images/train-000000.tar {told}" in " ".join(err.split())
    assert told not in run(capsys, monkeypatch, "knn", "random", train, "images/test-*.tar", *SETTINGS)[2]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_names_that_stdout_has_no_letters_for_are_escaped(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["milan-pipe", "doctor", "\u00e9\u65e5", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    assert not ended.value.code
    assert rb"\u65e5" in written.getvalue()
    if flags:
        assert json.loads(written.getvalue())["locations"][0]["location"] == "\u00e9\u65e5"


def test_a_list_can_be_piped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, monkeypatch, "recipes")
    assert (code, err) == (0, "")
    assert "imagenet1k-vit-b-16" in out
    code, out, err = run(capsys, monkeypatch, "recipes", "--json")
    assert code == 0
    assert "imagenet1k-vit-b-16" in json.loads(out)
    assert "imagenet1k-vit-b-16" in err


def mistakes(root: Path) -> dict[str, tuple[list[str], str]]:
    train, store = str(root / "images" / "train-*.tar"), root / "targets"
    bare, other, nothing = root / "bare", root / "other", root / "nothing"
    for folder in (bare, other, nothing):
        folder.mkdir(exist_ok=True)
    header = json.loads((store / "shards" / "zarr.json").read_text())
    header["attributes"]["milan_pipe"]["schema_version"] = 99
    (other / "shards").mkdir(exist_ok=True)
    (other / "shards" / "zarr.json").write_text(json.dumps(header))
    with (
        tarfile.open(next((root / "images").glob("train-*.tar"))) as source,
        tarfile.open(bare / "bare-000000.tar", "w") as target,
    ):
        for member in source.getmembers():
            if not member.name.endswith(".cls"):
                data = source.extractfile(member)
                target.addfile(member, io.BytesIO(data.read()) if data else None)
    run_at = str(root / "never")
    unlabelled = str(bare / "bare-000000.tar")
    return {
        "no images": (["extract-targets", str(root / "no"), run_at], "is not there"),
        "empty folder": (["extract-targets", str(nothing), run_at], "nothing"),
        "unknown teacher": (["extract-targets", train, run_at, "--set", "teacher=ViT-B-61"], "ViT-B-16"),
        "unknown key": (["pretrain", str(store), run_at, "--set", "pretrain.epoch=1"], "did you mean 'epochs'"),
        "no params": (["pretrain", str(store), run_at, "--params", "no.yaml"], "no.yaml is not there"),
        "schema": (["pretrain", str(other), run_at], "schema version 99"),
        "no store": (["pretrain", str(nothing), run_at], "not a target store"),
        "other codec": (["extract-targets", train, str(store), *SETTINGS, "--set", "codec=float16"], "'float16'"),
        "no run": (["knn", str(root / "no"), train, train], "is not there"),
        "no checkpoint": (["knn", str(nothing), train, train], "has no checkpoint"),
        "unlabelled": (["knn", "random", unlabelled, unlabelled], "label"),
        "unknown head": (["segment-probe", "random", train, train, "--set", "segment_probe.heads=[knm]"], "knm"),
        "device": (["pretrain", str(store), run_at, *SETTINGS, "--set", "pretrain.device=abacus"], "abacus"),
        "brackets": (["prepare", str(root / "[red]no[/red]"), run_at], "[red]no[/red]"),
    }


NAMES = (
    "no images", "empty folder", "unknown teacher", "unknown key", "no params", "schema", "no store", "other codec",
    "no run", "no checkpoint", "unlabelled", "unknown head", "device", "brackets",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_and_code_two(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, expected = mistakes(chain)[name]
    code, out, err = run(capsys, monkeypatch, *words)
    lines = [line for line in err.splitlines() if line.strip()]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "Traceback" not in err
    assert not (chain / "never" / "checkpoints").exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = external(tmp_path, "prepare", "[no]:smile:", "images")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert "'[no]:smile:' is not there" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("knn targets images images", "targets is a target store; expected a run or a checkpoint"),
        ("knn random targets images", "targets is a target store; expected a folder of images"),
        ("report targets", "targets is a target store; expected a run or a checkpoint"),
        ("pretrain old new", "old is a run; expected a target store"),
        ("pretrain images new", "images is a folder of images; expected a target store"),
        ("pretrain targets images", "images is a folder of images; expected a new folder or a run"),
        ("pretrain targets tars", "tars is a folder of images; expected a new folder or a run"),
        ("extract-targets old new", "old is a run; expected a folder of images"),
        ("verify-targets images", "images is a folder of images; expected a target store"),
        ("prepare targets new", "targets is a target store; expected a folder of images"),
        ("pretrain targets", "expected TARGETS... RUN; found targets: name a folder for the run"),
        ("embed random images targets", "targets is a target store; expected a new folder or a folder of embeddings"),
        ("prepare demo targets", "targets is a target store; expected a new folder or a folder of images"),
        ("prepare demo old", "old is a run; expected a new folder or a folder of images"),
        ("train-clip images targets", "targets is a target store; expected a new folder or a teacher"),
        ("extract-targets images old", "old is a run; expected a new folder or a target store"),
        ("embed random old new", "old is a run; expected a folder of images"),
    ],
)
def test_arguments_that_changed_places_or_are_too_few(
    chain: Path, words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    Path("old/checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
    Path("old/checkpoints/step-00000001/student.safetensors").touch()
    Path("tars").mkdir(exist_ok=True)
    Path("tars/train-000000.tar").touch()
    before = sorted(chain.rglob("*"))
    settings = [] if words.startswith("report") else SETTINGS
    assert run(capsys, monkeypatch, *words.split(), *settings) == (2, "", f"error: {message}\n")
    assert sorted(chain.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("prepare demo targets/images", "targets/images"),
        ("extract-targets images targets/more", "targets/more"),
        ("pretrain targets targets/run", "targets/run"),
        ("embed random images targets/shards/out", "targets/shards/out"),
        ("inspect-targets targets targets", "targets/index.html"),
        ("export old targets/student", "targets/student"),
    ],
)
def test_nothing_else_is_written_into_a_store(
    chain: Path, words: str, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    before = sorted(chain.rglob("*"))
    settings = [] if words.startswith("export") else SETTINGS
    message = f"{place} would lie in {chain}/targets, a target store, which holds nothing else; name another place"
    assert run(capsys, monkeypatch, *words.split(), *settings) == (2, "", f"error: {message}\n")
    assert sorted(chain.rglob("*")) == before


def odd(name: bytes) -> str:
    """A name that is no UTF-8, as Python has it."""
    return os.fsdecode(name)


ODD = odd(b"classes\xff")
FEW = [
    *("student.width=32", "student.depth=1", "finetune.epochs=1", "finetune.batch_size=4", "finetune.workers=0"),
    *("finetune.warmup_epochs=0", "finetune.max_bad_fraction=0.5", "embed.max_bad_fraction=0.5", "knn.neighbours=[1]"),
    *("segment.steps=1", "segment.batch_size=2", "segment.channels=8", "segment.classes=2", "segment.workers=0"),
    "segment.warmup_steps=0",
]


@pytest.fixture
def odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders, and images with masks; a few names are no UTF-8, as in old archives."""
    rng = np.random.default_rng(0)

    def save(path: Path, *shape: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 2, shape, dtype=np.uint8)).save(path)

    for name in (odd(b"caf\xe9"), "tea"):
        for number in range(6):
            save(tmp_path / ODD / name / (odd(b"\xff%d.png" % number) if number < 3 else f"{number}.png"), 64, 64, 3)
        for suffix in ("png", "txt"):
            (tmp_path / ODD / name / f"{odd(bytes([254]))}.{suffix}").write_bytes(b"no image")
    for number in range(6):
        save(tmp_path / "parts" / "images" / odd(b"\xff%d.png" % number), 64, 64, 3)
        save(tmp_path / "parts" / "masks" / odd(b"\xff%d.png" % number), 64, 64)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "random", ODD, ODD, "out"),
        ("segment", "random", "parts", "parts", "out"),
        ("knn", "random", ODD, ODD, "--keep", "out"),
        ("embed", "random", ODD, "out"),
    ],
    ids=lambda words: words[0],
)
def test_names_that_are_no_utf8(
    odd_names: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        code, _, err = run(capsys, monkeypatch, *words, *(word for text in FEW for word in ("--set", text)))
        assert code == 0, err
    for file in odd_names.glob("out/**/*.json*"):
        file.read_text(encoding="utf-8").encode()
    if words[0] == "finetune":
        listed = [
            json.loads(line)["key"] for line in (odd_names / "out" / "bad_samples.jsonl").read_text().splitlines()
        ]
        assert sorted(listed) == [f"{name}/\\xfe.{suffix}" for name in ("caf\\xe9", "tea") for suffix in ("png", "txt")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("extract-targets images {}", "{} is no UTF-8, which zarr and safetensors do not open; name another folder"),
        ("pretrain targets {}", "{} is no UTF-8, which zarr and safetensors do not open; name another folder"),
        ("extract-targets {} new", "{}/{}.tar has a name that is no UTF-8, which no record can hold; rename it"),
        ("embed random {} new", "{}/{}.tar has a name that is no UTF-8, which no record can hold; rename it"),
    ],
)
def test_names_that_cannot_be_kept(
    chain: Path, words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain)
    name = odd(b"\xff")
    if "{} new" in words:
        Path(name).mkdir(exist_ok=True)
        shutil.copy(next(chain.glob("images/train-*.tar")), Path(name) / f"{name}.tar")
    code, out, err = run(capsys, monkeypatch, *words.replace("{}", name).split(), *SETTINGS)
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: " + message.replace("{}", "\\udcff")]
    assert not (chain / "new").exists()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (DataError("first\nsecond [bold]x[/]"), "error: first second [bold]x[/]"),
        (PermissionError(13, "Permission denied", "/some/file"), "error: /some/file: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_faults_of_data_and_disk_are_named_plainly(
    fault: Exception, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise fault

    monkeypatch.setattr("milan_pipe.cli.base.app", fail)
    code, _, err = run(capsys, monkeypatch)
    assert (code, len(err.splitlines())) == (2, 1)
    assert expected in err


def test_an_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("milan_pipe.cli.base.app", fail)
    assert run(capsys, monkeypatch)[0] == 130


def test_json_obeys_no_character_that_a_terminal_would(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"hostile": "a\x1b[2J\x9b31m\u202e\U000e0001\n", "plain": "für 猫 \U0001f408"}
    console.print_json(values)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert "für 猫 \U0001f408" in line
    assert json.loads(line) == values


def test_a_mistake_that_cannot_be_told_has_its_code(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "milan_pipe", "verify-targets", "nowhere"],
            cwd=tmp_path, stderr=full, stdout=full, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("log_json", ["", "1"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("console.print('on'); console.print('and on')", 0),
        ("warnings.warn('odd', RuntimeWarning)", 0),
        ("raise StoppedError('by SIGTERM', 15)", 128 + 15),
        ("raise DataError('wrong')", 2),
    ],
)
def test_what_cannot_be_told_changes_no_code(words: str, code: int, log_json: str, full: bool) -> None:
    program = (
        "import warnings\n"
        "from milan_pipe.cli.console import as_command, console\n"
        "from milan_pipe.errors import DataError, StoppedError\n"
        f"with as_command():\n    {words}\n"
    )
    environment = {**os.environ, "MILAN_PIPE_LOG_JSON": log_json}
    # A disk that is full, or a reader that is gone.
    read, write = (None, os.open("/dev/full", os.O_WRONLY)) if full else os.pipe()
    if read is not None:
        os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stderr=write, env=environment, check=False, timeout=60)
    os.close(write)
    assert done.returncode == code


def exported(folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def checkpoints(folder: Path) -> Path:
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "checkpoint.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("made", "what"), [(exported, "an exported student"), (checkpoints, "the checkpoints of a run")]
)
def test_nothing_is_written_into_what_another_command_wrote(
    made: Callable[[Path], Path], what: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = made(tmp_path)
    before = sorted(folder.rglob("*"))
    code, _, err = run(capsys, monkeypatch, "prepare", "demo", str(folder))
    assert (code, f"is {what}; expected a new folder" in err) == (2, True)
    assert sorted(folder.rglob("*")) == before


def test_an_empty_name_of_a_store_is_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, "extract-targets", "--views-from=", "out")
    assert (code, len(err.splitlines())) == (2, 1)


@pytest.mark.parametrize("words", [["recipes", "--json"], ["--version"]])
def test_a_stdout_that_is_closed(words: list[str]) -> None:
    command = [sys.executable, "-m", "milan_pipe", *words]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, check=False, timeout=60)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)


def test_results_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.results, "width", 80)
    path = "/data/[ab]/" + "x" * 120
    console.show(f"{path} -> [b]", {"checkpoint": path, "loss": "1"}, None, as_json=False)
    out = capsys.readouterr().out
    assert f"{path} -> [b]" in out
    table = out.splitlines()[1:]
    assert all(len(line) <= 80 for line in table)
    assert sum(line.count("x") for line in table) == 120
    assert any("/data/[ab]/" in line for line in table)


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "--version")[:2] == (0, f"milan-pipe {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_names_its_arguments(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, command, "--help")
    assert code == 0
    for word in [*COMMANDS[command], "--params", "--set", "--json"]:
        assert word in out


def test_help_lists_all_commands_and_loads_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['milan-pipe', '--help']\n"
        "from milan_pipe.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'timm', 'zarr', 'open_clip', 'dvclive', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
