"""Loading a teacher of each family: weights, identity, input size, normalisation, precision."""

from __future__ import annotations

import json
import logging
import os
import struct

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from support.towers import sizes_of, tower_outputs
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.teacher.clip import load_teacher, resolve_teacher_precision
from milan_pipe.teacher.normalization import IMAGENET, OPENAI, normalization_of
from milan_pipe.teacher.source import find_source
from milan_pipe.teacher.tower import choose_input_size

NATIVE, EVA02, SIGLIP = "tiny-L-14", "tiny-EVA02-14", "tiny-SigLIP-14"
FAMILIES = [NATIVE, EVA02, SIGLIP]
HALF = (0.5, 0.5, 0.5)

CONFIGS = {
    NATIVE: {"image_size": 224, "patch_size": 14, "width": 32, "head_width": 16, "layers": 2},
    EVA02: {"image_size": 224, "timm_model_name": "tiny_eva02", "timm_pool": "token", "timm_proj": None},
    SIGLIP: {"image_size": 224, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
}
TRUNKS = {
    "tiny_eva02": (
        Eva,
        {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True,
         "ref_feat_shape": (16, 16), "head_init_scale": 1.0},
    ),
    "tiny_siglip": (VisionTransformer, {"class_token": False}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _tiny_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, vision in CONFIGS.items():
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {}}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    known = timm.create_model

    def create_model(name, **settings):
        if name not in TRUNKS:
            return known(name, **settings)
        kind, sizes = TRUNKS[name]
        settings.pop("pretrained")
        trunk = kind(img_size=224, patch_size=14, embed_dim=32, depth=2, num_heads=2, **sizes, **settings)
        trunk.default_cfg = trunk.pretrained_cfg = {"mean": HALF, "std": HALF} if "siglip" in name else {}
        return trunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", create_model)
        yield


def images(count=2, side=224):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 255
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def trained(name):
    """A tower's tensors with other values than a fresh one has."""
    torch.manual_seed(11)
    weights = load_teacher(TeacherSettings(model=name, pretrained="random")).visual.state_dict()
    return {key: value + 0.1 * torch.randn_like(value) for key, value in weights.items()}


def loaded(name, path, **settings):
    return load_teacher(TeacherSettings(model=name, pretrained=str(path), **settings))


# --- weights and identity -----------------------------------------------------------------------------------------


def save_as(form, weights, path):
    whole = {f"visual.{key}": value for key, value in weights.items()} | {"logit_scale": torch.ones(())}
    if form == "model.safetensors":
        save_file(whole, path / form)
    elif form == "tower.safetensors":
        save_file(weights, path / form)
    elif form == "model.pt":
        torch.save(whole, path / form)
    else:
        training = {f"module.{key}": value for key, value in whole.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": training, "optimizer": {"state": {}}}, path / form)
    return path / form


@pytest.mark.parametrize("form", ["model.safetensors", "tower.safetensors", "model.pt", "epoch_3.pt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_local_checkpoint(name, form, tmp_path):
    weights = trained(name)
    teacher = loaded(name, save_as(form, weights, tmp_path))
    found = teacher.visual.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert teacher.info.pretrained == form
    output = teacher(images())
    assert output.features_BST.shape == (2, 257, 32)
    assert output.importance_BL.shape == (2, 256)
    assert not teacher.visual.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_is_of_the_image_towers_tensors(name, tmp_path):
    weights = trained(name)
    first = loaded(name, save_as("model.safetensors", weights, tmp_path)).info.weights_sha256
    assert first == loaded(name, save_as("epoch_3.pt", weights, tmp_path)).info.weights_sha256
    seen = {first, load_teacher(TeacherSettings(model=name, pretrained="random")).info.weights_sha256}
    for key in [next(iter(weights)), list(weights)[-1]]:
        changed = {**weights, key: weights[key].clone()}
        changed[key].view(-1)[0] += 1e-3
        seen.add(loaded(name, save_as("model.pt", changed, tmp_path)).info.weights_sha256)
    assert len(seen) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_do_not_depend_on_the_callers_generator(name):
    torch.manual_seed(1)
    first = load_teacher(TeacherSettings(model=name, pretrained="random"))
    torch.manual_seed(2)
    second = load_teacher(TeacherSettings(model=name, pretrained="random"))
    assert first.info == second.info
    assert torch.equal(first(images()).features_BST, second(images()).features_BST)


def test_tag_is_fetched_and_loaded_as_a_file_is(monkeypatch, tmp_path):
    path = save_as("model.safetensors", trained(SIGLIP), tmp_path)
    tags = {"webli": {"url": "https://somewhere/model.safetensors", "mean": (0.4, 0.5, 0.6), "std": HALF}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SIGLIP, tags)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(path) if config == tags["webli"] else "")
    teacher = load_teacher(TeacherSettings(model=SIGLIP, pretrained="webli"))
    assert teacher.info.pretrained == "webli"
    assert teacher.info.weights_sha256 == loaded(SIGLIP, path).info.weights_sha256
    assert_close(teacher.mean.flatten(), 255 * torch.tensor([0.4, 0.5, 0.6]))


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_of_another_model_is_refused(name, tmp_path):
    other = FAMILIES[FAMILIES.index(name) - 1]
    path = save_as("model.safetensors", trained(other), tmp_path)
    with pytest.raises(MismatchError, match="does not fit") as caught:
        loaded(name, path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_other_shapes_are_named(tmp_path):
    weights = trained(EVA02)
    weights["trunk.head.weight"] = torch.zeros(7, 32)
    with pytest.raises(MismatchError, match=r"head.weight is \(7, 32\)"):
        loaded(EVA02, save_as("model.pt", weights, tmp_path))


class Trap:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", FAMILIES)
def test_python_objects_are_never_unpickled(name, tmp_path):
    trap = Trap()
    trap.path = str(tmp_path / "sprung")
    torch.save({**trained(name), "extra": trap}, tmp_path / "trap.pt")
    with pytest.raises(DataError, match="Python objects"):
        loaded(name, tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_unreadable_file(tmp_path, monkeypatch):
    path = save_as("model.pt", trained(NATIVE), tmp_path)

    def refuse(*_args, **_settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        loaded(NATIVE, path)


@pytest.mark.parametrize(
    ("model", "pretrained", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-B-16", "random", False),
        ("ViT-B-16-quickgelu", "random", True),
        ("ViT-B-16-quickgelu", __file__, True),
    ],
)
def test_activation_is_the_one_that_the_weights_were_trained_with(model, pretrained, quick):
    with torch.device("meta"):
        tower = find_source(model, pretrained).untrained()
    assert isinstance(tower.transformer.resblocks[0].mlp.gelu, QuickGELU) == quick


# --- input size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_grid_of_the_student_sets_the_size(name, tmp_path):
    path = save_as("model.safetensors", trained(name), tmp_path)
    settings = TeacherSettings(model=name, pretrained=str(path))
    own, matched = load_teacher(settings), load_teacher(settings, grid=(14, 14))
    assert (own.info.image_size, own.info.grid) == (224, (16, 16))
    assert (matched.info.image_size, matched.info.grid) == (196, (14, 14))
    # The same weights at another size are the same teacher.
    assert matched.info.weights_sha256 == own.info.weights_sha256
    output = matched(images())
    assert output.features_BST.shape == (2, 197, 32)
    assert output.importance_BL.shape == (2, 196)
    explicit = loaded(name, path, image_size=196)
    assert explicit.info == matched.info
    assert torch.equal(explicit(images()).features_BST, output.features_BST)
    # Views of 224 pixels are resized to the 196 that the tower reads.
    small = F.interpolate(images().permute(0, 3, 1, 2).float(), (196, 196), mode="bicubic", antialias=True)
    normalised = (small.clamp(0, 255) - matched.mean) / matched.std
    with torch.inference_mode():
        assert_close(output.features_BST, tower_outputs(matched.visual, normalised)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_stated_size_wins_over_the_grid(name):
    teacher = load_teacher(TeacherSettings(model=name, pretrained="random", image_size=112), grid=(14, 14))
    assert (teacher.info.image_size, teacher.info.grid) == (112, (8, 8))


@torch.inference_mode()
def test_interpolated_position_is_open_clips_own(tmp_path):
    weights = trained(NATIVE)
    path = save_as("model.safetensors", weights, tmp_path)
    teacher = load_teacher(TeacherSettings(model=NATIVE, pretrained=str(path)), grid=(14, 14))
    reference = open_clip.create_model(NATIVE, force_image_size=196)
    whole = {f"visual.{key}": value for key, value in weights.items()}
    open_clip.model.resize_pos_embed(whole, reference)
    reference.visual.load_state_dict({key.removeprefix("visual."): value for key, value in whole.items()})
    pixels = torch.randn(2, 3, 196, 196)
    features, _ = tower_outputs(teacher.visual, pixels)
    assert_close(features[:, 0], reference.visual.eval()(pixels), rtol=1e-5, atol=1e-5)


def test_checkpoint_of_another_size_is_interpolated(tmp_path):
    weights = trained(NATIVE)
    side = nn.Parameter(torch.randn(1 + 8 * 8, 32))
    weights["positional_embedding"] = side.detach()
    teacher = loaded(NATIVE, save_as("model.pt", weights, tmp_path))
    grid = side[1:].T.reshape(1, 32, 8, 8)
    expected = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True).flatten(2)[0].T
    assert_close(teacher.visual.positional_embedding, torch.cat([side[:1], expected]))


@pytest.mark.parametrize("name", FAMILIES)
def test_size_that_cuts_patches_is_refused(name):
    with pytest.raises(SettingError, match="multiple of 14"):
        load_teacher(TeacherSettings(model=name, pretrained="random", image_size=200))


@pytest.mark.parametrize(
    ("name", "own", "grid", "matched"),
    [
        ("ViT-L-14", 224, (16, 16), 196),
        ("ViT-B-32", 224, (7, 7), 448),
        ("EVA02-L-14-336", 336, (24, 24), 196),
        # Trained at 384 pixels, of which 27 patches cover 378.
        ("ViT-SO400M-14-SigLIP-384", 378, (27, 27), 196),
    ],
)
def test_sizes_of_named_models(name, own, grid, matched):
    with torch.device("meta"):
        tower = find_source(name, "random").untrained()
    assert sizes_of(tower).grid == grid
    assert choose_input_size(sizes_of(tower), name) == own
    assert choose_input_size(sizes_of(tower), name, grid=(14, 14)) == matched
    assert choose_input_size(sizes_of(tower), name, image_size=448, grid=(14, 14)) == 448


# --- normalisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained", "mean"),
    [
        ("ViT-B-16", "openai", OPENAI.mean),
        ("ViT-L-14", "laion2b_s32b_b82k", HALF),
        ("ViT-L-14", "openai", OPENAI.mean),
        ("EVA02-B-16", "merged2b_s8b_b131k", OPENAI.mean),
        ("EVA02-L-14", "random", OPENAI.mean),
        ("ViT-B-16-SigLIP", "webli", HALF),
        ("ViT-B-16-SigLIP", "random", HALF),
        ("ViT-B-16-SigLIP2-256", "random", HALF),
        ("MobileCLIP-B", "random", (0.0, 0.0, 0.0)),
        ("PE-Core-B-16", "random", HALF),
        ("ViT-S-16", "random", OPENAI.mean),
    ],
)
def test_teachers_own_normalisation(name, pretrained, mean):
    assert pretrained in ["random", *open_clip.list_pretrained_tags_by_model(name)]
    source = find_source(name, pretrained)
    assert normalization_of("clip", source, nn.Identity()).mean == pytest.approx(mean)
    assert normalization_of("imagenet", source, nn.Identity()) == IMAGENET


def test_local_checkpoint_is_normalised_as_its_model_or_its_description_says(tmp_path, caplog):
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()

    def normalization(name):
        return normalization_of("clip", find_source(name, str(checkpoint)), nn.Identity())

    assert normalization("ViT-B-16-SigLIP").mean == HALF
    assert not caplog.records
    # The published checkpoints of this model were not all trained alike.
    with caplog.at_level(logging.WARNING):
        assert normalization("ViT-L-14") == OPENAI
    assert "open_clip_config.json" in caplog.text
    caplog.clear()
    description = tmp_path / "open_clip_config.json"
    description.write_text(json.dumps({"preprocess_cfg": {"mean": HALF, "std": [0.5, 0.5, 0.5]}}))
    assert normalization("ViT-L-14") == (HALF, HALF)
    assert not caplog.records
    for content in ["{", "{}", '{"preprocess_cfg": {"mean": [0.5], "std": [0.5]}}', '{"preprocess_cfg": 3}']:
        description.write_text(content)
        with pytest.raises(DataError, match="no mean and std"):
            normalization("ViT-L-14")


@pytest.mark.parametrize(("name", "mean"), [(NATIVE, OPENAI.mean), (EVA02, OPENAI.mean), (SIGLIP, HALF)])
@torch.inference_mode()
def test_pixels_are_normalised_as_named(name, mean):
    for kind, expected in [("clip", mean), ("imagenet", IMAGENET.mean)]:
        teacher = load_teacher(TeacherSettings(model=name, pretrained="random", normalization=kind))
        assert teacher.info.normalization == kind
        assert_close(teacher.mean.flatten(), 255 * torch.tensor(expected))
        std = {OPENAI.mean: OPENAI.std, HALF: HALF, IMAGENET.mean: IMAGENET.std}[expected]
        unit = images().permute(0, 3, 1, 2) / 255
        normal = (unit - torch.tensor(expected).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert_close(teacher(images()).features_BST[:, 0], teacher.visual(normal), rtol=1e-4, atol=1e-5)


# --- precision ----------------------------------------------------------------------------------------------------


def test_auto_follows_the_device():
    assert resolve_teacher_precision("auto", torch.device("cuda:1")) == "bfloat16"
    assert resolve_teacher_precision("auto", torch.device("cpu")) == "float32"
    assert resolve_teacher_precision("float32", torch.device("cuda")) == "float32"
    assert load_teacher(TeacherSettings(model=NATIVE, pretrained="random")).info.precision == "float32"


@pytest.mark.parametrize("name", FAMILIES)
def test_residual_stream_stays_in_float32(name):
    teacher = load_teacher(TeacherSettings(model=name, pretrained="random", precision="bfloat16"))
    norm = teacher.visual.ln_post if name == NATIVE else teacher.visual.trunk.norm
    seen = []
    norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    teacher(images())
    assert seen == [torch.float32]


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name, tmp_path):
    path = save_as("model.safetensors", trained(name), tmp_path)
    exact, fast = loaded(name, path), loaded(name, path, precision="bfloat16")
    assert (exact.info.precision, fast.info.precision) == ("float32", "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        a, b = exact(images()), fast(images())
    assert torch.equal(a.features_BST, exact(images()).features_BST)
    assert b.features_BST.dtype == b.importance_BL.dtype == torch.float32
    assert not torch.equal(a.features_BST, b.features_BST)
    assert F.cosine_similarity(a.features_BST, b.features_BST, dim=-1).min() > 0.999
    assert_close(a.importance_BL, b.importance_BL, rtol=0.05, atol=0)
    # A softmax in bfloat16 would leave few different shares, none of them finer than one in 256.
    assert not torch.equal(b.importance_BL, b.importance_BL.bfloat16().float())
    assert a.importance_BL.std() > 1e-5
    if name == SIGLIP:
        assert_close(b.importance_BL.sum(dim=1), torch.ones(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 32), (2, 3, 32), (12, 31), ()])
def test_positions_that_cannot_be_resized_are_one_error(shape, tmp_path):
    weights = trained(NATIVE) | {"positional_embedding": torch.zeros(shape)}
    with pytest.raises(MismatchError, match="does not fit the image tower"):
        loaded(NATIVE, save_as("model.safetensors", weights, tmp_path))


def test_an_archive_whose_directory_is_damaged_is_one_error(tmp_path):
    path = save_as("model.pt", trained(NATIVE), tmp_path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at : at + 2] = b"XX"
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        loaded(NATIVE, path)


def test_a_description_beside_a_checkpoint_that_is_too_deep_is_one_error(tmp_path):
    path = save_as("model.safetensors", trained(NATIVE), tmp_path)
    (tmp_path / "open_clip_config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="says no mean and std"):
        loaded(NATIVE, path)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"layers": 10**9}, "is more than 1000"), ({"layers": [1, 10**9]}, "is more than 1000")],
)
def test_a_description_of_more_blocks_than_any_model_has_is_one_error(change, what, tmp_path):
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "head_width": 4, **change}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=what):
        find_source(f"local-dir:{tmp_path}", "random")


def test_a_mean_that_is_no_float_is_one_error(tmp_path):
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}}, "preprocess_cfg": {"mean": [10**400, 0, 0]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="mean or std of another kind"):
        find_source(f"local-dir:{tmp_path}", "random")


def test_an_archive_on_several_disks_is_one_error(tmp_path):
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 9)
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04" + bytes(60) + locator + b"PK\x05\x06" + bytes(18))
    with pytest.raises(DataError, match="cannot be read"):
        loaded(NATIVE, tmp_path / "a.pt")
