"""Loading teachers: what identifies one, and what pixels become."""

from __future__ import annotations

import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import processes
from torch.testing import assert_close

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import ShapeError
from milan_pipe.images.scenes import MASK_CLASSES, THINGS, render_scene
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.teacher.clip_model import read_clip
from milan_pipe.teacher.clip_training import zero_shot_accuracy
from milan_pipe.teacher.source import DEMO_FOLDER

WEIGHTS = DEMO_FOLDER / "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def demo():
    return load_teacher(TeacherSettings())


def scenes(count, seed=77):
    return torch.from_numpy(np.stack([render_scene(seed, i).image for i in range(count)]))


# --- identity -----------------------------------------------------------------------------------------------------


def test_local_checkpoint_is_the_bundled_teacher(demo, tmp_path):
    path = tmp_path / "copy.safetensors"
    save_file(load_file(WEIGHTS), path)
    local = load_teacher(TeacherSettings(pretrained=str(path)))
    assert local.info.weights_sha256 == demo.info.weights_sha256
    # The folder of a checkpoint is not part of the identity.
    assert local.info.pretrained == "copy.safetensors"
    pixels = scenes(2)
    assert torch.equal(local(pixels).features_BST, demo(pixels).features_BST)


def test_digest_changes_with_one_weight(demo, tmp_path):
    weights = load_file(WEIGHTS)
    weights["visual.transformer.resblocks.2.ln_1.bias"][7] += 1e-4
    save_file(weights, tmp_path / "changed.safetensors")
    changed = load_teacher(TeacherSettings(pretrained=str(tmp_path / "changed.safetensors")))
    assert changed.info.weights_sha256 != demo.info.weights_sha256


def test_digest_ignores_the_text_tower(demo, tmp_path):
    weights = load_file(WEIGHTS)
    weights["text_projection"] += 1
    save_file(weights, tmp_path / "text.safetensors")
    changed = load_teacher(TeacherSettings(pretrained=str(tmp_path / "text.safetensors")))
    assert changed.info.weights_sha256 == demo.info.weights_sha256


def test_random_weights_are_the_same_everywhere(demo):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = load_teacher(TeacherSettings(pretrained="random"))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    second = load_teacher(TeacherSettings(pretrained="random"))
    code = (
        "from milan_pipe.teacher.clip import TeacherSettings, load_teacher;"
        "print(load_teacher(TeacherSettings(pretrained='random')).info.weights_sha256)"
    )
    other = processes.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert first.info.weights_sha256 == second.info.weights_sha256 == other[-1]
    assert first.info.weights_sha256 != demo.info.weights_sha256


def test_info(demo):
    assert (demo.info.model, demo.info.pretrained, demo.info.normalization) == ("demo", None, "clip")
    assert (demo.info.image_size, demo.info.grid, demo.info.width) == (64, (8, 8), 128)
    assert not demo.visual.training
    assert not any(parameter.requires_grad for parameter in demo.parameters())


# --- pixels -------------------------------------------------------------------------------------------------------


def test_normalisation_is_as_named(demo):
    pixels = scenes(3)
    imagenet = load_teacher(TeacherSettings(normalization="imagenet"))
    assert imagenet.info.normalization == "imagenet"
    assert_close(imagenet.mean.flatten(), 255 * torch.tensor([0.485, 0.456, 0.406]))
    assert_close(imagenet.std.flatten(), 255 * torch.tensor([0.229, 0.224, 0.225]))
    assert_close(demo.mean.flatten(), 255 * torch.tensor(open_clip.OPENAI_DATASET_MEAN))
    assert_close(demo.std.flatten(), 255 * torch.tensor(open_clip.OPENAI_DATASET_STD))
    # A wide margin over float error: the two really see different inputs.
    assert (imagenet(pixels).features_BST - demo(pixels).features_BST).abs().max() > 1e-2


def test_output_is_the_towers_own_embedding(demo):
    pixels = scenes(3)
    output = demo(pixels)
    assert output.features_BST.shape == (3, 65, 128)
    assert output.importance_BL.shape == (3, 64)
    assert output.features_BST.dtype == output.importance_BL.dtype == torch.float32
    normal = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)) / (
        torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    )
    with torch.inference_mode():
        assert_close(output.features_BST[:, 0], demo.visual(normal), rtol=1e-4, atol=1e-4)


def test_other_sizes_are_resized(demo):
    small = scenes(2)
    big = F.interpolate(small.permute(0, 3, 1, 2).float(), (160, 128), mode="bicubic", antialias=True)
    big = big.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    output, reference = demo(big), demo(small)
    assert output.features_BST.shape == reference.features_BST.shape
    assert F.cosine_similarity(output.features_BST[:, 0], reference.features_BST[:, 0], dim=-1).min() > 0.9


def test_image_size_setting_changes_the_grid():
    teacher = load_teacher(TeacherSettings(pretrained="random", image_size=32))
    assert (teacher.info.image_size, teacher.info.grid) == (32, (4, 4))
    assert teacher(scenes(1)).features_BST.shape == (1, 17, 128)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 64, 64, 3),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(2, 64, 64, 4, dtype=torch.uint8),
    ],
    ids=["float", "no batch", "channels first", "four channels"],
)
def test_wrong_pixels_are_refused(demo, pixels):
    with pytest.raises(ShapeError, match="pixels"):
        demo(pixels)


def test_bundled_teacher_knows_the_things():
    unseen = [render_scene(4_242_424, index) for index in range(200)]
    images, labels = np.stack([scene.image for scene in unseen]), np.array([scene.label for scene in unseen])
    prompts = [[f"a {thing}"] for thing in THINGS]
    assert zero_shot_accuracy(*read_clip(DEMO_FOLDER), images, labels, prompts) >= 0.95


def test_bundled_teacher_looks_at_things(demo):
    unseen = [render_scene(4_242_424, index) for index in range(200)]
    share_NL = demo(torch.from_numpy(np.stack([scene.image for scene in unseen]))).importance_BL
    share_NL = share_NL / share_NL.sum(dim=1, keepdim=True)
    things = torch.from_numpy(np.stack([scene.segmentation for scene in unseen]) >= len(MASK_CLASSES) - len(THINGS))
    thing_NL = F.avg_pool2d(things.float()[:, None], 8).flatten(1)
    assert thing_NL.mean() <= 0.3
    assert (share_NL * thing_NL).sum(dim=1).mean() >= 0.58
    assert (share_NL.max(dim=1).values * 64 > 10).float().mean() <= 0.08
