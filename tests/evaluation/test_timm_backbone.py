"""Models of timm in evaluation: timm's own features, from folders, hubs and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.hub import hub_of, use_hub
from support.images import TINY, labelled_shard
from support.project import Project
from support.timm_models import MEAN, MODELS, STD, timm_folder
from torch.testing import assert_close

from milan_pipe import api
from milan_pipe.config.evaluation import EmbedSettings, KnnSettings, LarsProbeSettings
from milan_pipe.config.params import Params
from milan_pipe.errors import MismatchError, SettingError
from milan_pipe.evaluation.backbone import pooled
from milan_pipe.evaluation.frozen import subject_of
from milan_pipe.evaluation.results import read_evaluations

PARAMS = Params(
    student=TINY,
    knn=KnnSettings(neighbours=(3,)),
    embed=EmbedSettings(pool="mean"),
    lars_probe=LarsProbeSettings(epochs=1, batch_size=8, pool="mean"),
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("images")
    return str(labelled_shard(folder / "a.tar", range(24))), str(labelled_shard(folder / "b.tar", range(100, 112)))


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "no patches"])
def test_features_are_timms(kind: str, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model", kind)
    subject = subject_of(f"timm:local-dir:{folder}", PARAMS)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = subject.tokens(pixels)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    theirs = model.forward_features((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert subject.size == 32
    assert subject.layout.width == found.shape[2] == model.num_features
    if theirs.ndim == 4:
        patches = theirs.flatten(1, 2) if kind.endswith("last") else theirs.flatten(2).transpose(1, 2)
        assert not subject.layout.has_cls
    else:
        patches = theirs[:, model.num_prefix_tokens :]
        assert subject.layout.has_cls == (kind not in ("no class token", "attention pooling"))
    assert_close(subject.layout.patches(found), patches)
    assert_close(pooled(found, "mean", subject.layout), patches.mean(dim=1))
    assert found.shape[1] == subject.layout.has_cls + subject.layout.grid[0] * subject.layout.grid[1]
    if subject.layout.has_cls:
        assert_close(pooled(found, "cls", subject.layout), theirs[:, 0])
    else:
        with pytest.raises(SettingError, match="no class token"):
            subject.layout.require("cls", "embed.pool", subject.name)


def test_names_repositories_and_folders_are_one(
    sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = timm_folder(tmp_path / "hub" / "org" / "own")
    named = tmp_path / "hub" / "timm" / "test_vit.r160_in1k"
    named.mkdir(parents=True)
    torch.manual_seed(5)
    torch.save(timm.create_model("test_vit").state_dict(), named / "pytorch_model.bin")
    here = api.knn(folder, *sets, PARAMS, keep=tmp_path / "kept")
    assert here.subject == str(folder)
    (kept,) = read_evaluations(tmp_path / "kept")
    assert kept.subject == str(folder)
    assert kept.command.startswith(f"milan-pipe knn {folder} ")
    with hub_of(tmp_path / "hub") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        there = api.knn("timm:hf-hub:org/own", *sets, PARAMS)
        known = [api.knn(f"timm:{name}", *sets, PARAMS) for name in ("test_vit", "test_vit.r160_in1k")]
    assert there.accuracy == here.accuracy
    assert there.kept is None
    assert known[0].accuracy == known[1].accuracy
    # What was fetched stays.
    assert api.knn("timm:hf-hub:org/own", *sets, PARAMS) == there


def test_an_exported_student_is_its_run(project: Project, tmp_path: Path) -> None:
    api.export(project.runs[0], tmp_path / "exported")
    for pool in ("cls", "mean"):
        params = project.params.model_copy(update={"embed": EmbedSettings(pool=pool)})
        subjects = project.runs[0], tmp_path / "exported"
        run, folder = (api.knn(of, *project.images, params, keep=tmp_path / "kept") for of in subjects)
        assert folder.accuracy == run.accuracy
        assert folder.subject == str(tmp_path / "exported")


@pytest.mark.parametrize("kind", ["registers", "map"])
def test_the_probe_by_protocol(kind: str, sets: tuple[str, str], tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model", kind)
    report = api.lars_probe(f"timm:local-dir:{folder}", *sets, tmp_path / "run", PARAMS)
    assert 0 <= report.scores["top1"] <= 1
    again = PARAMS.model_copy(update={"lars_probe": PARAMS.lars_probe.model_copy(update={"workers": 0})})
    assert api.lars_probe(f"timm:local-dir:{folder}", *sets, tmp_path / "run", again).scores == report.scores
    cls = PARAMS.model_copy(update={"lars_probe": PARAMS.lars_probe.model_copy(update={"pool": "cls"})})
    error, what = (SettingError, "lars_probe.pool=mean") if kind == "map" else (MismatchError, "another configuration")
    with pytest.raises(error, match=what):
        api.lars_probe(f"timm:local-dir:{folder}", *sets, tmp_path / "run", cls)
