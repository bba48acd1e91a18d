"""A small project, made once: scenes, targets, runs of every kind, results of probes."""

from __future__ import annotations

import pytest
from support.project import SETTINGS, Project

from milan_pipe import commands
from milan_pipe.config import load_params


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    params = load_params(None, SETTINGS)
    commands.prepare("demo", root / "images", params)
    images = str(root / "images" / "train-*.tar"), str(root / "images" / "test-*.tar")
    targets = root / "targets"
    commands.extract_targets(images[0], targets, params)
    milan, mae = root / "runs" / "milan", root / "runs" / "mae"
    commands.pretrain(targets, milan, params)
    commands.pretrain(
        targets, mae, load_params(None, [*SETTINGS, "target=pixels", "decoder.kind=plain", "masking.kind=random"])
    )
    commands.finetune(milan, *images, root / "tuned" / "milan", params)
    commands.finetune("random", *images, root / "tuned" / "random", params)
    commands.segment(milan, *images, root / "segmented", params)
    commands.knn(milan, *images, params)
    commands.knn("random", *images, params, keep=root / "bounds")
    commands.knn("teacher", *images, params, keep=root / "bounds")
    commands.linear_probe(mae, *images, params)
    runs = milan, mae, root / "tuned" / "milan", root / "tuned" / "random", root / "segmented"
    return Project(root, params, images, targets, runs)
