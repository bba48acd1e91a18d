"""Students with registers, without class token and with rotary positions: exported, loaded, judged and gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from milan_pipe.api import export
from milan_pipe.config.evaluation import FinetuneSettings, SegmentSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.backbone import Backbone, backbone_of, pooled, resized
from milan_pipe.evaluation.classifier import LinearClassifier, build_classifier, classifier_of
from milan_pipe.evaluation.upernet import build_upernet
from milan_pipe.interop.timm_layout import load_student
from milan_pipe.pretraining.start import start_from
from milan_pipe.student.encoder import build_encoder, encode_all
from milan_pipe.student.model import build_student
from milan_pipe.training.checkpoint import open_checkpoint, save_checkpoint
from milan_pipe.training.optim import build_adamw

KINDS = [
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_240",
    "vit_little_patch16_reg1_gap_256",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
]


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "run"
    settings = StudentSettings(model=request.param, image_size=16, patch_size=4, width=16, depth=2, heads=2)
    torch.manual_seed(0)
    student = build_student(settings, DecoderSettings(width=8, depth=1, heads=2), 4)
    with torch.no_grad():
        for name, parameter in student.encoder.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.2 * torch.randn_like(parameter))
    modules = {"student": student.encoder.state_dict(), "decoder": student.decoder.state_dict()}
    save_checkpoint(folder, 1, modules, {"student": settings.model_dump(mode="json"), "epochs": 1})
    return folder


@pytest.fixture(scope="module")
def backbone(run: Path) -> Backbone:
    return backbone_of(run, StudentSettings(), 0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_an_export_is_the_student_and_begins_another_run(run: Path, images: Tensor, tmp_path: Path) -> None:
    student = load_student(run)
    report = export(run, tmp_path / "vit")
    expected = student.forward_features(images)
    for model in (
        load_student(tmp_path / "vit"),
        timm.create_model(report.model, num_classes=0, checkpoint_path=report.weights, **report.model_args).eval(),
    ):
        assert_close(model.forward_features(images), expected, rtol=0, atol=1e-6)
    settings = backbone_of(run, StudentSettings(), 0).settings
    for size in (16, 24):
        encoder = build_encoder(settings.model_copy(update={"image_size": size}))
        start = start_from(str(tmp_path / "vit" / "model.safetensors"), settings.model, encoder)
        assert not start.trains_positions
    same = build_encoder(settings)
    start_from(str(run), settings.model, same)
    assert_close(same.eval().forward_features(images), expected, rtol=0, atol=0)


@torch.no_grad()
def test_weights_of_timm_begin_a_run_with_their_positions_and_last_norm(run: Path, tmp_path: Path) -> None:
    settings = backbone_of(run, StudentSettings(), 0).settings
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    theirs = timm.create_model(settings.model, num_classes=3, img_size=24, **sizes)
    for norm in (theirs.norm, theirs.fc_norm):
        if hasattr(norm, "weight"):
            norm.weight.fill_(3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    encoder = build_encoder(settings)
    start = start_from(str(tmp_path / "theirs.pth"), settings.model, encoder)
    assert start.trains_positions == (theirs.pos_embed is not None)
    assert encoder.norm.weight.tolist() == [3] * 16
    assert_close(encoder.blocks[0].mlp.fc2.weight, theirs.blocks[0].mlp.fc2.weight, rtol=0, atol=0)


@torch.no_grad()
def test_frozen_features_are_the_students_tokens(backbone: Backbone, images: Tensor) -> None:
    layout, encoder = backbone.layout, backbone.encoder().eval()
    tokens = layout.tokens(encoder.forward_features(images))
    expected = encode_all(encoder, images)
    assert_close(layout.patches(tokens), expected[:, 1:], rtol=0, atol=0)
    assert (layout.width, layout.grid) == (16, (4, 4))
    if layout.has_cls:
        assert_close(pooled(tokens, "cls", layout), expected[:, 0], rtol=0, atol=0)
    else:
        assert_close(pooled(tokens, "mean", layout), expected[:, 0])
        with pytest.raises(SettingError, match=r"no class token, which knn\.pool=cls takes; set knn\.pool=mean"):
            layout.require("cls", "knn.pool", backbone.name)
    assert LinearClassifier(backbone, "mean", 3, 0)(images).shape == (2, 3)


def test_a_classifier_begins_with_it_at_another_size_and_comes_back(
    backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    _, model = build_classifier(backbone, FinetuneSettings(), 3, 0)
    encoder = backbone.encoder().eval()
    with torch.no_grad():
        encoder.norm = torch.nn.Identity()  # type: ignore[assignment]
        mean = layer_norm(encode_all(encoder, images)[:, 1:].mean(1), (16,), eps=model.fc_norm.eps)
        assert_close(model.eval()(images), model.head(mean))
    large, model = build_classifier(backbone, FinetuneSettings(image_size=24), 3, 0)
    build_adamw(model, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.75)
    model(torch.randn(2, 3, 24, 24)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert resized(backbone, 24)[0] == large
    record = {"student": large.model_dump(mode="json"), "task": "finetune", "classes": 3, "crop": 0.9, "epochs": 1}
    record["scores"] = {"top1": 50.0}
    save_checkpoint(tmp_path / "run", 1, {"model": model.state_dict()}, record)
    found = classifier_of(open_checkpoint(tmp_path / "run"))[1].eval()
    export(tmp_path / "run", tmp_path / "out")
    with torch.no_grad():
        logits = model.eval()(torch.ones(1, 3, 24, 24))
        assert_close(found(torch.ones(1, 3, 24, 24)), logits, rtol=0, atol=0)
        assert_close(load_student(tmp_path / "out")(torch.ones(1, 3, 24, 24)), logits, rtol=0, atol=1e-6)


def test_its_blocks_are_segmented(backbone: Backbone) -> None:
    _, model = build_upernet(backbone, SegmentSettings(crop=24, channels=8), 3, 0)
    logits, auxiliary = model.train()(torch.randn(2, 3, 24, 24))
    assert logits.shape == auxiliary.shape == (2, 3, 24, 24)
    (logits.sum() + auxiliary.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
