"""Fine-tuning: rates by layer, gradients everywhere, one run however it is broken up, and one line for mistakes."""

from __future__ import annotations

import functools
import io
import json
import operator
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import processes
from support.images import NAMES, TINY, class_folders, image, labelled_shard, png, write_tar
from support.training import StopAtError, killed_until_done, stop_at

from milan_pipe.api import finetune, lars_probe
from milan_pipe.config.evaluation import AugmentSettings, FinetuneSettings, LarsProbeSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.evaluation.augment import Erasing, TrainingImages, build_mixup, seeded
from milan_pipe.evaluation.backbone import Backbone, backbone_of
from milan_pipe.evaluation.batches import SampleRequest, StepPlan, share_of_classes
from milan_pipe.evaluation.classifier import LinearClassifier, build_classifier, classifier_of
from milan_pipe.images.labelled import labelled_images
from milan_pipe.interop.timm_layout import export_student
from milan_pipe.student.encoder import build_encoder, encode_all
from milan_pipe.student.pixels import normalise
from milan_pipe.training.checkpoint import open_checkpoint, save_checkpoint
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.recorder import TrainProgress

FULL = AugmentSettings(
    scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1
)
PLAIN = AugmentSettings(scale=(0.8, 1.0), auto_augment=None, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
NOTHING: dict[str, Any] = {}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    labelled_shard(folder / "train-0.tar", range(40))
    labelled_shard(folder / "train-1.tar", range(40, 60))
    labelled_shard(folder / "val-0.tar", range(100, 133))
    return folder


def go(shards: Path, run: Path, *, augment: AugmentSettings = FULL, **change: Any) -> Any:
    listener = change.pop("on_progress", lambda _: None)
    recipe = {"epochs": 4, "warmup_epochs": 1, "batch_size": 16, "lr": 0.05, "drop_path": 0.2, "log_every": 2}
    return finetune(
        change.pop("checkpoint", "random"),
        change.pop("train", str(shards / "train-*.tar")),
        change.pop("val", str(shards / "val-*.tar")),
        run,
        Params(student=TINY, augment=augment, finetune=FinetuneSettings(**{**recipe, **change})),
        on_progress=listener,
    )


def curve(run: Path) -> dict[str, str]:
    metrics = run / "metrics" / "plots" / "metrics"
    return {
        name: "\n".join("\t".join(line.split("\t")[1:]) for line in (metrics / f"{name}.tsv").read_text().splitlines())
        for name in ("train/loss", "train/grad_norm", "val/top1", "val/loss")
    }


def assert_same(run: Path, whole: Path, parts: tuple[str, ...] = ("model",)) -> None:
    assert curve(run) == curve(whole)
    for part in parts:
        left, right = open_checkpoint(run).weights(part), open_checkpoint(whole).weights(part)
        assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    go(shards, run, ema=0.9)
    return run


def test_a_run_that_is_being_written_is_refused(shards: Path, tmp_path: Path) -> None:
    refused = []

    def second(_: TrainProgress) -> None:
        if not refused:
            with pytest.raises(StoreError, match="being written") as caught:
                go(shards, tmp_path / "run")
            refused.append(caught)

    go(shards, tmp_path / "run", epochs=1, on_progress=second)
    assert len(refused) == 1
    assert not (tmp_path / "run" / ".lock").exists()


# --- the recipe ---------------------------------------------------------------------------------------------------


def test_each_parameter_of_vit_b_has_the_rate_of_its_layer() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=1000, global_pool="avg")
    optimiser = build_adamw(model, lr=1.0, betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.65)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["lr_scale"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in found.items():
        if name.startswith("blocks."):
            power = 13 - (int(name.split(".")[1]) + 1)
        else:
            power = 13 if name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias") else 0
        assert scale == pytest.approx(0.65**power, rel=1e-12), name
        plain = name.endswith(".bias") or "norm" in name or name in ("cls_token", "pos_embed")
        assert decay == (0.0 if plain else 0.05), name
    assert found["head.weight"][0] == 1.0
    assert found["blocks.0.attn.qkv.weight"][0] == pytest.approx(0.65**12)


def test_the_step_multiplies_the_rate_with_the_scale() -> None:
    from milan_pipe.training.step import Stepper

    layers = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    optimiser = torch.optim.SGD(
        [{"params": [layers[0].weight], "lr_scale": 0.5}, {"params": [layers[1].weight]}], lr=1.0
    )
    before = [layer.weight.item() for layer in layers]
    stepper = Stepper[None](
        optimiser,
        lambda _, __: layers[0].weight.sum() + layers[1].weight.sum(),
        split=lambda _: [(None, 1.0)],
        device=torch.device("cpu"),
        precision="float32",
    )
    stepper(None, 0, 0.1)
    moved = [old - layer.weight.item() for old, layer in zip(before, layers, strict=True)]
    assert moved == pytest.approx([0.05, 0.1])


def backbone(settings: StudentSettings = TINY) -> Backbone:
    return backbone_of("random", settings, 0)


def test_every_parameter_of_the_classifier_gets_a_gradient() -> None:
    _, model = build_classifier(backbone(), FinetuneSettings(), classes=5, seed=1)
    with torch.no_grad():
        model.head.weight.normal_()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_linear_probe_trains_its_head_alone() -> None:
    model = LinearClassifier(backbone_of("random", TINY, 0), "cls", 5, seed=1).train()
    assert not model.encoder.training
    assert model.norm.training
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == name.startswith("head."), name


def test_the_classifier_begins_with_the_backbone() -> None:
    start = backbone()
    _, model = build_classifier(start, FinetuneSettings(), classes=5, seed=1)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in start.weights.items() if name[:5] != "norm.")
    images = torch.randn(2, 3, 16, 16)
    encoder = build_encoder(TINY)
    encoder.load_state_dict(start.weights)
    # The same blocks, then the mean of the patches, a fresh norm and the head.
    encoder.norm = torch.nn.Identity()
    mean = torch.nn.functional.layer_norm(encode_all(encoder, images)[:, 1:].mean(1), (16,), eps=1e-6)
    torch.testing.assert_close(model(images), mean @ model.head.weight.T + model.head.bias)


