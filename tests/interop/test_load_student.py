"""`milan_pipe.load_student`: one model from a run, a checkpoint and an export, as timm has it."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from support.project import Project

import milan_pipe


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
