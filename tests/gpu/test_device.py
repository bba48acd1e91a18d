"""What is computed on a CUDA device is what the CPU computes, within the tolerance that each test names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import zarr
from support.project import SETTINGS
from support.targets import header
from support.training import StopAtError, stop_at, stored_batch

from milan_pipe import api
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.config.training import Precision
from milan_pipe.devices import memory_in_use
from milan_pipe.extraction.forward import Forward
from milan_pipe.extraction.render import Clock
from milan_pipe.loader.stream import Batch
from milan_pipe.planning.speed import run_teacher
from milan_pipe.pretraining.objective import Objective, build_objective
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.store import open_targets
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.feed import on_device
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.step import Stepper, StepResult

CPU = torch.device("cpu")
HEAD = header(size=32, grid=(4, 4), width=12)
WITHIN = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.03}


# --- the step -----------------------------------------------------------------------------------------------------


STUDENT = StudentSettings(image_size=32, patch_size=8, width=32, depth=2, heads=2)
DECODER = DecoderSettings(width=16, depth=2, heads=2)
OTHERS = ("mae", "maskfeat", "unmasked-teacher", "mr-mae", "maskdistill", "dense")


def objective(device: torch.device, recipe: str | None = None, **change: Any) -> Objective:
    """MILAN's, or with a recipe's target, masks and kind of decoder."""
    of = load_params(recipe)
    decoder = DECODER.model_copy(update={"kind": of.decoder.kind})
    pretraining = PretrainSettings(**change)
    params = Params(student=STUDENT, decoder=decoder, masking=of.masking, target=of.target, pretrain=pretraining)
    return build_objective(HEAD, params, device)


def stepper(model: Objective, device: torch.device, precision: Precision, **change: Any) -> Stepper[Batch]:
    return Stepper(
        build_adamw(model.student, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05),
        change.pop("loss_of", model),
        split=lambda whole: whole.parts(2),
        device=device,
        precision=precision,
        clip_grad=change.pop("clip_grad", None),
    )


def losses(step: Stepper[Batch], count: int = 5, given: Batch | None = None) -> list[float]:
    return [float(step(given or stored_batch(12), number, 1e-3).loss) for number in range(count)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_steps_have_the_losses_and_gradients_of_the_cpu(device: torch.device, precision: Precision) -> None:
    here, there = objective(CPU), objective(device)
    expected = losses(stepper(here, CPU, "float32", clip_grad=1.0))
    fast = stepper(there, device, precision, clip_grad=1.0)
    assert fast.scaler.is_enabled() == (precision == "float16")
    assert losses(fast) == pytest.approx(expected, rel=WITHIN[precision])
    for (name, left), right in zip(here.student.named_parameters(), there.student.parameters(), strict=True):
        assert right.dtype == torch.float32
        assert right.device.type == device.type
        if left.grad is not None and left.ndim > 1:
            assert right.grad is not None
            cosine = torch.nn.functional.cosine_similarity(left.grad.flatten(), right.grad.cpu().flatten(), dim=0)
            assert cosine > 1 - WITHIN[precision], name


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gradient_that_is_not_finite_changes_no_weight(device: torch.device, precision: Precision) -> None:
    model = objective(device)
    poisoned = stepper(model, device, precision, loss_of=lambda part, epoch: model(part, epoch) * float("nan"))
    before = [parameter.clone() for parameter in model.student.parameters()]
    result: StepResult = poisoned(stored_batch(12), 0, 1e-3)
    assert not torch.isfinite(result.loss)
    assert all(torch.equal(old, new) for old, new in zip(before, model.student.parameters(), strict=True))


def test_a_compiled_step_has_the_same_losses(device: torch.device) -> None:
    plain = losses(stepper(objective(device), device, "bfloat16"))
    compiled = losses(stepper(objective(device, compile=True), device, "bfloat16"))
    assert compiled == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(("recipe", "compiled"), [*((recipe, False) for recipe in OTHERS), ("mr-mae", True)])
def test_every_objective_has_the_losses_of_the_cpu(device: torch.device, recipe: str, compiled: bool) -> None:
    expected = losses(stepper(objective(CPU, recipe), CPU, "float32"))
    found = losses(stepper(objective(device, recipe, compile=compiled), device, "bfloat16" if compiled else "float32"))
    assert found == pytest.approx(expected, rel=WITHIN["bfloat16" if compiled else "float32"])


def test_activations_computed_again_have_the_same_losses(device: torch.device) -> None:
    plain = losses(stepper(objective(device), device, "float32"))
    again = losses(stepper(objective(device, checkpoint_activations=True), device, "float32"))
    assert again == pytest.approx(plain, rel=1e-4)


def test_a_batch_in_pinned_memory_has_the_same_losses(device: torch.device) -> None:
    def pinned(value: Any) -> Any:
        return value.pin_memory() if isinstance(value, torch.Tensor) and device.type == "cuda" else value

    whole = stored_batch(12)
    copied = dataclasses.replace(
        whole, **{field.name: pinned(getattr(whole, field.name)) for field in dataclasses.fields(whole)}
    )
    plain = losses(stepper(objective(device), device, "float32"))
    assert losses(stepper(objective(device), device, "float32"), given=copied) == pytest.approx(plain, rel=1e-5)


def test_batches_come_to_the_device_in_order_while_it_computes(device: torch.device) -> None:
    def batches() -> Iterator[Batch]:
        for number in range(20):
            whole = stored_batch(12)
            # Large enough that a copy takes longer than the way to the first use of it.
            code_BST = torch.full((256, 197, 512), number, dtype=torch.int8)
            yield dataclasses.replace(whole, code_BST=code_BST.pin_memory() if device.type == "cuda" else code_BST)

    sums = []
    for batch in on_device(batches(), device):
        assert batch.code_BST.device.type == device.type
        first = batch.code_BST.sum(dtype=torch.int64)
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)
        # What was handed out must not be written over by the copies of later batches.
        sums.append((first, batch.code_BST.sum(dtype=torch.int64)))
    assert [tuple(map(int, each)) for each in sums] == [(number * 256 * 197 * 512,) * 2 for number in range(20)]


def test_what_the_teacher_gives_does_not_depend_on_when_it_is_looked_at(device: torch.device) -> None:
    teacher, clock = load_teacher(TeacherSettings(), device), Clock()
    views = np.random.default_rng(0).integers(0, 256, (12, 8, 64, 64, 3), dtype=np.uint8)
    forward, found, late = Forward(teacher), [], None
    for batch in [*views, None]:
        launched = None if batch is None else forward.launch(list(batch), clock)
        if late is not None:
            with forward.looking_at(late, clock) as output:
                found.append(output.features_BST.cpu())
        late = launched
    expected = [teacher(torch.from_numpy(batch)).features_BST.cpu() for batch in views]
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert clock.take()["teacher"] > 0


def test_a_compiled_teacher_gives_the_same(device: torch.device) -> None:
    plain, compiled = (load_teacher(TeacherSettings(precision="float32"), device) for _ in range(2))
    compiled.compile_tower()
    for count in (8, 3):
        pixels = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)
        left, right = plain(pixels), compiled(pixels)
        torch.testing.assert_close(right.features_BST, left.features_BST, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(right.importance_BL, left.importance_BL, rtol=1e-3, atol=1e-5)


@pytest.fixture
def process_group(device: torch.device) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_rank_of_its_own_has_the_same_losses(device: torch.device, parallel: Any) -> None:
    plain = losses(stepper(objective(device), device, "float32"))
    model = objective(device)
    loss_of, exchange = Ranks(0, 1, device).parallelize(model, parallel, model.student.units(), model.student)
    step = stepper(model, device, "float32", loss_of=loss_of)
    step._exchange = exchange
    assert losses(step) == pytest.approx(plain, rel=1e-4)
    if parallel == "fsdp":
        assert all(hasattr(parameter, "full_tensor") for parameter in model.student.parameters())


# --- whole stages -------------------------------------------------------------------------------------------------


def params(device: torch.device, *more: str) -> Params:
    sections = ("extract", "pretrain", "finetune", "segment")
    return load_params(None, [*SETTINGS, *(f"{name}.device={device}" for name in sections), *more])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    api.prepare("demo", folder, params(CPU))
    return folder


def extracted(device: torch.device, images: Path, targets: Path, *more: str) -> Path:
    api.extract_targets(str(images / "train-*.tar"), targets, params(device, *(more or ("codec=float16",))))
    return targets


def test_extraction_writes_the_same_store(device: torch.device, images: Path, tmp_path: Path) -> None:
    there = open_targets(extracted(device, images, tmp_path / "device"))
    here = open_targets(extracted(CPU, images, tmp_path / "cpu"))
    assert there.shards == here.shards
    decode = codec_of(here.header.codec).decode
    for shard in here.shards:
        for view in range(here.header.views.count):
            left, right = (store.read(shard, view, 0, store.samples(shard)) for store in (here, there))
            assert left.keys == right.keys
            assert [bytes(jpeg) for jpeg in left.jpegs] == [bytes(jpeg) for jpeg in right.jpegs]
            features = [decode(torch.from_numpy(run.code_NST), None).float() for run in (left, right)]
            # The device computes in bfloat16.
            assert torch.nn.functional.cosine_similarity(*features, dim=-1).min() > 0.995
            assert np.allclose(left.attention_NL, right.attention_NL, rtol=0.1, atol=0.01)


@pytest.fixture
def store(device: torch.device, images: Path, tmp_path: Path) -> Path:
    return extracted(device, images, tmp_path / "targets")


def curve(
    store: Path | list[Path], run: Path, device: torch.device, *more: str, stop: int | None = None
) -> list[float]:
    found: list[float] = []
    at_end = stop_at(stop) if stop else None

    def on_progress(now: TrainProgress) -> None:
        found.append(now.loss)
        if at_end:
            at_end(now)

    api.pretrain(store, run, params(device, "pretrain.epochs=4", *more), on_progress=on_progress)
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_that_is_broken_off_goes_on_to_the_same_end(
    device: torch.device, store: Path, tmp_path: Path, precision: str
) -> None:
    """To the bit on a CPU; a device's sums are in another order each time."""
    more = (f"pretrain.precision={precision}", "pretrain.checkpoint_every=2")
    whole = curve(store, tmp_path / "whole", device, *more)
    with pytest.raises(StopAtError):
        curve(store, tmp_path / "run", device, *more, stop=7)
    rest = curve(store, tmp_path / "run", device, *more)
    assert len(rest) == len(whole) - 6
    weights = [open_checkpoint(tmp_path / run).weights("student") for run in ("whole", "run")]
    if device.type == "cpu":
        assert rest == whole[6:]
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    else:
        assert rest == pytest.approx(whole[6:], rel=1e-3 if precision == "float32" else 0.02)
        for name, value in weights[0].items():
            if value.ndim > 1:
                assert torch.allclose(value, weights[1][name], rtol=0.1, atol=0.01), name


