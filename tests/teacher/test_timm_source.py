"""Teachers of timm by name, tag, file, folder and hub: the features and the attention of timm's own forward pass."""

from __future__ import annotations

import json
import runpy
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.hub import hub_of, use_hub
from torch.testing import assert_close

from milan_pipe import api, load_student, open_targets
from milan_pipe.config.params import load_params
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError
from milan_pipe.student.model import build_student
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.training.checkpoint import save_checkpoint

DINO2, DINO2_REG, DINO3 = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
EUPE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
NAMES = (
    DINO2,
    DINO2_REG,
    DINO3,
    EUPE,
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",
    "eva02_base_patch16_clip_224",
)


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    """Two blocks: one is as another, and twelve take seconds to fill with numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
        yield


def shaken(name: str) -> torch.nn.Module:
    """A model of timm with weights under which every token and every query counts."""
    torch.manual_seed(3)
    model = timm.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def load(model, pretrained=None, grid=(5, 5)):
    return load_teacher(TeacherSettings(model=model, pretrained=pretrained and str(pretrained)), grid=grid)


def pixels(side):
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")

    def of(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_file(shaken(name).state_dict(), path)
        return path

    return of


@torch.inference_mode()
def check_as_timm(teacher, name: str, weights: Path) -> None:
    """Compare with a model that timm itself loads, resizes and runs, its softmax taken from its last block."""
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, num_classes=0
    ).eval()
    side = teacher.info.image_size
    model.set_input_size((side, side))
    last, maps = model.blocks[-1].attn, []
    last.fused_attn = False
    last.attn_drop.register_forward_pre_hook(lambda _, given: maps.append(given[0]))
    described = model.pretrained_cfg
    mean, std = (torch.tensor(described[key]).view(3, 1, 1) for key in ("mean", "std"))
    views = pixels(side)
    tokens = model.forward_features((views.permute(0, 3, 1, 2) / 255 - mean) / std)
    prefix = model.num_prefix_tokens
    output = teacher(views)
    assert_close(output.features_BST[:, 0], tokens[:, 0], rtol=1e-4, atol=1e-4)
    assert_close(output.features_BST[:, 1:], tokens[:, prefix:], rtol=1e-4, atol=1e-4)
    assert_close(output.importance_BL, maps[0].mean(dim=1)[:, 0, prefix:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_is_timms_own_forward_pass_at_another_grid(name, checkpoints):
    teacher = load(f"timm:{name}", checkpoints(name))
    assert teacher.info.grid == (5, 5)
    check_as_timm(teacher, name, checkpoints(name))


def test_a_tag_is_fetched_with_its_licence(checkpoints, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "timm" / f"{DINO2}.lvd142m"
    repository.mkdir(parents=True)
    (repository / "model.safetensors").write_bytes(checkpoints(DINO2).read_bytes())
    expected = load(f"timm:{DINO2}", checkpoints(DINO2)).info
    assert (expected.license, expected.source) == (None, None)
    with hub_of(tmp_path / "hub") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        for model, tag in ((DINO2, None), (DINO2, "lvd142m"), (f"{DINO2}.lvd142m", None)):
            found = load(f"timm:{model}", tag).info
            assert found.weights_sha256 == expected.weights_sha256
            assert (found.license, found.source) == ("apache-2.0", f"hf-hub:timm/{DINO2}.lvd142m")
        assert set(hub.files) == {"model.safetensors"}


def test_a_repository_in_timms_layout_and_its_folder(checkpoints, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "org" / "own"
    repository.mkdir(parents=True)
    weights = repository / "model.safetensors"
    weights.write_bytes(checkpoints(DINO3).read_bytes())
    described = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 224, 224)}
    content = {"architecture": DINO3, "model_args": {"img_size": 224}, "pretrained_cfg": described}
    (repository / "config.json").write_text(json.dumps(content))
    (repository / "README.md").write_text("---\nlicense: other\nlicense_name: our-terms\n---\nOur model.\n")
    with hub_of(tmp_path / "hub") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        there = load("timm:hf-hub:org/own")
    here = load(f"timm:local-dir:{repository}")
    assert (there.info.license, there.info.source) == ("our-terms", "hf-hub:org/own")
    assert (here.info.model, here.info.license, here.info.source) == ("timm:local-dir:own", "our-terms", None)
    assert there.info.weights_sha256 == here.info.weights_sha256
    assert there.info.width == 384
    assert_close(here.mean.flatten() / 255, torch.tensor(described["mean"]))


def test_names_of_the_authors_are_known(checkpoints, tmp_path):
    """DINOv2's own files have other names for registers, and a mask token."""
    model = shaken(DINO2_REG)
    weights = model.state_dict()
    weights["register_tokens"] = weights.pop("reg_token")
    weights["mask_token"] = torch.zeros(1, 384)
    # There the class token has the first position, where timm adds it to the token.
    position = torch.randn(1, 1, 384)
    weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], dim=1)
    weights["cls_token"] = weights["cls_token"] - position
    torch.save(weights, tmp_path / "theirs.pth")
    theirs = load(f"timm:{DINO2_REG}", tmp_path / "theirs.pth")
    ours = load(f"timm:{DINO2_REG}", checkpoints(DINO2_REG))
    views = pixels(theirs.info.image_size)
    assert_close(theirs(views).features_BST, ours(views).features_BST, rtol=1e-4, atol=1e-4)