def test_positions_are_interpolated_to_another_size() -> None:
    sizes, model = build_classifier(backbone(), FinetuneSettings(image_size=24), classes=5, seed=1)
    assert sizes.image_size == 24
    assert model.pos_embed.shape == (1, 37, 16)
    expected = torch.nn.functional.interpolate(
        backbone().weights["pos_embed"][:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2),
        size=(6, 6),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    torch.testing.assert_close(model.pos_embed[0, 1:], expected[0].flatten(1).T)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 5)


# --- data ---------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_every_image_once_whatever_the_ranks() -> None:
    numbers = np.arange(50)

    def asked(rank: int, ranks: int, first: int = 0) -> list[list[SampleRequest]]:
        return list(StepPlan(number_N=numbers, batch_size=8, seed=3, rank=rank, ranks=ranks).batches(first, 12))

    whole = asked(0, 1)
    first = [request.number for batch in whole[:6] for request in batch]
    assert len(first) == len(set(first)) == 48
    assert first != [request.number for batch in whole[6:] for request in batch]
    parted = zip(*(asked(rank, 3) for rank in range(3)), strict=True)
    assert [functools.reduce(operator.iadd, parts, []) for parts in parted] == whole
    assert asked(0, 1, first=7) == whole[7:]


def test_a_share_of_the_labels_is_a_share_of_each_class() -> None:
    labels = np.array([0] * 100 + [1] * 50 + [2] * 3)
    few = share_of_classes(labels, 0.1, seed=0)
    assert np.bincount(labels[few]).tolist() == [10, 5, 1]
    assert set(few) <= set(share_of_classes(labels, 0.5, seed=0))
    assert few.tolist() != share_of_classes(labels, 0.1, seed=1).tolist()


