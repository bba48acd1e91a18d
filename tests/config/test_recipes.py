"""Recipes ship with the package, load as they stand, and say what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from milan_pipe.config.params import Params, load_params
from milan_pipe.config.recipes import recipe_names
from milan_pipe.student.encoder import grid_of

NAMES = recipe_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_names_itself_in_its_commands(name: str) -> None:
    params = load_params(name)
    assert params.about is not None
    assert all(f"--params {name}" in command for command in params.about.commands)
    steps = ("extract-targets", "pretrain")
    assert [step for step in steps if any(step in command for command in params.about.commands)] == list(steps)
    ranks = [int(command.split()[2]) for command in params.about.commands if command.startswith("torchrun")]
    for count in ranks:
        # Mixup pairs a rank's images, and UperNet's batch norms need two.
        assert params.finetune.batch_size % (2 * count) == 0
        assert params.segment.batch_size // count >= 2
        assert params.lars_probe.batch_size % count == 0
        assert params.pretrain.canonical_streams % count == 0
        assert params.pretrain.batch_size % count == 0


def test_the_published_recipe_is_the_papers() -> None:
    params = load_params("imagenet1k-vit-b-16")
    recipe = params.pretrain
    assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size) == (400, 40, 4096)
    assert (recipe.lr, recipe.betas, recipe.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
    assert (params.decoder.width, params.decoder.depth, params.decoder.heads) == (512, 8, 16)
    assert (params.masking.kind, params.masking.ratio) == ("semantic", 0.75)
    assert params.views.scale == (0.2, 1.0)
    for published in (params, load_params("imagenet1k-vit-l-16")):
        assert (published.teacher.model, published.teacher.normalization) == ("ViT-B-16", "imagenet")


def test_every_imagenet_student_fits_its_teachers_grid() -> None:
    for name in NAMES:
        params = load_params(name)
        patch = {"ViT-B-16": 16, "ViT-L-14": 14, "demo": 8}[params.teacher.model]
        side = params.teacher.image_size or params.student.image_size
        assert grid_of(params.student) == (side // patch, side // patch)


def test_the_scenes_are_the_defaults_but_for_few_labels() -> None:
    scenes = load_params("scenes").model_copy(update={"about": None})
    assert scenes.finetune.train_fraction == 0.1
    assert scenes.model_copy(update={"finetune": Params().finetune}) == Params()


def test_set_changes_a_recipe_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_params("imagenet1k-vit-b-16", ["pretrain.epochs=7"]).pretrain.epochs == 7
    (tmp_path / "scenes").write_text("pretrain: {epochs: 3}")
    assert load_params("scenes").pretrain.epochs == 3


def test_the_command_lists_them_all() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "milan_pipe", "recipes", "--json"], capture_output=True, text=True, check=True
    )
    assert sorted(json.loads(done.stdout)) == NAMES
    assert "85.4 % fine-tuned" in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagenet1k")])
def test_the_published_recipes_of_transfer(name: str) -> None:
    params = load_params(name)
    large = "vit-l" in name
    tuned, augment, probe, segment = params.finetune, params.augment, params.lars_probe, params.segment
    assert (tuned.epochs, tuned.warmup_epochs, tuned.batch_size, tuned.lr, tuned.min_lr) == (100, 5, 1024, 1e-4, 1e-6)
    assert (tuned.betas, tuned.weight_decay) == ((0.9, 0.999), 0.05)
    assert (tuned.layer_decay, tuned.drop_path) == ((0.75, 0.2) if large else (0.65, 0.1))
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.erasing, augment.smoothing) == (0.25, 0.1)
    assert (probe.epochs, probe.warmup_epochs, probe.batch_size, probe.momentum) == (100, 10, 16384, 0.9)
    assert probe.lr == (0.02 if large else 0.05)
    assert probe.pool == "cls"
    assert (segment.steps, segment.warmup_steps, segment.batch_size, segment.lr) == (160_000, 1500, 16, 1e-4)
    assert (segment.power, segment.weight_decay, segment.layer_decay, segment.drop_path) == (1.0, 0.05, 0.65, 0.1)
    assert (segment.crop, segment.stride, segment.ratio, segment.auxiliary) == (512, 341, (0.5, 2.0), 0.4)
    assert segment.channels == {"s": 384, "b": 768, "l": 1024}[name[15]]
    assert segment.over_all_pixels
