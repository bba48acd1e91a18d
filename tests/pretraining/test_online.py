"""The teacher in every step against its stored targets, on real scenes with the bundled teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from milan_pipe import api
from milan_pipe.config.params import Params, load_params
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.pretraining.run import pretrain
from milan_pipe.teacher import clip
from milan_pipe.training.recorder import TrainProgress

SETTINGS = [
    "prepare.train_scenes=96",
    "prepare.test_scenes=0",
    "prepare.samples_per_shard=48",
    "views.count=2",
    "extract.threads=1",
    "codec=float16",
    "pretrain.epochs=5",
    "pretrain.batch_size=16",
    "pretrain.log_every=1",
    "pretrain.device=cpu",
]


def params(*more: str) -> Params:
    return load_params(Path(__file__).parents[2] / "params.yaml", [*SETTINGS, *more])


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    api.prepare("demo", root / "images", params())
    api.extract_targets(f"{root / 'images'}/train-*.tar", root / "targets", params())
    return root / "targets"


def curve(targets: Path, run: Path, *more: str) -> list[float]:
    losses: list[float] = []

    def keep(progress: TrainProgress) -> None:
        losses.append(progress.loss)

    api.pretrain(targets, run, params(*more), on_progress=keep)
    return losses


def test_stored_targets_train_like_the_teacher_itself(targets: Path, tmp_path: Path) -> None:
    stored = curve(targets, tmp_path / "stored")
    online = curve(targets, tmp_path / "online", "pretrain.targets=online")
    assert len(stored) == 30
    assert stored != online  # rounding to float16 leaves a trace: the teacher did run
    assert max(abs(left - right) for left, right in zip(stored, online, strict=True)) < 1e-3
    assert stored[-1] < 0.8 * stored[0]


def test_what_extraction_refuses_stops_the_run_and_names_the_batch(
    targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = clip.load_teacher

    def disturbed(*arguments: Any, **keywords: Any) -> clip.Teacher:
        teacher = load(*arguments, **keywords)
        calls = iter(range(10**6))

        @torch.inference_mode()
        def hook(_module: Any, _inputs: Any, output: clip.TeacherOutput) -> None:
            if next(calls) == 2:
                output.features_BST[5, 7] = 0  # a zero token

        teacher.register_forward_hook(hook)
        return teacher

    monkeypatch.setattr(clip, "load_teacher", disturbed)
    with pytest.raises(DataError, match="step 3"):
        curve(targets, tmp_path / "run", "pretrain.targets=online")
    assert [file.name for file in (tmp_path / "run" / "not-finite").iterdir()] == ["step-00000003.safetensors"]


def test_another_teacher_and_another_target_are_refused(targets: Path, tmp_path: Path) -> None:
    more = ["pretrain.targets=online", "teacher.normalization=imagenet"]
    with pytest.raises(MismatchError, match=r"normalization"):
        curve(targets, tmp_path / "run", *more)
    with pytest.raises(SettingError, match="needs one of features"):
        curve(targets, tmp_path / "run", "pretrain.targets=online", "target=pixels")
    with pytest.raises(SettingError, match="teacher_for"):
        pretrain(targets, tmp_path / "run", params("pretrain.targets=online"))
    assert not (tmp_path / "run").exists()