def test_augmentation_depends_on_seed_epoch_and_key_alone(shards: Path) -> None:
    images = labelled_images(str(shards / "train-*.tar"), lambda *_: None)
    views = TrainingImages(images, FULL, 16, seed=0)
    random.seed(1)
    first = views(SampleRequest(2, 7))[0]
    views(SampleRequest(2, 8))
    assert np.array_equal(views(SampleRequest(2, 7))[0], first)
    assert not np.array_equal(views(SampleRequest(3, 7))[0], first)
    assert first.shape == (16, 16, 3)
    assert first.dtype == np.uint8


def test_the_strongest_augmentation_never_fails(shards: Path) -> None:
    images = labelled_images(str(shards / "train-*.tar"), lambda *_: None)
    views = TrainingImages(images, FULL.model_copy(update={"auto_augment": "rand-m10-n15-mstd2-inc1"}), 16, seed=0)
    for epoch in range(20):
        assert views(SampleRequest(epoch, epoch))[0].shape == (16, 16, 3)


def test_images_in_bytes_are_those_of_timms_own_transform(shards: Path) -> None:
    """Normalised on the device, erased regions included, within the steps in which their noise is kept."""
    images = labelled_images(str(shards / "train-*.tar"), lambda *_: None)
    often = FULL.model_copy(update={"erasing": 0.7})
    views = TrainingImages(images, often, 32, seed=0)
    theirs: Any = timm.data.create_transform(
        input_size=32,
        is_training=True,
        scale=often.scale,
        color_jitter=None,
        auto_augment=often.auto_augment,
        interpolation="bicubic",
        re_prob=often.erasing,
        re_mode="pixel",
    )
    erased = 0
    for number in range(40):
        pixels_HWC, label, box = views(SampleRequest(1, number))
        assert label == number % 3
        erased += any(box)
        pixels_BHWC = torch.from_numpy(pixels_HWC.copy())[None]
        found = Erasing.restored(pixels_BHWC, normalise(pixels_BHWC), torch.tensor([box]))[0]
        with seeded(0, 1, images.keys[number]):
            expected = theirs(Image.open(io.BytesIO(images.read(number))).convert("RGB"))
        top, bottom, left, right = box
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        torch.testing.assert_close(found[:, ~inside], expected[:, ~inside], atol=1e-5, rtol=0)
        noise = expected[:, inside].clamp(-4, 127 / 32)
        torch.testing.assert_close(found[:, inside], noise, atol=1 / 64 + 1e-6, rtol=0)
    assert 20 <= erased <= 36


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mixed_images_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    mixed, shares = torch.empty(16, 3, 8, 8), torch.empty(16, 3)
    for rank in range(ranks):
        plan = StepPlan(number_N=np.arange(16), batch_size=16, seed=0, rank=rank, ranks=ranks, mirrored=True)
        mixup = build_mixup(FULL, 3, 16, ranks)
        assert mixup is not None
        with seeded(0, "mix", 5):
            mixed[plan.share], shares[plan.share] = mixup(images[plan.share], labels[plan.share])
    alone = build_mixup(FULL, 3, 16, 1)
    assert alone is not None
    with seeded(0, "mix", 5):
        expected = alone(images.clone(), labels)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(shares, expected[1])
    assert not torch.equal(mixed, images)


def test_mixup_shares_out_the_classes() -> None:
    mixup = build_mixup(FULL, 3, 8, 1)
    assert mixup is not None
    pixels, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
    with seeded(0):
        mixed, target = mixup(pixels.clone(), labels)
    with seeded(0):
        again = mixup(pixels.clone(), labels)
    assert torch.equal(mixed, again[0])
    assert torch.equal(target, again[1])
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    for size, ranks in ((7, 1), (12, 4)):
        with pytest.raises(SettingError, match=f"expected a multiple of {2 * ranks}"):
            build_mixup(FULL, 3, size, ranks)


def test_class_folders_and_shards_are_the_same_task(tmp_path: Path) -> None:
    folders = labelled_images(class_folders(tmp_path / "folders", range(12)), lambda *_: None)
    shards = labelled_images(labelled_shard(tmp_path / "s" / "train.tar", range(12)), lambda *_: None)
    assert folders.classes == NAMES
    by_bytes = {shards.read(n): int(shards.label_N[n]) for n in range(12)}
    assert {folders.read(n): int(folders.label_N[n]) for n in range(12)} == by_bytes


