"""Exported students: timm loads them by folder, by name and strictly, and computes the same features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.checkpoints import change_record
from timm.data import resolve_model_data_config

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import MilanError
from milan_pipe.interop.timm_layout import export_student
from milan_pipe.student.encoder import encode_all
from milan_pipe.student.model import MaskedStudent, build_student
from milan_pipe.training.checkpoint import save_checkpoint
from milan_pipe.weights_file import weights_digest

TEACHER = {"model": "demo", "weights_sha256": "ab" * 32}
SMALL = StudentSettings(image_size=32, patch_size=8, width=64, depth=2, heads=4)
NATIVE = StudentSettings(
    model="vit_tiny_patch16_224", image_size=224, patch_size=None, width=None, depth=None, heads=None
)


def saved(run: Path, settings: StudentSettings, *, step: int = 7) -> MaskedStudent:
    torch.manual_seed(0)
    model = build_student(settings, DecoderSettings(width=16, depth=1, heads=2), 8)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones at the start would hide what is mixed up
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_checkpoint(
        run,
        step,
        {"student": model.encoder.state_dict(), "decoder": model.decoder.state_dict()},
        {"student": settings.model_dump(mode="json"), "teacher": TEACHER, "epochs": 3},
    )
    return model.eval()


@pytest.mark.parametrize("settings", [SMALL, NATIVE], ids=["own sizes", "native sizes"])
def test_timm_computes_the_same_features(tmp_path: Path, settings: StudentSettings) -> None:
    student = saved(tmp_path / "run", settings)
    report = export_student(tmp_path / "run", tmp_path / "out")
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    by_name = timm.create_model(report.model, **report.model_args, num_classes=0, checkpoint_path=report.weights).eval()
    images = torch.randn(2, 3, settings.image_size, settings.image_size)
    with torch.no_grad():
        expected = encode_all(student.encoder, images)
        for model in (by_folder, by_name):
            assert (model.forward_features(images) - expected).abs().max() < 1e-6
    by_name.load_state_dict(load_file(report.weights), strict=True)


def test_a_classifier_can_be_put_on_top(tmp_path: Path) -> None:
    saved(tmp_path / "run", SMALL)
    export_student(tmp_path / "run", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_the_config_says_how_images_are_fed_and_where_the_weights_come_from(tmp_path: Path) -> None:
    saved(tmp_path / "run", SMALL)
    report = export_student(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == SMALL.model
    assert config["num_classes"] == 0
    assert not {"tag", "license", "hf_hub_id", "url"} & config["pretrained_cfg"].keys()
    assert config["milan_pipe"] == {
        "step": 7, "epochs": 3, "package_version": None, "teacher": TEACHER,
        "weights_sha256": weights_digest(load_file(report.weights)),
    }  # fmt: skip
    data = resolve_model_data_config(timm.create_model(f"local-dir:{report.folder}", pretrained=True))
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert data["interpolation"] == "bicubic"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_the_last_checkpoint_of_a_run_is_exported(tmp_path: Path) -> None:
    saved(tmp_path / "run", SMALL, step=3)
    saved(tmp_path / "run", SMALL, step=12)
    assert export_student(tmp_path / "run", tmp_path / "a").step == 12
    assert export_student(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "b").step == 3


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "run", SMALL)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "flat").write_text("")
    change_record(tmp_path / "run" / "checkpoints" / "step-00000007", lambda record: record["student"].update(depth=3))
    for run, folder in (("nowhere", "out"), ("run", "taken"), ("run", "flat/out"), ("run", "out"), ("run", "a.pth")):
        with pytest.raises(MilanError):
            export_student(tmp_path / run, tmp_path / folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat", "run", "taken"]
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_a_folder_may_have_dots_in_its_name(tmp_path: Path) -> None:
    saved(tmp_path / "run", SMALL)
    assert export_student(tmp_path / "run", tmp_path / "vit.v1.2").step == 7


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    saved(tmp_path / "run", SMALL)
    (tmp_path / "out").mkdir()
    export_student(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
