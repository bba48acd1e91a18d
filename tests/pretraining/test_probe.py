"""k-NN of the student while it learns: it changes nothing, and the best student is kept."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.images import class_folders, image, labelled_shard, png, write_tar
from support.messages import Case, require_message
from support.targets import header, write_store
from support.training import StopAtError, stop_at, weights_of

from milan_pipe.api import knn, pretrain
from milan_pipe.config.evaluation import KnnSettings
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import DataError, MissingError, SettingError
from milan_pipe.evaluation.features import labelled_samples
from milan_pipe.evaluation.probe import Probe
from milan_pipe.interop.timm_layout import export_student
from milan_pipe.pretraining import run as pretraining
from milan_pipe.reports import report
from milan_pipe.reports.runs import read_runs
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.task import RunReport

HEAD = header(format="zarr", shards=1)
STUDENT = StudentSettings(
    image_size=HEAD.views.size, patch_size=HEAD.views.size // HEAD.teacher.grid[0], width=16, depth=1, heads=2
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and labelled images."""
    root = tmp_path_factory.mktemp("probe")
    write_store(root / "targets", HEAD, [40])
    # Labels have nothing to do with what is seen: scores go up and down.
    for name, numbers in (("train", range(30)), ("test", range(30, 70))):
        images = {f"{number}.png": png(image(number, number % 3)) for number in numbers}
        labels = {f"{number}.cls": str(number // 3 % 3).encode() for number in numbers}
        write_tar(root / f"{name}.tar", {name: {**images, **labels}[name] for name in sorted({**images, **labels})})
    class_folders(root / "folders", range(12))
    return root


def params(folder: Path, knn: tuple[int, ...] = (1, 5, 500), **recipe: Any) -> Params:
    defaults: dict[str, Any] = {"epochs": 4, "batch_size": 10, "warmup_epochs": 1, "device": "cpu", "log_every": 2}
    defaults |= {"lr": 0.05, "seed": 2}  # with which the best student is not the last
    sets = {"probe_train": str(folder / "train.tar"), "probe_test": str(folder / "test.tar")}
    return Params(
        student=STUDENT,
        decoder=DecoderSettings(width=16, depth=1, heads=2),
        knn=KnnSettings(neighbours=knn),
        pretrain=PretrainSettings(**{**defaults, **sets, **recipe}),
    )


def go(
    folder: Path, run: Path, on_progress: Callable[[TrainProgress], None] = lambda _: None, **recipe: Any
) -> RunReport:
    return pretrain(folder / "targets", run, params(folder, **recipe), on_progress=on_progress)


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    file = run / "metrics" / "plots" / "metrics" / f"{name}.tsv"
    head, *lines = (line.split("\t") for line in file.read_text().splitlines())
    return [(int(line[head.index("step")]), float(line[-1])) for line in lines]


def assert_same(run: Path, other: Path) -> None:
    assert curve(run, "train/loss") == curve(other, "train/loss")
    ours, theirs = weights_of(run), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, RunReport, list[TrainProgress]]:
    told: list[TrainProgress] = []
    return folder / "run", go(folder, folder / "run", told.append, probe_every=1), told


def test_the_run_is_the_same_with_and_without(
    folder: Path, whole: tuple[Path, RunReport, list[TrainProgress]], tmp_path: Path
) -> None:
    found = go(folder, tmp_path / "run")
    assert_same(whole[0], tmp_path / "run")
    assert (found.loss, found.scores, found.best_checkpoint) == (whole[1].loss, {}, "")
    assert not (tmp_path / "run" / "best").exists()


def test_scores_are_those_of_knn_and_go_where_metrics_go(
    folder: Path, whole: tuple[Path, RunReport, list[TrainProgress]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found, told = whole
    points = curve(run, "probe/knn")
    assert [step for step, _ in points] == [4, 8, 12, 16]
    assert [step for step, _ in curve(run, "probe/seconds")] == [4, 8, 12, 16]
    scores = dict(points)
    assert found.scores == {"knn": scores[16]}
    assert found.best == {"knn": max(scores.values())}
    assert found.best_step in (8, 12)
    assert found.best_step == next(step for step, score in points if score == max(scores.values()))
    assert json.loads((run / "report.json").read_text())["best"] == found.best
    assert [now.score for now in told] == [None, None, *(scores[step] for step in (4, 4, 8, 8, 12, 12))]
    for checkpoint, score in ((run, scores[16]), (found.best_checkpoint, found.best["knn"])):
        judged = knn(checkpoint, folder / "train.tar", folder / "test.tar", params(folder), keep=folder / "kept")
        assert judged.best == score
    side = STUDENT.image_size
    facts = {"train": 30, "test": 40, "bytes": 70 * side * side * 3}
    assert open_checkpoint(run).record["probe"] == facts
    titles: list[str] = []
    monkeypatch.setattr(report, "line_chart", lambda title, *_: titles.append(title) or "")
    report._charts(read_runs([run]))
    assert "k-NN of the student while it learns" in titles


def test_the_best_checkpoint_is_one_like_any_other(
    folder: Path, whole: tuple[Path, RunReport, list[TrainProgress]], tmp_path: Path
) -> None:
    best = whole[1].best_checkpoint
    assert open_checkpoint(best).record["step"] == whole[1].best_step
    export_student(best, tmp_path / "out")
    further = params(folder, epochs=1).model_copy(update={"student": STUDENT.model_copy(update={"init": best})})
    assert pretrain(folder / "targets", tmp_path / "run", further).steps == 4


def test_scores_survive_an_interruption(
    folder: Path, whole: tuple[Path, RunReport, list[TrainProgress]], tmp_path: Path
) -> None:
    run, (other, unbroken, _) = tmp_path / "run", whole
    for step in (6, 12):
        with pytest.raises(StopAtError):
            go(folder, run, stop_at(step), probe_every=1, checkpoint_every=5)
    found = go(folder, run, probe_every=1)
    assert found.resumed_from == 10
    assert (found.scores, found.best, found.best_step) == (unbroken.scores, unbroken.best, unbroken.best_step)
    assert curve(run, "probe/knn") == curve(other, "probe/knn")
    assert_same(run, other)


def test_a_run_goes_on_with_and_without(folder: Path, whole: tuple[Path, RunReport, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, every in ((6, None), (10, 1)):
        with pytest.raises(StopAtError):
            go(folder, run, stop_at(step), probe_every=every, checkpoint_every=3)
    kept = open_checkpoint(run / "best").record
    found = go(folder, run, probe_train="https://me:word@host/a.tar?token=word")
    assert "word" not in json.dumps(dict(open_checkpoint(run).record))
    assert (found.scores, found.best, found.best_step) == ({}, kept["scores"], kept["step"])
    assert found.best_checkpoint == str(run / "best")
    assert_same(run, whole[0])


def test_scores_of_other_images_are_not_compared(folder: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", str(folder / "folders")
    with pytest.raises(StopAtError):
        go(folder, run, stop_at(10), probe_every=1, checkpoint_every=9)
    images = {"probe_train": other, "probe_test": other, "probe_every": 1}
    with pytest.warns(
        RuntimeWarning, match=r"of other images \(probe_train was '.*train.tar', is '.*folders'; probe_te"
    ):
        found = go(folder, run, **images)
    scores = dict(curve(run, "probe/knn"))
    assert found.resumed_from == 9
    assert found.best == {"knn": max(scores[12], scores[16])}
    assert found.best_step in (12, 16)
    with pytest.warns(RuntimeWarning, match="of other images .* it is finished, and stays as it is"):
        assert go(folder, run, probe_every=1).scores == found.scores


def test_nothing_is_drawn_and_few_images_are_read(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    probe = Probe(params(folder, probe_every=1, probe_images=9), CPU)
    assert 0 <= probe(weights_of_encoder(folder)) <= 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert (probe.facts["train"], probe.facts["test"], probe.bad) == (9, 9, 0)
    # Folders have a class's images in a row.
    assert [sample.label for sample in labelled_samples(folder / "folders", lambda *_: None, 6)] == [0, 0, 1, 1, 2, 2]
    # Two images that vote are of two classes: the third is not looked for.
    two = {"probe_train": str(folder / "folders"), "probe_test": str(labelled_shard(tmp_path / "b.tar", range(1, 9)))}
    assert Probe(params(folder, probe_every=1, probe_images=2, **two), CPU).facts == {
        "train": 2, "test": 1, "bytes": 3 * 3 * STUDENT.image_size**2,
    }  # fmt: skip
    write_tar(tmp_path / "good" / "bad.tar", {"a.png": b"no image", "a.cls": b"0"})
    labelled_shard(tmp_path / "good" / "good.tar", range(3))
    some = Probe(params(folder, probe_every=1, probe_train=str(tmp_path / "good")), CPU)
    assert (some.facts["train"], some.bad) == (3, 1)


def weights_of_encoder(folder: Path) -> dict[str, torch.Tensor]:
    return open_checkpoint(folder / "run").weights("student")


def probed(**recipe: Any) -> Callable[[], object]:
    """A probe of images that the case writes into its folder: `a.tar` of three classes, `b.tar` of one of them."""

    def provoke() -> object:
        labelled_shard(Path("a.tar"), range(6))
        labelled_shard(Path("b.tar"), range(0, 6, 3))
        write_tar(Path("unlabelled.tar"), {"x.png": png(image(0, 0))})
        write_tar(Path("bad.tar"), {"x.png": b"no image", "x.cls": b"0"})
        sets = {"probe_train": "a.tar", "probe_test": "b.tar", "probe_every": 1}
        return Probe(params(Path(), **{**sets, **recipe}), CPU)

    return provoke


def from_python() -> None:
    write_store(Path("targets"), HEAD, [40])
    pretraining.pretrain("targets", "run", params(Path(), probe_every=1))


def no_class_token() -> None:
    student = STUDENT.model_copy(update={"model": "vit_medium_patch16_gap_240"})
    Probe(params(Path(), probe_every=1).model_copy(update={"student": student}), CPU)


CASES: dict[str, Case] = {
    "one of two sets": (
        lambda: load_params(None, ["pretrain.probe_every=1", "pretrain.probe_test=b"]),
        SettingError,
        "the settings, pretrain: probe_every needs labelled images to vote and to judge, found probe_train None and "
        "probe_test 'b'; name both",
    ),
    "no set": (probed(probe_train="none"), MissingError, "none ..."),
    "no labels": (
        probed(probe_test="unlabelled.tar"),
        DataError,
        "shard unlabelled.tar: image 'x' has no label; put images into one folder per class and run `milan-pipe "
        "prepare`, or add a .cls member with the class index",
    ),
    "no image": (
        probed(probe_test="bad.tar"),
        DataError,
        "none of the 1 images of bad.tar can be read; prepare the shards again",
    ),
    "classes that none has": (
        probed(probe_train="b.tar", probe_test="a.tar"),
        DataError,
        "2 of 3 classes of pretrain.probe_test a.tar are of no image among the 2 of pretrain.probe_train b.tar; "
        "prepare both from folders of the same class names",
    ),
    "few images that vote": (
        probed(knn=(7,)),
        SettingError,
        "knn.neighbours asks for 7 and more, pretrain.probe_train a.tar has 6 images; give a smaller number",
    ),
    "no class token": (
        no_class_token,
        SettingError,
        "model 'vit_medium_patch16_gap_240' has no class token, which embed.pool=cls takes; set embed.pool=mean",
    ),
    "from Python": (from_python, SettingError, "pretrain.probe_every needs, from Python, probe_for"),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