# --- runs ---------------------------------------------------------------------------------------------------------


def test_the_generators_of_the_caller_stay_as_they_are(shards: Path, tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    before = state()
    go(shards, tmp_path / "run", epochs=1)
    assert state() == before


def test_it_learns_and_says_so(shards: Path, tmp_path: Path) -> None:
    report = go(shards, tmp_path / "run", augment=PLAIN, epochs=12, drop_path=0.0)
    assert report.scores["top1"] > 0.9
    assert report.best["top1"] >= report.scores["top1"]
    assert report.scores["top5"] == 1.0
    opened = open_checkpoint(tmp_path / "run" / "best")
    assert opened.record["scores"] == report.best
    assert opened.record["step"] == report.best_step
    _, model = classifier_of(opened)
    right = 0
    for number in range(100, 133):
        pixels = torch.from_numpy(image(number, number % 3))
        square = torch.nn.functional.interpolate(
            pixels.permute(2, 0, 1)[None].float(), size=(16, 16), mode="bicubic", antialias=True
        )
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        right += int(model.eval()(((square / 255) - mean[:, None, None]) / std[:, None, None]).argmax()) == number % 3
    assert right / 33 > 0.85
    assert go(shards, tmp_path / "run", augment=PLAIN, epochs=12, drop_path=0.0).steps_now == 0


@pytest.mark.parametrize("every", [2, 3])
def test_a_broken_run_ends_as_the_whole_one(shards: Path, whole: Path, tmp_path: Path, every: int) -> None:
    for step in (4, 8):
        with pytest.raises(StopAtError):
            go(shards, tmp_path / "run", ema=0.9, checkpoint_every=every, on_progress=stop_at(step))
    report = go(shards, tmp_path / "run", ema=0.9, checkpoint_every=every)
    assert 0 < report.resumed_from < 9
    assert_same(tmp_path / "run", whole, ("model", "ema"))
    assert (
        open_checkpoint(tmp_path / "run" / "best").record["scores"] == open_checkpoint(whole / "best").record["scores"]
    )


def test_processes_that_decode_change_nothing(shards: Path, whole: Path, tmp_path: Path) -> None:
    go(shards, tmp_path / "run", ema=0.9, workers=2)
    assert_same(tmp_path / "run", whole, ("model", "ema"))


def test_parts_of_a_batch_give_its_gradient(shards: Path, tmp_path: Path) -> None:
    for name, parts in (("one", 1), ("three", 3)):
        go(shards, tmp_path / name, augment=PLAIN, drop_path=0.0, accumulate=parts, precision="float32")
    left, right = (open_checkpoint(tmp_path / name).weights("model") for name in ("one", "three"))
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=2e-4, rtol=1e-3)


def test_bfloat16_and_a_larger_input_run(shards: Path, tmp_path: Path) -> None:
    report = go(shards, tmp_path / "run", precision="bfloat16", image_size=24, crop=0.9, epochs=1, clip_grad=1.0)
    assert report.steps == 3
    assert 0 <= report.scores["top1"] <= 1


COMMAND = [sys.executable, "-m", "milan_pipe", "finetune", "random"]
SETTINGS = {
    **{f"student.{name}": value for name, value in TINY.model_dump(exclude={"model"}).items()},
    "finetune.epochs": 12,
    "finetune.train_fraction": 1.0,
    "finetune.batch_size": 16,
    "finetune.drop_path": 0.2,
    "finetune.log_every": 1,
    "finetune.checkpoint_every": 2,
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.mixup": 0.8,
}


def command(shards: Path, run: Path) -> list[str]:
    words = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return [*COMMAND, str(shards / "train-*.tar"), str(shards / "val-*.tar"), str(run), *words]


