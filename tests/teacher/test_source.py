"""Teachers from a model hub (a real server on loopback) and from a folder, as open_clip takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file
from support.hub import Hub, hub_of, use_hub
from support.s3 import free_port
from torch.testing import assert_close

from milan_pipe import api
from milan_pipe.config.params import load_params, stated_of
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import MismatchError, MissingError
from milan_pipe.pretrained.hub import license_of_card
from milan_pipe.teacher.clip import load_teacher

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
NATIVE = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
TIMM = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
CONFIGS = {
    "gelu": {"embed_dim": 24, "vision_cfg": NATIVE, "text_cfg": TEXT},
    "quick": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": NATIVE, "text_cfg": TEXT},
    "timm": {"embed_dim": 24, "custom_text": True, "vision_cfg": TIMM, "text_cfg": TEXT},
}
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_model(folder: Path, kind: str, mean=MEAN, std=STD) -> Path:
    """A repository's files, its description as open_clip writes it."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    described = folder / "described"
    described.mkdir()
    (described / f"tiny-{kind}.json").write_text(json.dumps(CONFIGS[kind]))
    open_clip.add_model_config(described)
    model = open_clip.create_model(f"tiny-{kind}")
    (described / f"tiny-{kind}.json").unlink()
    described.rmdir()
    weights = {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    model.visual.image_mean, model.visual.image_std = mean, std
    save_config_for_hf(model, folder / CONFIG, CONFIGS[kind])
    return folder


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    """timm's towers have two blocks: one is as another, and twelve take seconds to fill with numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in CONFIGS:
        write_model(root / "org" / kind, kind)
    return root / "org"


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    with hub_of(models.parent) as running:
        use_hub(running.endpoint, tmp_path / "cache", monkeypatch)
        yield running


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def load(model, **settings):
    return load_teacher(TeacherSettings(model=model, **settings))


def pixels(side):
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def check_as_open_clip(teacher, model):
    reference = open_clip.create_model_from_pretrained(model, return_transform=False).eval()
    preprocess = reference.visual.preprocess_cfg
    mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    views = pixels(teacher.info.image_size)
    expected = reference.encode_image((views.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert_close(teacher(views).features_BST[:, 0], expected, rtol=1e-5, atol=1e-5)


# --- the same features as open_clip's -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_hub(kind, hub: Hub):
    teacher = load(f"hf-hub:org/{kind}")
    # The description, the weights and the card's licence, and nothing for a text tower.
    assert set(hub.files) <= {CONFIG, WEIGHTS, "README.md"}
    assert (teacher.info.model, teacher.info.pretrained) == (f"hf-hub:org/{kind}", None)
    check_as_open_clip(teacher, f"hf-hub:org/{kind}")


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder(kind, models):
    teacher = load(f"local-dir:{models / kind}")
    assert (teacher.info.model, teacher.info.pretrained) == (f"local-dir:{kind}", None)
    check_as_open_clip(teacher, f"local-dir:{models / kind}")


def test_location_of_a_folder_is_not_part_of_the_identity(models, tmp_path, monkeypatch):
    expected = load(f"local-dir:{models / 'gelu'}").info
    copied(models / "gelu", tmp_path / "gelu")
    monkeypatch.chdir(tmp_path)
    for name in ("./gelu", "gelu/", "gelu/../gelu"):
        assert load(f"local-dir:{name}").info == expected


def test_activation_follows_the_description(models):
    assert isinstance(load(f"local-dir:{models / 'quick'}").visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert not isinstance(load(f"local-dir:{models / 'gelu'}").visual.transformer.resblocks[0].mlp.gelu, QuickGELU)


def test_normalisation_is_the_descriptions(models, tmp_path):
    assert_close(load(f"local-dir:{models / 'gelu'}").mean.flatten(), 255 * torch.tensor(MEAN))
    folder = copied(models / "gelu", tmp_path / "m")
    description = json.loads((folder / CONFIG).read_text())
    for preprocess, mean in [
        ({}, open_clip.OPENAI_DATASET_MEAN),
        ({"mean": None, "std": None}, open_clip.OPENAI_DATASET_MEAN),
        ({"mean": 0.5, "std": 0.5}, (0.5, 0.5, 0.5)),
        (None, open_clip.OPENAI_DATASET_MEAN),
    ]:
        said = {"preprocess_cfg": preprocess} if preprocess is not None else {}
        (folder / CONFIG).write_text(json.dumps({"model_cfg": description["model_cfg"], **said}))
        teacher = load(f"local-dir:{folder}")
        assert_close(teacher.mean.flatten(), 255 * torch.tensor(mean))
    imagenet = load(f"local-dir:{folder}", normalization="imagenet")
    assert_close(imagenet.mean.flatten(), 255 * torch.tensor([0.485, 0.456, 0.406]))


def test_other_weights(models, hub: Hub, tmp_path):
    weights = load_file(models / "gelu" / WEIGHTS)
    weights["visual.proj"] += 1
    save_file(weights, tmp_path / "mine.safetensors")
    own = load("hf-hub:org/gelu")
    for model in ("hf-hub:org/gelu", f"local-dir:{models / 'gelu'}"):
        hub.forget()
        mine = load(model, pretrained=str(tmp_path / "mine.safetensors"))
        assert mine.info.pretrained == "mine.safetensors"
        assert mine.info.weights_sha256 != own.info.weights_sha256
        assert_close(mine.mean, own.mean)
        untrained = load(model, pretrained="random")
        assert untrained.info.pretrained == "random"
        assert untrained.info.weights_sha256 not in (own.info.weights_sha256, mine.info.weights_sha256)
        assert WEIGHTS not in hub.files
        with pytest.raises(MissingError, match="no tags"):
            load(model, pretrained="openai")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "anything.pth"])
def test_weights_as_open_clip_finds_them(name, models, tmp_path):
    folder = copied(models / "gelu", tmp_path / "m")
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    assert load(f"local-dir:{folder}").info.weights_sha256 == load(f"local-dir:{models / 'gelu'}").info.weights_sha256


def test_repository_without_safetensors(models, tmp_path, monkeypatch):
    folder = copied(models / "gelu", tmp_path / "hub" / "org" / "old")
    torch.save(load_file(folder / WEIGHTS), folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    cache = tmp_path / "cache"
    with hub_of(tmp_path / "hub") as running:
        use_hub(running.endpoint, cache, monkeypatch)
        teacher = load("hf-hub:org/old")
    # The hub is gone now, what it gave stays.
    assert load("hf-hub:org/old").info == teacher.info
    assert teacher.info.weights_sha256 == load(f"local-dir:{models / 'gelu'}").info.weights_sha256


def test_tag_hub_and_folder_are_one_teacher(models, hub: Hub, monkeypatch):
    write = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-gelu", CONFIGS["gelu"])
    monkeypatch.setitem(write, "tiny-gelu", {"here": {"hf_hub": "org/gelu/", "mean": MEAN, "std": STD, "url": ""}})
    tag = load("tiny-gelu", pretrained="here")
    assert hub.files == [WEIGHTS]
    views = pixels(tag.info.image_size)
    for model in ("hf-hub:org/gelu", f"local-dir:{models / 'gelu'}"):
        teacher = load(model)
        assert teacher.info.weights_sha256 == tag.info.weights_sha256
        assert torch.equal(teacher.mean, tag.mean)
        with torch.inference_mode():
            ours, its = teacher(views), tag(views)
        assert torch.equal(ours.features_BST, its.features_BST)
        assert torch.equal(ours.importance_BL, its.importance_BL)


# --- what cannot be had -------------------------------------------------------------------------------------------


def test_repository_without_weights_gives_its_description(models, tmp_path, monkeypatch):
    copied(models / "gelu", tmp_path / "hub" / "org" / "bare").joinpath(WEIGHTS).unlink()
    with hub_of(tmp_path / "hub") as running:
        use_hub(running.endpoint, tmp_path / "cache", monkeypatch)
        with pytest.raises(MissingError, match=WEIGHTS):
            load("hf-hub:org/bare")
        assert load("hf-hub:org/bare", pretrained="random").info.pretrained == "random"


def test_hub_out_of_reach_is_tried_once(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    use_hub(f"http://127.0.0.1:{free_port()}", tmp_path / "cache", monkeypatch)
    with pytest.raises(MissingError, match="refused"):
        load("hf-hub:org/gelu")
    with torch.device("meta"), pytest.raises(MissingError, match="refused"):
        load("ViT-B-32", pretrained="laion2b_s34b_b79k")
    # huggingface_hub itself would wait between six attempts.
    assert waited == []


# --- stores -------------------------------------------------------------------------------------------------------

SETS = ["views.count=1", "extract.device=cpu", "extract.threads=1", "student.image_size=64", "student.patch_size=16"]


def test_store_goes_on_with_the_folder_elsewhere(models, tmp_path):
    """From another folder of the same name; the settings of a later run may name either."""
    here, elsewhere = models / "gelu", copied(models / "gelu", tmp_path / "elsewhere" / "gelu")
    params = load_params(None, [*SETS, f"teacher.model=local-dir:{here}", "prepare.train_scenes=4",
                                "prepare.test_scenes=0", "prepare.samples_per_shard=2"])  # fmt: skip
    api.prepare("demo", tmp_path / "images", params)
    images, targets = str(tmp_path / "images" / "train-*.tar"), tmp_path / "t"
    api.extract_targets(images, targets, params, shards="0/2")
    moved = load_params(None, [*SETS, f"teacher.model=local-dir:{elsewhere}"])
    report = api.extract_targets(images, targets, moved)
    assert (report.shards, report.skipped) == (2, 1)
    assert str(tmp_path) not in (targets / "shards" / "zarr.json").read_text()
    # Pretraining holds the settings against the store; this is as far as it must come.
    assert stated_of(moved)["teacher"]["model"] == "local-dir:gelu"
    weights = load_file(elsewhere / WEIGHTS)
    weights["visual.proj"] += 1
    save_file(weights, elsewhere / WEIGHTS)
    with pytest.raises(MismatchError, match="weights_sha256"):
        api.extract_targets(images, targets, moved)


def test_another_description_of_the_same_weights_is_another_teacher(models, tmp_path):
    folder = copied(models / "gelu", tmp_path / "gelu")
    own, found = load(f"local-dir:{folder}").info, (folder / CONFIG).read_text()
    described = json.loads(found)
    seen = {own.structure_sha256}
    for part, change in (
        ("model_cfg", {"quick_gelu": True}),
        ("model_cfg", {"vision_cfg": {**NATIVE, "head_width": 32}}),
        ("preprocess_cfg", {"mean": [0.5, 0.4, 0.3]}),
        ("preprocess_cfg", {"std": [0.2, 0.2, 0.2]}),
    ):
        (folder / CONFIG).write_text(json.dumps({**described, part: {**described[part], **change}}))
        changed = load(f"local-dir:{folder}").info
        assert changed.weights_sha256 == own.weights_sha256
        seen.add(changed.structure_sha256)
    assert len(seen) == 5
    (folder / CONFIG).write_text(json.dumps(dict(reversed(described.items()))))
    assert load(f"local-dir:{folder}").info == own


def test_a_store_is_gone_on_with_by_the_same_description_alone(models, tmp_path):
    folder = copied(models / "gelu", tmp_path / "gelu")
    params = load_params(None, [*SETS, f"teacher.model=local-dir:{folder}", "prepare.train_scenes=4",
                                "prepare.test_scenes=0", "prepare.samples_per_shard=2"])  # fmt: skip
    api.prepare("demo", tmp_path / "images", params)
    images, targets = str(tmp_path / "images" / "train-*.tar"), tmp_path / "t"
    api.extract_targets(images, targets, params, shards="0/2")
    described = json.loads((folder / CONFIG).read_text())
    described["model_cfg"]["quick_gelu"] = True
    (folder / CONFIG).write_text(json.dumps(described))
    with pytest.raises(MismatchError, match=r"teacher\.structure_sha256: store has"):
        api.extract_targets(images, targets, params)


@pytest.mark.ci
def test_command_line_extracts_from_a_hub(hub: Hub, tmp_path):
    params = load_params(None, ["prepare.train_scenes=2", "prepare.test_scenes=0"])
    api.prepare("demo", tmp_path / "images", params)
    sets = [part for text in [*SETS, "teacher.model=hf-hub:org/quick"] for part in ("--set", text)]
    command = [sys.executable, "-m", "milan_pipe", "extract-targets", str(tmp_path / "images" / "train-000000.tar")]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([*command, str(tmp_path / "t"), *sets], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.files == [CONFIG, WEIGHTS]
    header = json.loads((tmp_path / "t" / "shards" / "zarr.json").read_text())
    assert '"hf-hub:org/quick"' in json.dumps(header)


@pytest.mark.parametrize(
    "stated",
    [
        *("mit\nat: !!timestamp x", f"mit\nat: {'1:' * 200}1.5", "[" * 600, "mit\nat: 2001-99-99"),
        *(f"mit\nat: [{'1,' * 200_000}]", f"mit\n---\n{'x' * 2**20}", "mit\nlicense: gpl-3.0"),
    ],
    ids=["date", "sixties", "depth", "day", "values", "size", "twice"],
)
def test_a_card_that_is_no_yaml_states_no_licence(tmp_path: Path, stated: str) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: {stated}\n---\n")
    assert license_of_card(card) is None
    card.write_text("---\nlicense: mit\n1: 2\n---\nA student.\n")
    assert license_of_card(card) == "mit"
