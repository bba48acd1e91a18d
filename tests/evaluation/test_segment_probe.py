"""Patch features judged by masks: both heads against plain arithmetic, and the whole on images of any shape."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.images import TINY, labelled_shard, mask, mask_folders, png
from support.project import Project
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe import api
from milan_pipe.config.evaluation import EmbedSettings, SegmentProbeSettings, SegmentSettings
from milan_pipe.config.params import Params, load_params
from milan_pipe.errors import DataError, LabelError
from milan_pipe.evaluation import patch_heads
from milan_pipe.evaluation.patch_heads import LinearHead, NeighbourHead, PatchFeatures, class_counts, fit_linear_head
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.evaluation.segment_probe import SegmentProbeReport

CPU = torch.device("cpu")
GRID, SIDE, CLASSES, WIDTH = (2, 3), 6, 4, 5
SETTINGS = SegmentProbeSettings(neighbours=7, temperature=0.1, bank=20, steps=60)


def drawn(windows: int = 6, seed: int = 0) -> PatchFeatures:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(-1, CLASSES, (windows, SIDE, SIDE), generator=generator).to(torch.int16)
    masks[0, :3, :2] = -1  # no pixel of the first patch has a class
    features = torch.randn(windows, math.prod(GRID), WIDTH, generator=generator).half()
    return PatchFeatures(features=list(features), masks=list(masks), grid=GRID)


def counts_by_hand(mask_HW: Tensor, patch: int) -> list[int]:
    row, column = divmod(patch, GRID[1])
    part = mask_HW[3 * row : 3 * row + 3, 2 * column : 2 * column + 2].flatten().tolist()
    return [part.count(label) for label in range(CLASSES)]


def test_classes_of_patches_are_counted() -> None:
    for mask_HW in drawn().masks:
        expected = [counts_by_hand(mask_HW, patch) for patch in range(6)]
        assert class_counts(mask_HW, GRID, CLASSES).tolist() == expected


def test_patches_need_not_divide_the_window() -> None:
    counts = class_counts(torch.zeros(7, 5), (2, 3), 1)
    assert counts.sum() == 35
    assert counts.flatten().tolist() == [8, 8, 4, 6, 6, 3]


@pytest.mark.parametrize("chunk", [1, 200, 2**24])
def test_neighbours_agree_with_the_plain_loop(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_heads, "_CHUNK_VALUES", chunk)
    train, asked = drawn(), torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    found = NeighbourHead(train, CLASSES, SETTINGS.model_copy(update={"bank": 100}), CPU)(asked)
    bank = [
        (train.features[window][patch].double(), torch.tensor(counts, dtype=torch.float64))
        for window in range(6)
        for patch in range(6)
        if sum(counts := counts_by_hand(train.masks[window], patch))
    ]
    assert len(bank) < 36
    for number, patch in np.ndindex(3, 6):
        x = asked[number, patch].double()
        pairs = [(float(x @ y) / float(x.norm() * y.norm()), share / share.sum()) for y, share in bank]
        nearest = sorted(pairs, key=lambda pair: -pair[0])[:7]
        weights = [math.exp(cosine / 0.1) for cosine, _ in nearest]
        expected = sum(weight * share for weight, (_, share) in zip(weights, nearest, strict=True)) / sum(weights)
        row, column = divmod(patch, GRID[1])
        torch.testing.assert_close(found[number, :, row, column].double(), expected, rtol=0, atol=1e-5)


def test_the_bank_is_drawn_by_the_seed() -> None:
    def bank(**change: int) -> Tensor:
        return NeighbourHead(drawn(), CLASSES, SETTINGS.model_copy(update=change), CPU)._bank_KD

    assert bank().shape == (20, WIDTH)
    assert torch.equal(bank(), bank())
    assert not torch.equal(bank(), bank(seed=1))


def test_the_linear_head_is_a_convolution() -> None:
    head = LinearHead(WIDTH, CLASSES, GRID, seed=3)
    plain = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, CLASSES, 1))
    for part in (head.norm, plain[0]):
        nn.init.constant_(part.weight, 1.5)
        nn.init.constant_(part.bias, 0.2)
    weights = {"0.running_mean": head.norm.running_mean, "0.running_var": head.norm.running_var}
    weights |= {"1.weight": head.linear.weight[:, :, None, None], "1.bias": head.linear.bias}
    plain.load_state_dict(weights, strict=False)
    patches = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    maps = patches.mT.unflatten(2, GRID)
    for module in (head, plain):
        module.train()
    torch.testing.assert_close(head(patches), plain(maps))
    torch.testing.assert_close(head.eval()(patches), plain.eval()(maps))


def test_training_reduces_the_loss_of_the_labelled_pixels() -> None:
    train = drawn()
    heads = [fit_linear_head(train, CLASSES, SETTINGS, CPU, lambda *_: None) for _ in range(2)]
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)

    @torch.no_grad()
    def loss(head: LinearHead) -> float:
        logits = F.interpolate(head(torch.stack(list(train.features)).float()), size=(SIDE, SIDE), mode="bilinear")
        return float(F.cross_entropy(logits, torch.stack(list(train.masks)).long(), ignore_index=-1))

    assert loss(heads[0]) < 0.97 * loss(LinearHead(WIDTH, CLASSES, GRID, 0).eval())


# --- the whole ----------------------------------------------------------------------------------------------------

PROBE = SegmentProbeSettings(steps=60, batch_size=8, lr=0.05, neighbours=5, bank=400)
PARAMS = Params(student=TINY, segment=SegmentSettings(classes=2), embed=EmbedSettings(threads=1), segment_probe=PROBE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("images")
    sets = (("train.tar", range(24)), ("val.tar", range(100, 108)))
    train, val = (str(labelled_shard(folder / name, numbers, masks=True)) for name, numbers in sets)
    return train, val


def probe(images: tuple[str, str], **change: Any) -> SegmentProbeReport:
    settings = PARAMS.segment_probe.model_copy(update=change)
    return api.segment_probe("random", *images, PARAMS.model_copy(update={"segment_probe": settings}))


@pytest.fixture(scope="module")
def found(images: tuple[str, str]) -> SegmentProbeReport:
    return probe(images)


def test_both_heads_learn_what_is_bright(found: SegmentProbeReport) -> None:
    assert (found.subject, found.train, found.test, found.bad, found.kept) == ("random", 24, 8, 0, None)
    assert list(found.heads) == ["linear", "knn"]
    for scores in found.heads.values():
        assert scores.aacc > 0.8
        assert scores.miou == pytest.approx(np.mean([row["iou"] for row in scores.classes]))
        assert [row["name"] for row in scores.classes] == ["class 0", "class 1"]
        assert sum(row["pixels"] for row in scores.classes) == sum(
            int((mask(number) != 255).sum()) for number in range(100, 108)
        )


def test_batches_and_threads_change_nothing(found: SegmentProbeReport, images: tuple[str, str]) -> None:
    params = PARAMS.model_copy(update={"embed": EmbedSettings(batch_size=3, threads=2)})
    again = api.segment_probe("random", *images, params)
    for name, scores in again.heads.items():
        # Rounding of another batch may turn a pixel on the border of two classes.
        assert scores.aacc == pytest.approx(found.heads[name].aacc, abs=2e-3)
    assert probe(images) == found


def test_one_head_alone(found: SegmentProbeReport, images: tuple[str, str]) -> None:
    alone = probe(images, heads=("knn", "knn"))
    assert alone.heads == {"knn": found.heads["knn"]}


def test_images_are_drawn_and_larger_ones_are_cut_into_windows(images: tuple[str, str]) -> None:
    steps: list[tuple[int, int, str]] = []
    settings = PARAMS.segment_probe.model_copy(update={"images": 6, "short_side": 24})
    params = PARAMS.model_copy(update={"segment_probe": settings})
    found = api.segment_probe("random", *images, params, on_progress=lambda *now: steps.append(now))
    assert found.train == 6
    assert found.heads["linear"].aacc > 0.75
    assert {what: (done, total) for done, total, what in steps} == {
        "images of TRAIN": (6, 6), "steps of the head": (60, 60), "images of VAL": (8, 8),
    }  # fmt: skip


def test_folders_with_zero_as_no_class(tmp_path: Path) -> None:
    mask_folders(tmp_path / "images", tmp_path / "masks", range(12), shift=1)
    (tmp_path / "classes.txt").write_text("left\nright\n")
    params = PARAMS.model_copy(update={"segment": SegmentSettings(reduce_zero_label=True)})
    found = api.segment_probe("random", tmp_path, tmp_path, params)
    assert [row["name"] for row in found.heads["knn"].classes] == ["left", "right"]
    assert found.heads["knn"].aacc > 0.9
    (tmp_path / "images" / "0003.jpg").write_bytes(b"broken")
    assert (again := api.segment_probe("random", tmp_path, tmp_path, params)).train == again.test == 11
    assert again.bad == 2
    params = PARAMS.model_copy(update={"segment": SegmentSettings(reduce_zero_label=False)})
    with pytest.raises(LabelError, match="has value 2"):
        api.segment_probe("random", tmp_path, tmp_path, params)


def without(folder: Path, label: int) -> Path:
    """Six images whose masks say of all pixels of a class, or of -1 all pixels, that they have none."""
    mask_folders(folder / "images", folder / "masks", range(6))
    for path in (folder / "masks").iterdir():
        values = mask(int(path.stem))
        values[(values == label) | (label < 0)] = 255
        path.write_bytes(png(values))
    return folder


def test_classes_that_train_lacks_are_named(images: tuple[str, str], tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"no pixel of the 6 images of TRAIN has \(1\): class 1; their IoU is 0"):
        found = api.segment_probe("random", without(tmp_path, 1), images[1], PARAMS)
    assert [row["iou"] for row in found.heads["knn"].classes][1] == 0


def test_no_pixel_has_a_class(images: tuple[str, str], tmp_path: Path) -> None:
    none = without(tmp_path, -1)
    for sets in ((none, images[1]), (images[0], none)):
        with pytest.raises(DataError, match=f"not one pixel of {tmp_path} has a class"):
            api.segment_probe("random", *sets, PARAMS)


def test_results_are_kept_with_the_command_that_made_them(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for subject in (project.runs[0], "teacher"):
        folder = tmp_path / Path(subject).name
        found = api.segment_probe(subject, *project.images, project.params, keep=folder)
        (kept,) = read_evaluations(folder)
        assert (found.kept, kept.task) == (str(next(folder.iterdir())), "segment-probe")
        assert kept.scores["linear_miou"] == found.heads["linear"].miou
        words = shlex.split(kept.command)
        api.segment_probe(*words[2:5], load_params(None, words[6::2]), keep=tmp_path / "again")
        assert kept in read_evaluations(tmp_path / "again")