def test_the_teacher_in_every_step_trains_like_its_targets(device: torch.device, images: Path, tmp_path: Path) -> None:
    # Not as float16: what a GPU computes again is the same to the bit.
    store = extracted(device, images, tmp_path / "targets", "codec=int8")
    stored = curve(store, tmp_path / "stored", device)
    online = curve(store, tmp_path / "online", device, "pretrain.targets=online")
    assert stored != online
    assert max(abs(left - right) for left, right in zip(stored, online, strict=True)) < 0.01


def test_batches_of_other_processes_are_the_same(device: torch.device, store: Path, tmp_path: Path) -> None:
    more = ("pretrain.precision=float32", "pretrain.canonical_streams=2")
    found = [curve(store, tmp_path / str(n), device, *more, f"pretrain.workers={n}") for n in (0, 2)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_two_stores_train_as_on_the_cpu(device: torch.device, store: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    api.extract_targets(None, second, params(device, "teacher.pretrained=random"), views_from=store)
    more = ("pretrain.precision=float32", "teachers.standardise=phi-s", "teachers.weights=balanced")
    found = [curve([store, second], tmp_path / f"{each.type}-{n}", each, *more) for n, each in enumerate((CPU, device))]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_a_student_goes_on_from_another_and_is_judged_on_the_way(
    device: torch.device, images: Path, store: Path, tmp_path: Path
) -> None:
    curve(store, tmp_path / "first", device)
    judged = ("pretrain.probe_every=2", f"pretrain.probe_train={images}/train-*.tar")
    more = (*judged, f"pretrain.probe_test={images}/test-*.tar", "pretrain.layer_decay=0.8")
    found = curve(store, tmp_path / "then", device, f"student.init={tmp_path / 'first'}", *more)
    assert all(map(math.isfinite, found))
    assert list(tmp_path.glob("then/metrics/plots/metrics/probe/*.tsv"))


def test_embeddings_are_those_of_the_cpu(device: torch.device, images: Path, store: Path, tmp_path: Path) -> None:
    curve(store, tmp_path / "run", device)
    rows = []
    for number, each in enumerate((CPU, device)):
        out = tmp_path / f"{each.type}-{number}"
        api.embed(tmp_path / "run", f"{images}/test-*.tar", out, params(each, "embed.format=zarr"), patches=True)
        group: Any = zarr.open_group(min(out.glob("*.zarr")), mode="r")
        rows.append(torch.from_numpy(np.concatenate([group["embedding"][:][:, None], group["patches"][:]], axis=1)))
    assert torch.nn.functional.cosine_similarity(*rows, dim=-1).min() > 0.995


def test_evaluations_have_the_scores_of_the_cpu(
    device: torch.device, images: Path, store: Path, tmp_path: Path
) -> None:
    curve(store, tmp_path / "run", device)
    sets = str(images / "train-*.tar"), str(images / "test-*.tar")
    here, there = (api.knn(tmp_path / "run", *sets, params(each)) for each in (CPU, device))
    assert there.accuracy == pytest.approx(here.accuracy, abs=0.13)  # 2 of 16 images
    probes = [api.segment_probe(tmp_path / "run", *sets, params(each)).heads for each in (CPU, device)]
    for name, score in probes[0].items():
        assert probes[1][name].miou == pytest.approx(score.miou, abs=0.05)
    for name, train in (("tuned", api.finetune), ("segmented", api.segment)):
        reports = [
            train(tmp_path / "run", *sets, tmp_path / f"{name}-{each.type}-{number}", params(each))
            for number, each in enumerate((CPU, device))
        ]
        assert reports[1].loss == pytest.approx(reports[0].loss, rel=0.05)


def test_speed_and_memory_are_measured(device: torch.device) -> None:
    teacher = load_teacher(params(device).teacher, device)
    size = teacher.info.image_size
    pixels_NHWC = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8)
    output, speed = run_teacher(teacher, pixels_NHWC, 4)
    assert output.features_BST.device == CPU
    assert speed.per_second > 0
    assert speed.device.startswith(device.type)
    assert memory_in_use(device) > 0
