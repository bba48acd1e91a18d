"""`milan_pipe.load_student`: one model from a run, a checkpoint and an export, as timm has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from support.project import Project

import milan_pipe
from milan_pipe.errors import DataError, MissingError


def test_run_checkpoint_and_export_give_one_model(project: Project, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = project.runs[0]
    milan_pipe.export(run, tmp_path / "out")
    models = [milan_pipe.load_student(path) for path in (run, next(run.glob("checkpoints/*")), tmp_path / "out")]
    with torch.no_grad():
        features = [model.forward_features(images) for model in models]
    assert features[0].shape == (2, 65, 32)
    assert all(torch.equal(features[0], other) for other in features[1:])
    for model in models:
        assert not model.training
        config = timm.data.resolve_model_data_config(model)
        assert tuple(config["input_size"]) == (3, 64, 64)
        assert tuple(config["mean"]) == (0.485, 0.456, 0.406)
        assert config["crop_pct"] == 0.875


def test_a_fine_tuned_one_has_its_classifier(project: Project, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tuned = project.runs[2]
    milan_pipe.export(tuned / "best", tmp_path / "out")
    with torch.no_grad():
        logits = milan_pipe.load_student(tuned / "best")(images)
        assert logits.shape == (2, 12)
        assert torch.equal(logits, milan_pipe.load_student(tmp_path / "out")(images))


def test_what_is_no_student_is_named(project: Project, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not there"):
        milan_pipe.load_student(tmp_path / "none")
    with pytest.raises(DataError, match="holds what `milan-pipe segment` trained"):
        milan_pipe.load_student(project.runs[4])
    milan_pipe.export(project.runs[0], tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="is no model that timm can load"):
        milan_pipe.load_student(tmp_path / "out")
