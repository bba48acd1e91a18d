"""Features that are kept: the same scores, no second embedding, and other features for other weights or images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.images import NAMES, TINY, class_folders, labelled_shard
from support.timm_models import timm_folder

from milan_pipe import api
from milan_pipe.config.evaluation import KnnSettings
from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError
from milan_pipe.evaluation import features as module
from milan_pipe.evaluation.probe import Probe
from milan_pipe.images.prepare import prepare
from milan_pipe.teacher.source import DEMO_FOLDER

PARAMS = Params(student=TINY, knn=KnnSettings(neighbours=(3,)))


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    labelled_shard(tmp_path / "train.tar", range(30))
    labelled_shard(tmp_path / "test.tar", range(100, 112))
    return str(tmp_path / "train.tar"), str(tmp_path / "test.tar")


def test_kept_features_give_the_same_scores(
    sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "features"
    plain = api.knn("random", *sets, PARAMS)
    assert api.knn("random", *sets, PARAMS, features=kept) == plain
    assert len(list(kept.iterdir())) == 2

    def refuse(*_: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(module, "centre_view", refuse)
    assert api.knn("random", *sets, PARAMS, features=kept) == plain
    assert api.linear_probe("random", *sets, PARAMS, features=kept).train == 30


def test_other_weights_settings_or_images_are_embedded_anew(sets: tuple[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "features"
    api.knn("random", *sets, PARAMS, features=kept)
    for number, changed in enumerate(
        (
            PARAMS.model_copy(update={"pretrain": PARAMS.pretrain.model_copy(update={"seed": 1})}),
            PARAMS.model_copy(update={"embed": PARAMS.embed.model_copy(update={"pool": "mean"})}),
        ),
        2,
    ):
        api.knn("random", *sets, changed, features=kept)
        assert len(list(kept.iterdir())) == 2 * number
    labelled_shard(Path(sets[1]), range(200, 212))
    os.utime(sets[1], (1, 1))
    api.knn("random", *sets, PARAMS, features=kept)
    assert len(list(kept.iterdir())) == 7


def test_damaged_features_say_which_file(sets: tuple[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "features"
    api.knn("random", *sets, PARAMS, features=kept)
    for file in kept.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match="remove it"):
        api.knn("random", *sets, PARAMS, features=kept)


def test_a_changed_value_and_another_files_features_are_found(sets: tuple[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "features"
    plain = api.knn("random", *sets, PARAMS, features=kept)
    one, other = sorted(kept.iterdir())
    whole = one.read_bytes()
    changed = bytearray(whole)
    changed[-3] ^= 1
    for data in (bytes(changed), other.read_bytes()):
        one.write_bytes(data)
        with pytest.raises(DataError, match="remove it"):
            api.knn("random", *sets, PARAMS, features=kept)
    one.write_bytes(whole)
    assert api.knn("random", *sets, PARAMS, features=kept) == plain


def test_the_same_weights_with_other_heads_are_embedded_anew(sets: tuple[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "features"
    for number, heads in enumerate((1, 2), 1):
        params = PARAMS.model_copy(update={"student": TINY.model_copy(update={"heads": heads})})
        api.knn("random", *sets, params, features=kept)
        assert len(list(kept.iterdir())) == 2 * number


def test_an_exported_student_with_other_heads_is_embedded_anew(sets: tuple[str, str], tmp_path: Path) -> None:
    kept, model = tmp_path / "features", timm_folder(tmp_path / "m")
    before = api.knn(str(model), *sets, PARAMS, features=kept)
    config = model / "config.json"
    described = json.loads(config.read_text())
    described["model_args"]["num_heads"] *= 2
    config.write_text(json.dumps(described))
    assert api.knn(str(model), *sets, PARAMS, features=kept) == api.knn(str(model), *sets, PARAMS)
    assert len(list(kept.iterdir())) == 4
    assert before.train == 30


def test_a_teacher_that_is_described_otherwise_is_embedded_anew(sets: tuple[str, str], tmp_path: Path) -> None:
    kept, model = tmp_path / "features", tmp_path / "clip"
    shutil.copytree(DEMO_FOLDER, model)
    teacher = TeacherSettings(model=f"local-dir:{model}")
    params = PARAMS.model_copy(update={"teacher": teacher, "student": StudentSettings(image_size=64, patch_size=8)})
    api.knn("teacher", *sets, params, features=kept)
    config = model / "open_clip_config.json"
    described = json.loads(config.read_text())
    described["model_cfg"]["quick_gelu"] = True
    config.write_text(json.dumps(described))
    assert api.knn("teacher", *sets, params, features=kept) == api.knn("teacher", *sets, params)
    assert len(list(kept.iterdir())) == 4


@pytest.mark.parametrize("prepared", [False, True])
def test_classes_of_other_names_are_refused(tmp_path: Path, prepared: bool) -> None:
    train, test = class_folders(tmp_path / "a", range(9)), class_folders(tmp_path / "b", range(4), NAMES[1:])
    for folder in (train, test) if prepared else ():
        prepare(str(folder), folder.with_name(f"{folder.name}-shards"), PrepareSettings(), workers=1)
    if prepared:
        train, test = (folder.with_name(f"{folder.name}-shards") for folder in (train, test))
    probe = PARAMS.pretrain.model_copy(update={"probe_train": str(train), "probe_test": str(test), "probe_every": 1})
    uses: tuple[Callable[[], object], ...] = (
        lambda: api.knn("random", train, test, PARAMS, features=tmp_path / "features"),
        lambda: api.linear_probe("random", train, test, PARAMS),
        lambda: Probe(PARAMS.model_copy(update={"pretrain": probe}), torch.device("cpu")),
    )
    for use in uses:
        with pytest.raises(
            DataError, match=rf"{train} and {test} have different classes: only {train} has {NAMES[0]}; a"
        ):
            use()
    assert api.knn("random", train, train, PARAMS).train == 9


def test_class_folders_score_as_their_shards(sets: tuple[str, str], tmp_path: Path) -> None:
    folders = class_folders(tmp_path / "train", range(30)), class_folders(tmp_path / "test", range(100, 112))
    by_folder = api.knn("random", str(folders[0]), str(folders[1]), PARAMS)
    assert by_folder.accuracy == pytest.approx(api.knn("random", *sets, PARAMS).accuracy, abs=0.17)
    assert (by_folder.train, by_folder.test) == (30, 12)
