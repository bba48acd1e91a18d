"""Every objective against its formula, and what MILAN promises held by all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pages import ROOT, blocks
from support.targets import header, write_store
from support.training import StopAtError, stop_at, weights_of
from torch import Tensor
from torch.testing import assert_close

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.errors import DataError, SettingError
from milan_pipe.loader.order import Block
from milan_pipe.loader.stream import Batch, read_batch
from milan_pipe.pretraining.objective import Objective, build_objective
from milan_pipe.pretraining.run import pretrain
from milan_pipe.student import objectives
from milan_pipe.student.objectives import OBJECTIVES, objective_of, register_objective
from milan_pipe.student.pixels import normalise
from milan_pipe.targets.store import open_targets
from milan_pipe.training.task import RunReport

HEAD = header(format="zarr", shards=1)
SIDE = HEAD.views.size // HEAD.teacher.grid[0]
STUDENT = StudentSettings(image_size=HEAD.views.size, patch_size=SIDE, width=16, depth=2, heads=2)
# Each with the decoder and the masks of its recipe, and dense distillation.
CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "pixels": {"decoder": "plain", "masking": "random"},
    "hog": {"decoder": "plain", "masking": "random"},
    "clip-visible": {"decoder": "none"},
    "clip-visible+pixels": {"decoder": "plain", "masking": "random"},
    "clip-masked": {"decoder": "plain", "masking": "block", "ratio": 0.4},
    "dense": {"target": "clip-visible", "decoder": "none", "ratio": 0.0},
}


def params_of(case: str, **recipe: Any) -> Params:
    chosen = {"target": case, "decoder": "prompting", "masking": "semantic", "ratio": 0.75, **CASES[case]}
    fixed = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0, "log_every": 1, "device": "cpu", "shuffle_blocks": 1}
    return Params(
        student=STUDENT,
        decoder=DecoderSettings(kind=chosen["decoder"], width=16, depth=1, heads=2),
        masking=MaskSettings(kind=chosen["masking"], ratio=chosen["ratio"]),
        target=chosen["target"],
        pretrain=PretrainSettings(**{**fixed, **recipe}),
    )


def built(case: str) -> Objective:
    objective = build_objective(HEAD, params_of(case), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.student.parameters():  # zeros at the start hide what hangs together
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return objective


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store") / "targets"
    write_store(root, HEAD, [36])
    return root


@pytest.fixture(scope="module")
def batch(store: Path) -> Batch:
    return read_batch(open_targets(store), Block(0, 0, 0, 6))


def test_every_objective_is_here() -> None:
    assert CASES.keys() - {"dense"} == OBJECTIVES.keys()


def layer_norm(token: Tensor) -> Tensor:
    return (token - token.mean()) / torch.sqrt(token.var(unbiased=False) + 1e-5)


def plain_loss(case: str, objective: Objective, batch: Batch) -> Tensor:
    """From the student's own prediction, one token at a time."""
    found = objective.predict(batch, 3)
    features_BST = objective.codecs[0].decode(batch.code_BST, batch.scale_BS).double()
    hidden_BL = found.split.masked_map()
    terms = [part.prediction_BST.double() for part in found.parts]
    losses: list[list[Tensor]] = [[] for _ in terms]
    for row in range(len(batch.keys)):
        seen = [0, *(1 + i for i in range(objective.patches) if not hidden_BL[row, i])]
        hidden = [1 + i for i in range(objective.patches) if hidden_BL[row, i]]
        every = range(1 + objective.patches)

        def cosine(tokens: Any, row: int = row) -> list[Tensor]:
            pairs = [(terms[0][row, s], features_BST[row, s]) for s in tokens]
            return [2 - 2 * (p @ t) / (p.norm() * t.norm()) for p, t in pairs]

        if case == "clip":
            losses[0] += cosine(every)
        elif case in ("clip-visible", "dense"):
            losses[0] += cosine(seen)
        elif case == "clip-masked":
            for s in hidden:
                error = (terms[0][row, s] - layer_norm(features_BST[row, s])).abs()
                losses[0].append(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
        else:
            if case == "clip-visible+pixels":
                losses[0] += [((terms[0][row, s] - layer_norm(features_BST[row, s])) ** 2).mean() for s in seen]
            target_BLT = found.parts[-1].target.double()  # has a test of its own
            losses[-1] += [((terms[-1][row, s] - target_BLT[row, s - 1]) ** 2).mean() for s in hidden]
    return sum((torch.stack(one).mean() for one in losses), torch.zeros(()))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_formula(case: str, batch: Batch) -> None:
    objective = built(case)
    gradients = []
    for loss in (objective(batch, 3), plain_loss(case, objective, batch)):
        objective.zero_grad()
        loss.backward()
        named = {name: p for name, p in objective.student.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())
        gradients.append([p.grad.clone() for p in named.values() if p.grad is not None])
        torch.testing.assert_close(float(loss.detach()), float(objective(batch, 3).detach()), rtol=1e-6, atol=0)
    for left, right in zip(*gradients, strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_the_mean_of_its_parts(case: str, batch: Batch) -> None:
    """So that neither ranks nor accumulation change what is learned."""
    objective = built(case)
    parts = [share * float(objective(part, 3).detach()) for part, share in batch.parts(3)]
    assert sum(parts) == pytest.approx(float(objective(batch, 3).detach()), rel=1e-6)
    noise_BL = objective.draw_noise(3, batch.keys)
    assert torch.equal(noise_BL[[4, 1]], objective.draw_noise(3, [batch.keys[4], batch.keys[1]]))


def go(store: Path, run: Path, case: str, **recipe: Any) -> RunReport:
    on_progress = recipe.pop("on_progress", lambda _: None)
    return pretrain(store, run, params_of(case, **recipe), on_progress=on_progress)


@pytest.mark.parametrize("case", [case for case in CASES if case != "clip"])  # which test_resume.py has
def test_an_interrupted_run_goes_on_to_the_same_end(case: str, store: Path, tmp_path: Path) -> None:
    whole = go(store, tmp_path / "whole", case)
    assert (whole.steps, np.isfinite(whole.loss)) == (4, True)
    with pytest.raises(StopAtError):
        go(store, tmp_path / "run", case, on_progress=stop_at(3), checkpoint_minutes=1e-9)
    again = go(store, tmp_path / "run", case, threads=2)
    assert (again.resumed_from, again.loss) == (2, whole.loss)
    ours, theirs = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(OBJECTIVES))
    objectives._installed.cache_clear()
    yield
    objectives._installed.cache_clear()


@pytest.mark.usefixtures("registry")
def test_one_class_and_one_registration_make_another(batch: Batch) -> None:
    (page,) = blocks(ROOT / "docs" / "extending.md", "python")
    names: dict[str, Any] = {}
    exec(page.text, names)
    params = params_of("pixels").model_copy(update={"target": "colour"})
    objective = build_objective(HEAD, params, torch.device("cpu"))
    objective(batch, 0).backward()
    assert objective.student.decoder.state_dict()["decoder_pred.bias"].shape == (3,)
    (part,) = objective.predict(batch, 0).parts
    patch_CHW = normalise(batch.pixels_BHWC)[2, :, :SIDE, SIDE : 2 * SIDE]
    assert_close(part.target[2, 1], patch_CHW.mean(dim=(1, 2)))
    with pytest.raises(SettingError, match="is there already"):
        register_objective("colour", *names["COLOUR"])


@pytest.mark.usefixtures("registry")
def test_an_installed_package_brings_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_project.py").write_text(
        "from milan_pipe.student.objectives import Gradients, Term\n"
        "from milan_pipe.student.loss import smooth_l1\n"
        'ROBUST_HOG = (Term(source=Gradients(), tokens="masked", distance=smooth_l1),)\n'
        "NO_TERMS = [1]\n"
    )
    installed = tmp_path / "other_project-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other-project\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(
        "[milan_pipe.objectives]\nrobust-hog = other_project:ROBUST_HOG\nbroken = other_project:NO_TERMS\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (term,) = objective_of("robust-hog")
    assert (type(term.source).__name__, term.distance.__name__) == ("Gradients", "smooth_l1")
    with pytest.raises(DataError, match="expected a tuple of Term"):
        objective_of("broken")
    with pytest.raises(SettingError, match=r"no objective 'hogs'; known are clip, .*, robust-hog, broken"):
        objective_of("hogs")