def test_killed_at_random_instants(shards: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes.run(command(shards, tmp_path / "whole"), check=True, capture_output=True, env=environment)
    killed_until_done(command(shards, tmp_path / "run"), tmp_path / "run", kills=2, seed=1)
    assert_same(tmp_path / "run", tmp_path / "whole")


FEW_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
runpy.run_module("milan_pipe", run_name="__main__", alter_sys=True)
"""


def test_few_file_descriptors_are_enough(shards: Path, tmp_path: Path) -> None:
    """Eight workers with batches of 256 must run where 1,024 descriptors are allowed, most systems' default.

    Here in proportion: 2 workers read 2 batches each ahead, 120 images of which every one would take a descriptor.
    A batch takes one, and the process itself some 40.
    """
    few = ["finetune.batch_size=30", "finetune.epochs=4", "finetune.workers=2"]
    given = command(shards, tmp_path / "run")[3:] + [word for setting in few for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", FEW_FILES, *given]
    done = processes.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "run").record["finished"] is True


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "two")[3:]
    off = ["finetune.drop_path=0", "finetune.epochs=4"]
    words += [word for setting in off for word in ("--set", setting)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "milan_pipe"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes.run([*torchrun, *words], check=True, capture_output=True, env=environment)
    words[words.index(str(tmp_path / "two"))] = str(tmp_path / "one")
    processes.run([sys.executable, "-m", "milan_pipe", *words], check=True, capture_output=True, env=environment)
    two, one = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=1e-3)


# --- export -------------------------------------------------------------------------------------------------------


def test_timm_loads_it_with_its_head(shards: Path, tmp_path: Path) -> None:
    go(
        shards,
        tmp_path / "run",
        train=class_folders(tmp_path / "t", range(60)),
        val=class_folders(tmp_path / "v", range(9)),
    )
    report = export_student(tmp_path / "run" / "best", tmp_path / "out")
    assert report.classes == 3
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    _, model = classifier_of(open_checkpoint(tmp_path / "run" / "best"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model.eval()(images))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_classes"] == 3
    assert config["label_names"] == list(NAMES)
    by_name = timm.create_model(report.model, **report.model_args, num_classes=3, checkpoint_path=report.weights)
    assert torch.equal(by_name.eval()(images), loaded(images))


# --- linear probe by protocol -------------------------------------------------------------------------------------


def probe(shards: Path, run: Path, **change: Any) -> Any:
    listener = change.pop("on_progress", lambda _: None)
    recipe = {"epochs": 20, "warmup_epochs": 1, "batch_size": 20, "lr": 500.0, "log_every": 1}
    return lars_probe(
        "random",
        str(shards / "train-*.tar"),
        str(shards / "val-*.tar"),
        run,
        Params(student=TINY, lars_probe=LarsProbeSettings(**{**recipe, **change})),
        on_progress=listener,
    )


def test_the_probe_leaves_the_student_as_it_was_and_goes_on(shards: Path, tmp_path: Path) -> None:
    report = probe(shards, tmp_path / "whole", pool="mean")
    assert report.scores["top1"] > 0.6
    weights = open_checkpoint(tmp_path / "whole").weights("model")
    start = backbone().weights
    assert all(torch.equal(weights[f"encoder.{name}"], tensor) for name, tensor in start.items())
    assert bool(weights["norm.running_mean"].any())
    with pytest.raises(StopAtError):
        probe(shards, tmp_path / "run", pool="mean", checkpoint_every=7, on_progress=stop_at(30))
    assert probe(shards, tmp_path / "run", pool="mean").resumed_from == 28
    assert_same(tmp_path / "run", tmp_path / "whole")


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_other_classes_in_val(shards: Path, tmp_path: Path) -> None:
    train = class_folders(tmp_path / "train", range(30))
    val = class_folders(tmp_path / "val", range(9), ("ant", "bee", "dog"))
    with pytest.raises(DataError, match="different classes"):
        go(shards, tmp_path / "run", train=train, val=val)


def test_a_label_that_train_has_not(shards: Path, tmp_path: Path) -> None:
    val = write_tar(tmp_path / "val.tar", {"a.png": png(image(0, 0)), "a.cls": b"7"})
    with pytest.raises(DataError, match="label 7"):
        go(shards, tmp_path / "run", val=val)


def test_images_that_cannot_be_read(shards: Path, tmp_path: Path) -> None:
    train = class_folders(tmp_path / "train", range(60))
    for number in (4, 5):
        (train / NAMES[number % 3] / f"{number:04d}.png").write_bytes(b"broken")
    report = go(shards, tmp_path / "run", train=train, val=class_folders(tmp_path / "v", range(9)))
    assert report.bad == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["bee/0004.png", "cat/0005.png"]
    with pytest.raises(DataError, match="of 69 images"):
        go(shards, tmp_path / "r2", train=train, val=tmp_path / "v", max_bad_fraction=0.01)


@pytest.mark.timeout(60)
def test_images_that_are_no_regular_files(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "train", range(3))
    os.mkfifo(root / "ant" / "0001.png")
    (root / "ant" / "0002.png").symlink_to("/dev/zero")
    found = labelled_images(root, lambda *_: None)
    for number in (1, 2):
        with pytest.raises(DataError, match="not a regular file"):
            found.read(number)


def _without(path: Path, *kept: str) -> Path:
    path.mkdir()
    for name in kept:
        (path / name).mkdir()
    return path


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"checkpoint": "missing"}, MissingError, "missing is not there"),
        ({"batch_size": 15}, SettingError, "expected a multiple of 2"),
        ({"image_size": 18}, SettingError, "no multiple of the patch"),
        ({"train": "nowhere"}, MissingError, "nowhere is not there"),
        ({"device": "cuda:9"}, SettingError, "cannot be used"),
    ],
)
def test_mistakes_are_one_line(
    shards: Path, tmp_path: Path, change: dict[str, Any], kind: type[MilanError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        go(shards, tmp_path / "run", **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_folders_that_are_no_classes(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither \.tar shards nor class folders"):
        go(shards, tmp_path / "run", train=_without(tmp_path / "none"))
    with pytest.raises(MissingError, match="no images in them"):
        go(shards, tmp_path / "run", train=_without(tmp_path / "hollow", "a", "b"))
    half = class_folders(tmp_path / "half", range(30))
    (half / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        go(shards, tmp_path / "run", train=half)


def test_a_loss_that_is_not_finite(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lower finetune\.lr"):
        go(shards, tmp_path / "run", lr=1e12, warmup_epochs=0, epochs=8, checkpoint_every=1)
    last = open_checkpoint(tmp_path / "run")
    assert last.record["finished"] is False
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last.weights("model").values())


def test_unknown_augmentation(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="not understood by timm"):
        go(shards, tmp_path / "run", augment=FULL.model_copy(update={"auto_augment": "random-nonsense"}))


def test_a_run_does_not_go_on_with_other_images_of_the_same_names(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "folders", range(12))
    sides = {"train": str(folder), "val": str(folder)}
    with pytest.warns(RuntimeWarning, match="images in common"):
        go(folder, tmp_path / "run", epochs=1, batch_size=6, **sides)
    first = min(folder.rglob("*.png"))
    first.write_bytes(first.read_bytes() + bytes(1))
    with pytest.warns(RuntimeWarning), pytest.raises(MismatchError, match=r"data\.train_sizes"):
        go(folder, tmp_path / "run", epochs=1, batch_size=6, **sides)


def test_a_run_of_something_else(shards: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"the run has 0\.05"):
        go(shards, whole, ema=0.9, lr=0.1)
    with pytest.raises(DataError, match="milan-pipe finetune"):
        go(shards, tmp_path / "run", checkpoint=whole)


def test_a_checkpoint_of_another_width(shards: Path, tmp_path: Path) -> None:
    wide = build_encoder(TINY.model_copy(update={"width": 32}))
    save_checkpoint(tmp_path, 1, {"student": wide.state_dict()}, {"student": TINY.model_dump(mode="json")})
    with pytest.raises(MismatchError, match="does not fit the model"):
        go(shards, tmp_path / "run", checkpoint=tmp_path)
