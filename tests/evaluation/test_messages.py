"""What the errors of evaluation say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.hub import use_hub
from support.images import TINY, class_folders, image, labelled_shard, mask_folders, png, write_tar
from support.messages import Case, require_message
from support.s3 import free_port
from support.timm_models import timm_folder

from milan_pipe.api import finetune, knn, linear_probe, segment, segment_probe
from milan_pipe.config.evaluation import (
    AugmentSettings,
    EmbedSettings,
    FinetuneSettings,
    KnnSettings,
    LinearProbeSettings,
    Pool,
    SegmentProbeSettings,
    SegmentSettings,
)
from milan_pipe.config.params import Params
from milan_pipe.errors import (
    DataError,
    DeviceFullError,
    MismatchError,
    MissingError,
    ProcessLostError,
    SettingError,
    ShapeError,
    StoreError,
)
from milan_pipe.evaluation.augment import build_mixup
from milan_pipe.evaluation.backbone import student_of
from milan_pipe.evaluation.batches import BadImages, SampleRequest, load_batches
from milan_pipe.evaluation.classifier import classifier_of
from milan_pipe.evaluation.features import (
    LabelledFeatures,
    centre_view,
    check_same_task,
    embed_shards,
    kept_features,
    require_directions,
)
from milan_pipe.evaluation.knn import knn_accuracy
from milan_pipe.evaluation.linear_probe import linear_probe_accuracy
from milan_pipe.evaluation.results import read_evaluations
from milan_pipe.training.checkpoint import open_checkpoint, save_checkpoint

STEP = "run/checkpoints/step-00000001"


def features(count: int = 4, width: int = 2, labels: list[int] | None = None) -> LabelledFeatures:
    label_N = torch.tensor(labels if labels is not None else [number % 2 for number in range(count)])
    return LabelledFeatures(features_NF=torch.ones(count, width), label_N=label_N)


def of(features_NF: torch.Tensor, label_N: torch.Tensor) -> LabelledFeatures:
    return LabelledFeatures(features_NF=features_NF, label_N=label_N)


def file(path: str, text: str = "") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def checkpoint(record: dict[str, Any], use: Callable[[Any], object]) -> object:
    save_checkpoint(Path("run"), 1, {"student": {"w": torch.ones(1)}}, record)
    return use(open_checkpoint("run"))


def tuned(augment: AugmentSettings | None = None, *, images: int = 6, classes: bool = True, **change: Any) -> object:
    train = class_folders(Path("train"), range(images))
    if not classes:
        train = labelled_shard(Path("train.tar"), range(0, images * 3, 3))
    recipe = FinetuneSettings(**{"epochs": 1, "batch_size": 4, **change})
    params = Params(student=TINY, augment=augment or AugmentSettings(), finetune=recipe)
    return finetune("random", train, train, "run", params)


def segmented(val: str = "own", classes: str | None = "a\nb\n", mask: int | None = None, **change: Any) -> object:
    for name in {"own", val}:
        mask_folders(Path(name, "images"), Path(name, "masks"), range(4))
        if classes is not None:
            Path(name, "classes.txt").write_text(classes if name == "own" else "b\na\n")
    if mask is not None:
        for path in Path("own/masks").iterdir():
            Image.fromarray(np.full_like(np.array(Image.open(path)), mask)).save(path)
    recipe = {"steps": 1, "batch_size": 2, "channels": 8, "crop": 32, **change}
    return segment("random", "own", val, "run", Params(student=TINY, segment=SegmentSettings(**recipe)))


def segment_probed(subject: str = "random", *, masks: bool = True, **change: Any) -> object:
    images = labelled_shard(Path("own.tar"), range(4), masks=masks)
    recipe = SegmentProbeSettings(**{"steps": 1, "neighbours": 2, **change})
    params = Params(student=TINY, segment=SegmentSettings(classes=2), segment_probe=recipe)
    return segment_probe(subject, images, images, params)


def unreadable(_: object) -> object:
    raise DataError("broken")


def all_bad() -> object:
    bad = BadImages(None)
    bad.limit(99, 1.0)
    keys = [f"k{number}" for number in range(99)]
    batches = iter([[SampleRequest(0, 5)]])
    return list(load_batches(unreadable, list, keys, batches, workers=0, setting="finetune.workers", bad=bad))


def killed_while_it_reads() -> object:
    batches = iter([[SampleRequest(0, number)] for number in range(99)])
    read = load_batches(
        lambda _: 0, list, ["k"] * 99, batches, workers=2, setting="segment.workers", bad=BadImages(None)
    )
    next(read)
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    return list(read)


def too_many() -> object:
    bad = BadImages(None)
    bad.add("a.png", "empty file")
    bad.add("b.png", "no image")
    return bad.limit(8, 0.1)


def judged(checkpoint: str, pool: Pool = "mean") -> object:
    """A model of timm by k-NN; no hub is in reach."""
    train = class_folders(Path("train"), range(3))
    with pytest.MonkeyPatch.context() as patch:
        use_hub(f"http://127.0.0.1:{free_port()}", Path("cache"), patch)
        return knn(checkpoint, train, train, Params(embed=EmbedSettings(pool=pool), knn=KnnSettings(neighbours=(1,))))


def of_timm(kind: str, side: int = 32, pool: Pool = "mean") -> Callable[[], object]:
    return lambda: judged(str(timm_folder(Path("m"), kind, side)), pool)


def kept() -> object:
    def compute() -> LabelledFeatures:
        return features()

    kept_features("features", {"a": 1}, compute)
    for path in Path("features").iterdir():
        path.write_bytes(b"{}")
    return kept_features("features", {"a": 1}, compute)


def embedded(images: Path, result: torch.Tensor | None = None) -> object:
    found = result if result is not None else torch.ones(1, 2)
    return embed_shards(images, lambda _: found, 8, EmbedSettings(batch_size=64))


def embedded_on_a_full_device() -> object:
    def embedder(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    return embed_shards(class_folders(Path("images"), range(4)), embedder, 8, EmbedSettings(batch_size=64))


def broken_folders() -> Path:
    for name in ("cat", "dog"):
        file(f"images/{name}/a.png", "broken")
    return Path("images")


def probe(labels: list[int], **change: Any) -> object:
    return linear_probe_accuracy(features(labels=labels), features(labels=labels), LinearProbeSettings(**change))


DIVERGED = "are all zero or not finite; the encoder's weights may have diverged: take an earlier checkpoint"
CASES: dict[str, Case] = {
    # --- models of timm -------------------------------------------------------------------------------------------
    "unknown model": (
        lambda: judged("timm:vit_smal"),
        SettingError,
        "unknown model 'timm:vit_smal', timm has no model 'vit_smal'; nearest are vit_small_patch...",
    ),
    "unknown tag": (
        lambda: judged("timm:test_vit.x"),
        MissingError,
        "model 'timm:test_vit.x': timm has no weights 'x' of 'test_vit'; known tags are r160_in1k",
    ),
    "model without weights": (
        lambda: judged("timm:vit_base_patch16_gap_224"),
        MissingError,
        "model 'timm:vit_base_patch16_gap_224': timm has no weights of it. A folder in timm's layout will do too: "
        "timm:local-dir:PATH as CHECKPOINT",
    ),
    "no hub": (
        lambda: judged("timm:test_vit"),
        MissingError,
        "model 'timm:test_vit' cannot be had: model.safetensors or pytorch_model.bin of repository "
        "timm/test_vit.r160_in1k cannot be fetched from http://127.0.0.1:...: ...refused. A folder in timm's layout "
        "will do too: timm:local-dir:PATH as CHECKPOINT",
    ),
    "model of timm to be trained": (
        lambda: finetune("timm:test_vit", "train", "train", "run", Params()),
        SettingError,
        "timm:test_vit is a model of timm, which knn, linear-probe and embed take; fine-tuning and segmentation "
        "begin with a student: name a run or a checkpoint",
    ),
    "no folder of timm": (
        lambda: judged("timm:local-dir:nowhere"),
        MissingError,
        "model 'timm:local-dir:nowhere': nowhere has no config.json, timm's description of a model",
    ),
    "no class token": (
        of_timm("no class token", pool="cls"),
        SettingError,
        "model 'm' has no class token, which embed.pool=cls takes; set embed.pool=mean",
    ),
    "features of unknown places": (
        of_timm("no patches"),
        SettingError,
        "model 'timm:local-dir:m' cannot be used: timm's PoolingVisionTransformer gives features of shape (1, 1, 8); "
        "expected one for each patch, as of a vision transformer, or a map of them, as of a convolutional network",
    ),
    "no side": (
        of_timm("map", side=0),
        SettingError,
        "model 'timm:local-dir:m' takes 3 x 0 x 0, expected 3 channels and a square, as 3 x 224 x 224",
    ),
    "a side that does not fit": (
        of_timm("map", side=2),
        DataError,
        "model 'timm:local-dir:m' cannot be run at 2 x 2 pixels (RuntimeError: ...); check its description",
    ),
    "scale": (
        lambda: tuned(AugmentSettings(scale=(0.9, 0.2))), SettingError,
        "augment.scale is the least and the greatest share of the area, above 0 and at most 1, found (0.9, 0.2)",
    ),
    "RandAugment": (
        lambda: tuned(AugmentSettings(auto_augment="loud")), SettingError,
        "augment.auto_augment='loud' is not understood by timm (...); expected words as rand-m9-mstd0.5-inc1",
    ),
    "mixup of an odd share": (
        lambda: build_mixup(AugmentSettings(mixup=0.5), 3, 12, 4), SettingError,
        "mixup and cutmix pair the images of a batch; batch_size is 12 for 4 rank(s), expected a multiple of 8; change "
        "it, or set augment.mixup=0 and augment.cutmix=0",
    ),
    "another task's checkpoint": (
        lambda: checkpoint({"task": "finetune", "student": {}}, student_of), DataError,
        f"{STEP} holds what `milan-pipe finetune` trained; name one that `milan-pipe pretrain` wrote",
    ),
    "no student": (
        lambda: checkpoint({"task": None}, student_of), DataError,
        f"{STEP} does not say which student it holds; name one that `milan-pipe pretrain` wrote",
    ),
    "no classifier": (
        lambda: checkpoint({"task": "finetune"}, classifier_of), DataError,
        f"{STEP} does not say which classifier it holds",
    ),
    "images in a row": (
        all_bad, DataError, "16 images in a row cannot be read, the first is 'k5': broken",
    ),
    "worker that is killed": (
        killed_while_it_reads, ProcessLostError,
        "a process of segment.workers=2 ended by itself: DataLoader worker ... The system may have killed it for its "
        "memory; try fewer, or segment.workers=0",
    ),
    "too many bad images": (
        too_many, DataError,
        "2 of 10 images cannot be read, the last is 'b.png': no image; repair them, or raise max_bad_fraction",
    ),
    "one class": (
        lambda: tuned(classes=False), DataError,
        "all images of train.tar are of one class; a classifier needs two at least",
    ),
    "few images": (
        lambda: tuned(batch_size=64), SettingError,
        "finetune.batch_size is 64, train has 6 images to train on; set a smaller batch_size",
    ),
    "too many parts": (
        lambda: tuned(accumulate=5), SettingError,
        "finetune.batch_size is 4: 1 ranks with accumulate=5 need at least 5",
    ),
    "diverged": (
        lambda: require_directions(torch.tensor([[0.0, 0.0], [1.0, 2.0]])), DataError,
        f"features of 1 of 2 images {DIVERGED}",
    ),
    "shapes of features": (
        lambda: of(torch.ones(3), torch.zeros(2, dtype=torch.int64)), ShapeError,
        "features have shape (3,), labels (2,); expected (N, F), (N,)",
    ),
    "types of features": (
        lambda: of(torch.ones(3, 2).double(), torch.zeros(3, dtype=torch.int64)), ShapeError,
        "features are torch.float64, labels torch.int64; expected torch.float32 and torch.int64",
    ),
    "no features": (
        lambda: of(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64)), DataError,
        "there are no features; expected one sample and one value at least",
    ),
    "no class": (lambda: features(labels=[0, -1, 1, 1]), DataError, "label -1 is no class; expected 0 or more"),
    "widths": (
        lambda: check_same_task(features(width=2), features(width=3)), ShapeError,
        "train features are 2 wide, test features 3; embed both with the same encoder",
    ),
    "classes of test": (
        lambda: check_same_task(features(), features(labels=[0, 5, 7, 5])), DataError,
        "test images are of classes that no train image has (2): 5, 7; prepare both from folders of the same "
        "class names",
    ),
    "kept features": (
        kept, DataError,
        "features/....safetensors cannot be read (DataError); remove it, features are then made anew",
    ),
    "long and thin": (
        lambda: centre_view(Image.new("RGB", (60000, 1)), 64, 1.0), DataError,
        "60000 x 1 pixels, too long and thin: 3840000 x 64 when resized, more than 89478485",
    ),
    "full device": (
        embedded_on_a_full_device, DeviceFullError,
        "the device has too little memory for embed.batch_size 64 (CUDA out of memory); try embed.batch_size=32",
    ),
    "embedder": (
        lambda: embedded(class_folders(Path("images"), range(4)), torch.ones(3)), ShapeError,
        "the embedder returned shape (3,) for 4 images, expected (B, F)",
    ),
    "nothing to embed": (
        lambda: embedded(broken_folders()), DataError,
        "none of the 2 images of images can be read; prepare the shards again",
    ),
    "no label": (
        lambda: embedded(write_tar(Path("a.tar"), {"lonely.png": png(image(0, 0))})), DataError,
        "shard a.tar: image 'lonely' has no label; put images into one folder per class and run `milan-pipe prepare`, "
        "or add a .cls member with the class index",
    ),
    "neighbours": (
        lambda: knn_accuracy(features(), features(), KnnSettings(neighbours=(20, 30))), SettingError,
        "knn.neighbours asks for 20 and more, the train set has 4 images; give a smaller number",
    ),
    "probe of one class": (
        lambda: probe([3, 3, 3, 3]), DataError,
        "all train images are of class 3; a linear probe needs two classes at least",
    ),
    "nothing to hold out": (
        lambda: probe([0, 1, 2, 3]), DataError,
        "every class has one train image, none can be held out to choose linear_probe.l2; give one l2, or more images",
    ),
    "folder of results": (
        lambda: linear_probe("random", "a", "b", keep=f"{file('taken')}/k"), StoreError,
        "taken/k cannot be made: Not a directory; name another folder with --keep, which `milan-pipe report` is then "
        "given with --evaluations",
    ),
    "no result": (
        lambda: read_evaluations(Path(file("kept/knn-1.json", '{"version": 7}')).parent), DataError,
        "kept/knn-1.json is no result that `milan-pipe knn`, `linear-probe` or `segment-probe` kept (another version); "
        "remove it, and run them again",
    ),
    "a run as results": (
        lambda: read_evaluations(Path(file("run/report.json", '{"loss": 1}')).parent), DataError,
        "run/report.json is no result that `milan-pipe knn`, `linear-probe` or `segment-probe` kept (it has no "
        "'version'); name a folder that they were given with --keep; what a run keeps of its own is found without",
    ),
    "class lists": (
        lambda: segmented(val="other"), MismatchError,
        "TRAIN and VAL have different class lists: own 2 classes (a, b), other 2 classes (b, a)",
    ),
    "unknown classes": (
        lambda: segmented(classes=None), SettingError,
        "the classes of own are not known; set segment.classes to a file with their names, one a line, or to their "
        "number, or put a classes.txt beside the folders",
    ),
    "too many classes to segment": (
        lambda: segmented(classes="a\n" * 65_537),
        SettingError,
        "there are 65537 classes, expected 2 to 65536; set segment.classes",
    ),
    "one class to segment": (
        lambda: segmented(classes="a\n"), SettingError, "there is one class, 'a'; a segmentation needs two at least",
    ),
    "ratio": (
        lambda: segmented(ratio=(2.0, 1.0)), SettingError,
        "segment.ratio is the least and the greatest resizing, above 0, found (2.0, 1.0)",
    ),
    "no pixel": (
        lambda: segmented(mask=255), DataError,
        "not one pixel of own has a class; check its masks and segment.ignore_index",
    ),
    "blocks": (
        lambda: segmented(blocks=(0, 1, 2, 99)), SettingError,
        "segment.blocks is [0, 1, 2, 99], expected four block numbers, not falling, from 0 to ..., as [...]",
    ),
    "no masks": (
        lambda: segment_probed(masks=False), MissingError,
        "4 of the 4 images of own.tar have no mask, as '0000'; expected a member 0000.mask.png beside each image",
    ),
    "a single patch": (
        lambda: segment_probed(f"timm:local-dir:{timm_folder(Path('model'), 'map')}"), DataError,
        "timm:local-dir:model has a grid of 1 x 1 patches; segment-probe needs two at least",
    ),
    "small bank": (
        lambda: segment_probed(bank=9, neighbours=10), SettingError,
        "segment_probe.neighbours asks for 10, the bank has 9 patches; give a smaller number, or a larger "
        "segment_probe.bank",
    ),
    "memory of a probe": (
        lambda: segment_probed(memory_gb=2e-6), SettingError,
        "features and masks of 4 images of TRAIN take ... KB, segment_probe.memory_gb is 2e-06; set "
        "segment_probe.images=1, or raise memory_gb",
    ),
    "one image a rank": (
        lambda: segmented(batch_size=1), SettingError,
        "segment.batch_size is 1: 1 ranks with accumulate=1 need at least 2; the batch norms of UperNet need two "
        "images at a time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_messages(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(case)


@pytest.mark.parametrize("text", ['{"key": "a}\n{"key": "b"}\n', "[]\n", "\xff\n", '{"k": 1}\n', "[" * 100_000])
def test_a_damaged_list_of_bad_images_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad_samples.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"is damaged .*; remove it, and the run lists them anew"):
        BadImages(tmp_path / "bad_samples.jsonl")


@given(st.data())
def test_a_list_of_bad_images_cut_anywhere_is_gone_on_with(data: st.DataObject) -> None:
    added = [("a", "\u00e9"), ("b\n", "empty file"), ("c", "d")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "bad_samples.jsonl")

        def run() -> None:
            bad = BadImages(file)
            for key, reason in added:
                bad.add(key, reason)

        run()
        whole = file.read_bytes()
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        run()
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"version": 1, "task": 5}', '{"version": 1, "scores": {"a": []}}']
)
def test_a_kept_result_of_another_form_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "knn-1.json").write_text(text)
    with pytest.raises(DataError, match="is no result that"):
        read_evaluations(tmp_path)