def test_a_student_that_was_exported_teaches(tmp_path):
    settings = StudentSettings(image_size=32, patch_size=8, width=64, depth=2, heads=4)
    student = build_student(settings, DecoderSettings(width=16, depth=1, heads=2), 8)
    record = {"student": settings.model_dump(mode="json"), "epochs": 3}
    save_checkpoint(tmp_path / "run", 1, {"student": student.encoder.state_dict(), "decoder": {}}, record)
    api.export(tmp_path / "run", tmp_path / "exported")
    teacher = load(f"timm:local-dir:{tmp_path / 'exported'}", grid=None)
    views = pixels(teacher.info.image_size)
    student = load_student(tmp_path / "exported")
    normalised = (views.permute(0, 3, 1, 2).float() - teacher.mean) / teacher.std
    with torch.inference_mode():
        assert_close(teacher(views).features_BST, student.forward_features(normalised))


def test_targets_of_a_timm_teacher(tmp_path):
    model = f"timm:{EUPE}"
    sets = [f"teacher.model={model}", "teacher.pretrained=random", "views.count=1", "prepare.train_scenes=3"]
    params = load_params(None, [*sets, "prepare.test_scenes=0"])
    api.prepare("demo", tmp_path / "images", params)
    api.extract_targets(tmp_path / "images", tmp_path / "targets", params)
    header = open_targets(tmp_path / "targets").header
    assert (header.teacher.model, header.teacher.width, header.teacher.grid) == (model, 192, (8, 8))
    assert not api.verify_targets(tmp_path / "targets", params, against_teacher=1).problems


@pytest.mark.parametrize(
    ("model", "pretrained", "error", "what"),
    [
        ("timm:vit_smal", "random", SettingError, "nearest are vit_small"),
        ("timm:", "random", SettingError, "timm has no model ''"),
        (f"timm:{DINO2}.x", None, MissingError, "known tags are lvd142m"),
        (f"timm:{DINO2}", "nowhere.pt", MissingError, "no such file"),
        (f"timm:{EUPE}", "lvd1689m", MissingError, "no tag 'lvd1689m'"),
        ("timm:beit_base_patch16_224", "random", SettingError, "timm's Beit"),
        ("timm:vit_base_patch16_siglip_gap_224", "random", SettingError, "pools by avg"),
        ("timm:local-dir:nowhere", None, MissingError, "has no config.json"),
        ("timm:vit_wee_patch16_reg1_gap_256", "random", SettingError, "pools by avg"),
    ],
)
def test_refused(model, pretrained, error, what, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=what):
        load(model, pretrained)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir"])
def test_a_description_names_no_other_files(argument, tmp_path):
    content = {"architecture": DINO3, "model_args": {argument: "/etc/x"}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=argument):
        load(f"timm:local-dir:{tmp_path}")


def test_a_checkpoint_of_another_model_is_refused(checkpoints):
    with pytest.raises(MismatchError, match="does not fit teacher 'timm:vit_small_patch16_dinov3'"):
        load(f"timm:{DINO3}", checkpoints(DINO2))


def test_the_page_lists_teachers_as_they_are():
    """Names and licences all of them; sizes of some, as their models are built."""
    docs = Path(__file__).parents[2] / "docs"
    made = runpy.run_path(str(docs / "generate_teachers.py"))
    lines = (docs / "teachers.md").read_text(encoding="utf-8").splitlines()
    if (versions := f"Of open_clip {open_clip.__version__} and timm {timm.__version__}:") not in lines:
        pytest.skip(f"the page is not {versions[:-1].lower()}; run python docs/generate_teachers.py")
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    rows = [row for row in rows if row[0] in ("timm", "open_clip")]
    assert len(rows) > 80
    todo = "run python docs/generate_teachers.py"
    known, clip = {*timm.list_models(), *open_clip.list_models()}, []
    for library, names, *_, licence in rows:
        for name in (name.strip("`").removeprefix("timm:") for name in names.split(", ")):
            assert name in known, todo
            assert made[{"timm": "timm_licences", "open_clip": "clip_licences"}[library]](name) == licence, (name, todo)
            clip += [name] * (library == "open_clip")
    table = made["table"](made["WEIGHTS"], made["weight_rows"](clip))
    assert lines[lines.index(table[0]) :][: len(table)] == table, todo
    for _, names, patch, side, grid, width, _ in rows[::16]:
        sizes = made["sizes_of"](names.split(", ")[0].strip("`"))
        found = (sizes.patch_size[0], sizes.image_size[0], f"{sizes.grid[0]} x {sizes.grid[1]}", sizes.width)
        assert tuple(map(str, found)) == (patch, side, grid, width), names
