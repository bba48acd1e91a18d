"""Segmentation: scores by hand, windows and scales, masks that are wrong, and one run however it is broken up."""

from __future__ import annotations

import itertools
import json
import os
import struct
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import processes
from support.images import TINY, image, labelled_shard, mask, mask_folders, png
from support.training import StopAtError, killed_until_done, stop_at

from milan_pipe.api import segment
from milan_pipe.config.evaluation import SegmentSettings
from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import Params
from milan_pipe.errors import DataError, LabelError, MilanError, MismatchError, MissingError, SettingError
from milan_pipe.evaluation import sliding
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.masks import rule_and_names
from milan_pipe.evaluation.miou import class_scores, confusion, segmentation_scores
from milan_pipe.evaluation.segment import SegmentObjective
from milan_pipe.evaluation.segment_views import PADDING
from milan_pipe.evaluation.sliding import (
    predict,
    resized_strip,
    scaled_size,
    sliding_logits,
    strips,
    window_starts,
)
from milan_pipe.evaluation.supervised import ImageBatch
from milan_pipe.evaluation.upernet import UperNet, build_upernet, default_blocks
from milan_pipe.images.masked import MaskRule, decode_mask, masked_images, read_classes
from milan_pipe.images.prepare import prepare
from milan_pipe.images.scenes import MASK_CLASSES, render_scene
from milan_pipe.student.pixels import normalise
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.training.optim import polynomial_lr

CPU = torch.device("cpu")

# --- scores -------------------------------------------------------------------------------------------------------


def test_confusion_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix

    predicted, truth = torch.randint(0, 7, (31, 17)), torch.randint(-1, 7, (31, 17))
    known = truth >= 0
    expected = confusion_matrix(truth[known], predicted[known], labels=range(7))
    assert confusion(predicted, truth, 7).tolist() == expected.tolist()


def test_scores_of_a_confusion_matrix_made_by_hand() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, -1, -1], [0, 3, 3, -1]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0], [0, 3, 0, 3]])
    counts = confusion(predicted, truth, 5)
    by_hand = [[3, 1, 0, 0, 0], [1, 2, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert counts.tolist() == by_hand
    # IoU: 3/6, 2/4, 1/2; classes 2 and 4 neither are there nor were predicted where pixels count.
    assert segmentation_scores(counts) == pytest.approx(
        {"miou": 0.5, "aacc": 6 / 9, "macc": (3 / 4 + 2 / 3 + 1 / 2) / 3}
    )
    table = class_scores(counts, "abcde")
    assert [row["iou"] for row in table] == [0.5, 0.5, None, 0.5, None]
    assert [row["pixels"] for row in table] == [4, 3, 0, 2, 0]


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    counts = confusion(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    assert segmentation_scores(counts) == {"miou": 0.25, "aacc": 0.5, "macc": 0.5}
    assert class_scores(counts, "ab")[1]["acc"] is None


# --- windows and scales -------------------------------------------------------------------------------------------


def classify(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Logits that depend on place and neighbours, as a network's do."""
    kernel = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, pixels_BCHW.shape[-1])
    return torch.nn.functional.conv2d(pixels_BCHW, kernel, padding=2) + ramp


def test_a_window_over_the_whole_image_is_the_image() -> None:
    pixels = torch.randn(3, 16, 16)
    assert torch.equal(sliding_logits(classify, [pixels], 16, 11, 4)[0], classify(pixels[None])[0])


@given(height=st.integers(1, 40), width=st.integers(1, 40), window=st.integers(4, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_pixel_and_stay_inside(height: int, width: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    for length in (height, width):
        starts = window_starts(length, window, stride)
        seen = {place for start in starts for place in range(start, start + window)}
        assert seen >= set(range(length))
        assert max(starts) + window == max(length, window)
        assert all(second - first <= stride for first, second in itertools.pairwise(starts))
    asked: list[int] = []

    def constant(windows: torch.Tensor) -> torch.Tensor:
        asked.append(len(windows))
        assert windows.shape[1:] == (3, window, window)
        return torch.ones(len(windows), 2, window, window)

    sizes = (height, width), (width, 1)
    logits = sliding_logits(constant, [torch.zeros(3, *size) for size in sizes], window, stride, 3)
    assert all(torch.equal(one, torch.ones(2, *size)) for one, size in zip(logits, sizes, strict=True))
    assert max(asked) <= 3
    assert set(asked[:-1]) <= {3}  # windows of one image and of the next are one batch


def test_windows_of_a_coarse_type_are_summed_in_float32() -> None:
    def third(windows: torch.Tensor) -> torch.Tensor:
        return torch.full((len(windows), 1, 4, 4), 100.5, dtype=torch.bfloat16)

    (logits,) = sliding_logits(third, [torch.zeros(3, 4, 40)], 4, 1, 64)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.full((1, 4, 40), 100.5))


@pytest.mark.parametrize("over_all", [False, True])
def test_the_loss_is_a_mean_over_pixels(over_all: bool) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images_BCHW, images_BCHW.flip(1)

    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(-1, 3, (2, 4, 4), dtype=torch.int32)
    loss = SegmentObjective(Fixed(), 0.4, over_all)(ImageBatch(logits, mask), 0)
    mean = torch.nn.CrossEntropyLoss(ignore_index=-1)
    expected = mean(logits, mask.long()) + 0.4 * mean(logits.flip(1), mask.long())
    share = (mask >= 0).float().mean() if over_all else 1.0
    torch.testing.assert_close(loss, expected * share)


def test_what_lies_outside_of_an_image_is_nearly_zero_once_normalised() -> None:
    pixels = torch.tensor(PADDING, dtype=torch.uint8).expand(1, 2, 2, 3)
    assert normalise(pixels).abs().max() < 0.01


def test_windows_are_averaged_where_they_overlap() -> None:
    number = iter([[1.0, 2.0, 5.0]])

    def by_window(windows: torch.Tensor) -> torch.Tensor:
        return torch.tensor(next(number))[:, None, None, None].expand(len(windows), 1, 4, 4)

    (logits,) = sliding_logits(by_window, [torch.zeros(3, 4, 9)], 4, 3, 4)
    assert logits[0, 0].tolist() == [1, 1, 1, 1.5, 2, 3.5, 3.5, 5, 5]


SIZES = [(20, 31), (16, 16), (9, 40)]
PREDICT = {"window": 16, "stride": 11, "short": 16, "device": CPU, "batch": 4}


def noise_image(*size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_one_scale_is_single_scale(size: tuple[int, int]) -> None:
    image = noise_image(*size)
    (single,) = predict(classify, [image], scales=(1.0,), flip=False, **PREDICT)
    height, width = scaled_size(size, 16, 64)
    scaled = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    (logits,) = sliding_logits(classify, [normalise(torch.from_numpy(scaled)[None])[0]], 16, 11, 4)
    by_hand = torch.nn.functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    assert single.shape == size
    assert torch.equal(single, by_hand.argmax(0))
    assert torch.equal(predict(classify, [image], scales=(1.0, 1.0), flip=False, **PREDICT)[0], single)
    several = {"scales": (0.5, 1.0, 1.5), "flip": True, **PREDICT}
    (both,) = predict(classify, [image], **several)
    (mirrored,) = predict(lambda windows: classify(windows.flip(-1)).flip(-1), [image], **several)
    # A sum over both mirrors does not know which of them came first, up to the place of padding and windows.
    assert (both == mirrored).float().mean() > 0.8


@given(sides=st.tuples(*[st.integers(1, 30)] * 4), most=st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_strips_are_the_whole_resized(sides: tuple[int, int, int, int], most: int) -> None:
    height, width, *size = sides
    logits = torch.randn(3, height, width, generator=torch.Generator().manual_seed(sum(sides)))
    whole = torch.nn.functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    found = torch.full_like(whole, torch.nan)
    for strip in strips(3, (size[0], size[1]), most):
        part = resized_strip(logits, (size[0], size[1]), strip)
        assert part.numel() <= max(most, 3 * min(size))
        assert found[:, *strip].isnan().all()
        found[:, *strip] = part
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [*SIZES, (300, 40), (40, 300)])
def test_an_image_in_strips_is_predicted_as_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"scales": (0.5, 1.0, 1.5), "flip": True, **PREDICT}
    (whole,) = predict(classify, [noise_image(*size)], **ways)
    monkeypatch.setattr(sliding, "strips", partial(strips, most=500))
    (cut,) = predict(classify, [noise_image(*size)], **ways)
    assert torch.equal(cut, whole)


def test_memory_is_bounded_by_the_models_size_and_not_by_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values that `interpolate` makes at a time, and of scores that are held at an image's size."""
    made: list[int] = []
    monkeypatch.setattr(sliding, "strips", partial(strips, most=10_000))
    interpolate, new_empty = torch.nn.functional.interpolate, torch.Tensor.new_empty

    def counted(given: torch.Tensor, **options: Any) -> torch.Tensor:
        made.append((found := interpolate(given, **options)).numel())
        return found

    def counted_empty(given: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made.append((found := new_empty(given, *size, **options)).numel())
        return found

    monkeypatch.setattr(torch.nn.functional, "interpolate", counted)
    monkeypatch.setattr(torch.Tensor, "new_empty", counted_empty)
    for size in ((1000, 900), (2000, 5), (5, 20_000)):
        (found,) = predict(classify, [noise_image(*size)], scales=(1.0,), flip=True, **PREDICT)
        assert found.shape == size
    assert 5_000 < max(made) <= 10_000


def test_images_together_are_predicted_as_alone() -> None:
    images = [noise_image(*size) for size in SIZES]
    together = predict(classify, images, scales=(0.5, 1.0), flip=True, **PREDICT)
    alone = [predict(classify, [image], scales=(0.5, 1.0), flip=True, **PREDICT)[0] for image in images]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_polynomial_decay() -> None:
    rates = [polynomial_lr(step, steps=10, warmup_steps=2, peak=1.0) for step in range(10)]
    assert rates == pytest.approx([0, 0.45, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


# --- the model ----------------------------------------------------------------------------------------------------


def upernet(**change: Any) -> UperNet:
    student = TINY.model_copy(update={"depth": 4})
    return build_upernet(backbone_of("random", student, 0), SegmentSettings(channels=8, **change), classes=5, seed=1)[1]


def test_the_published_blocks() -> None:
    assert default_blocks(12) == (3, 5, 7, 11)
    assert default_blocks(24) == (7, 11, 15, 23)
    assert default_blocks(4) == (0, 1, 2, 3)


@pytest.mark.parametrize("blocks", [None, (0, 1, 1, 2)])
def test_every_parameter_of_upernet_gets_a_gradient(blocks: tuple[int, ...] | None) -> None:
    model = upernet(blocks=blocks).train()
    logits, auxiliary = model(torch.randn(4, 3, 16, 16))
    assert auxiliary is not None
    assert logits.shape == auxiliary.shape == (4, 5, 16, 16)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # A bias before a batch norm moves nothing that comes after it.
    assert all(name in ("pyramid.four_times.0.bias",) for name in lacking), lacking
    assert all(p.grad is not None for p in model.parameters())


def test_the_pyramid_has_four_strides() -> None:
    model = upernet(crop=24)
    levels = model.pyramid([torch.randn(1, 16, 6, 6)] * 4)
    assert [tuple(level.shape[-2:]) for level in levels] == [(24, 24), (12, 12), (6, 6), (3, 3)]
    assert model.eval()(torch.randn(1, 3, 24, 24))[0].shape == (1, 5, 24, 24)


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(SettingError, match="four block numbers"):
        upernet(blocks=(0, 1, 2, 4))


# --- masks --------------------------------------------------------------------------------------------------------

RULE = MaskRule(classes=3, ignore_index=255, zero_is_ignored=False)


def grey_png(values: np.ndarray[Any, Any], bits: int) -> bytes:
    """Grey in so many bits a pixel, which Pillow does not write."""
    rows = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :].ravel() for row in values]
    packed = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    height, width = values.shape
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(packed)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_masks_of_every_kind() -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8)
    expected = [[0, 1], [2, -1]]
    palette = Image.fromarray(values, "P")
    palette.putpalette([7] * 768)
    kinds = [
        Image.fromarray(values),
        palette,
        Image.fromarray(values.astype(np.uint16)),
        Image.fromarray(values.astype(np.int32)),
    ]
    for kind in kinds:
        file = __import__("io").BytesIO()
        kind.save(file, "TIFF" if kind.mode == "I" else "PNG")
        assert decode_mask(file.getvalue(), RULE, (2, 2), "k").tolist() == expected, kind.mode
    many = MaskRule(classes=16, ignore_index=255, zero_is_ignored=False)
    for bits in (1, 2, 4, 8):
        # Of less than 8 bits Pillow makes 0 to 255.
        indices = np.array([[0, 1], [2**bits // 2, 2**bits - 1]]) % 16
        assert decode_mask(grey_png(indices, bits), many, (2, 2), "k").tolist() == indices.tolist(), bits
    ade = MaskRule(classes=2, ignore_index=255, zero_is_ignored=True)
    assert decode_mask(png(values), ade, (2, 2), "k").tolist() == [[-1, 0], [1, -1]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.zeros((2, 2, 3), np.uint8)), r"mask of 'k' has colours \(mode RGB\), expected one channel"),
        (png(np.zeros((3, 2), np.uint8)), r"mask of 'k' has 3 x 2 pixels, its image 2 x 2"),
        (png(np.full((2, 2), 7, np.uint8)), r"mask of 'k' has value 7 in 4 pixels, expected 0 to 2, or 255"),
        (b"no image", r"mask of 'k' cannot be decoded"),
        (png(np.zeros((2, 2), np.uint8))[:-32], r"mask of 'k' cannot be decoded"),
    ],
)
def test_masks_that_are_wrong(data: bytes, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        decode_mask(data, RULE, (2, 2), "k")


def test_scenes_come_with_their_masks(tmp_path: Path) -> None:
    prepare("demo", tmp_path / "images", PrepareSettings(train_scenes=3, test_scenes=1), workers=1)
    images = masked_images(str(tmp_path / "images" / "train-*.tar"), "train", lambda *_: None)
    assert images.classes == MASK_CLASSES
    assert len(images.classes) == 22
    rule = MaskRule(classes=22, ignore_index=255, zero_is_ignored=False)
    for number in range(3):
        found = decode_mask(images.mask(number), rule, (64, 64), "k")
        assert np.array_equal(found, render_scene(0, number).segmentation)


def ade20k(root: Path) -> Path:
    """ADE20K's own layout, with 0 for no class."""
    for part, numbers in (("training", range(12)), ("validation", range(50, 54))):
        mask_folders(root / "images" / part, root / "annotations" / part, numbers, shift=1)
    return root


def test_every_layout_is_found(tmp_path: Path) -> None:
    root = ade20k(tmp_path / "ade")
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall, stuff\n2\t0.1\tsky\n")
    by_root = masked_images(root, "val", lambda *_: None)
    by_split = masked_images(root / "images" / "validation", "val", lambda *_: None)
    by_pair = masked_images(f"{root}/images/validation,{root}/annotations/validation", "val", lambda *_: None)
    assert by_root.keys == by_split.keys == by_pair.keys == [f"{number:04d}" for number in range(50, 54)]
    assert by_root.zero_is_ignored
    assert by_split.zero_is_ignored
    assert not by_pair.zero_is_ignored
    assert by_root.classes == ("wall", "sky")
    mask_folders(tmp_path / "own" / "images", tmp_path / "own" / "masks", range(2))
    assert masked_images(tmp_path / "own", "train", lambda *_: None).classes is None
    (tmp_path / "own" / "classes.txt").write_text("left\nright\n")
    assert masked_images(tmp_path / "own", "train", lambda *_: None).classes == ("left", "right")


@pytest.mark.parametrize("classes", [0, 65_537, 10**12])
def test_a_number_of_classes_that_no_mask_has(tmp_path: Path, classes: int) -> None:
    mask_folders(tmp_path / "images", tmp_path / "masks", range(1))
    images = masked_images(tmp_path, "train", lambda *_: None)
    with pytest.raises(SettingError, match=f"there are {classes} classes, expected 2 to 65536; set segment.classes"):
        rule_and_names(images, images, SegmentSettings(classes=classes))


def test_splits_by_their_short_names(tmp_path: Path) -> None:
    for part, numbers in (("train", range(3)), ("val", range(5, 7))):
        mask_folders(tmp_path / "images" / part, tmp_path / "masks" / part, numbers)
    assert list(masked_images(tmp_path, "train", lambda *_: None).keys) == ["0000", "0001", "0002"]
    val = masked_images(tmp_path, "val", lambda *_: None)
    assert list(val.keys) == ["0005", "0006"]
    assert not val.zero_is_ignored


def test_a_folder_with_one_half_alone_is_not_taken_whole(tmp_path: Path) -> None:
    for part in ("training", "holdout"):
        mask_folders(tmp_path / "images" / part, tmp_path / "masks" / part, range(3))
    assert len(masked_images(tmp_path, "train", lambda *_: None)) == 3
    with pytest.raises(MissingError, match=r"have training/ and no validation/ or val/ or valid/ or test/; name the"):
        masked_images(tmp_path, "val", lambda *_: None)
    assert len(masked_images(tmp_path / "images" / "holdout", "val", lambda *_: None)) == 3


def test_masks_of_two_kinds_are_not_read_by_one_rule(tmp_path: Path) -> None:
    train = masked_images(ade20k(tmp_path / "ade"), "train", lambda *_: None)
    mask_folders(tmp_path / "own" / "images", tmp_path / "own" / "masks", range(2))
    val = masked_images(tmp_path / "own", "val", lambda *_: None)
    for sides in ((train, val), (val, train)):
        with pytest.raises(
            MismatchError, match=r"0 is no class in .*ade, .* and the first class in .*own; set segment"
        ):
            rule_and_names(*sides, SegmentSettings(classes=2))
        assert rule_and_names(*sides, SegmentSettings(classes=2, reduce_zero_label=True))[0].zero_is_ignored


@pytest.mark.parametrize("twice", ["images/0001.png", "masks/0001.bmp"])
def test_two_files_of_one_key_are_refused(tmp_path: Path, twice: str) -> None:
    mask_folders(tmp_path / "images", tmp_path / "masks", range(3))
    (tmp_path / twice).write_bytes(png(mask(1)))
    with pytest.raises(DataError, match=r"0001\.\w+ and 0001\.\w+ differ in their suffix alone"):
        masked_images(tmp_path, "train", lambda *_: None)


def test_a_image_without_a_mask(tmp_path: Path) -> None:
    mask_folders(tmp_path / "images", tmp_path / "masks", range(3))
    (tmp_path / "masks" / "0001.png").unlink()
    with pytest.raises(MissingError, match="as 0001"):
        masked_images(tmp_path, "train", lambda *_: None)
    with pytest.raises(MissingError, match="IMAGES,MASKS"):
        masked_images(_made(tmp_path / "nothing"), "train", lambda *_: None)
    shard = labelled_shard(tmp_path / "s" / "a.tar", range(2))
    with pytest.raises(MissingError, match="as '0000'"):
        masked_images(shard, "train", lambda *_: None)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_classes(tmp_path / "empty.txt")
    (tmp_path / "names.json").write_text('["left", "right"]')
    assert read_classes(tmp_path / "names.json") == ("left", "right")
    (tmp_path / "names.json").write_text('["left\\ud800"]')
    with pytest.raises(DataError, match="surrogates not allowed"):
        read_classes(tmp_path / "names.json")
    (tmp_path / "names.txt").write_bytes("\ufeffleft \u2028 hand\r\nright\n".encode())
    assert read_classes(tmp_path / "names.txt") == ("left \u2028 hand", "right")
    (tmp_path / "names.json").write_text('{"left": 0}')
    with pytest.raises(DataError, match="expected a list of names"):
        read_classes(tmp_path / "names.json")
    with pytest.raises(MissingError, match="one name a line"):
        read_classes(tmp_path / "missing.txt")
    (tmp_path / "large.txt").write_bytes(b"\n" * (2**24 + 1))
    with pytest.raises(DataError, match=r"large\.txt cannot be read: larger than 16 MiB"):
        read_classes(tmp_path / "large.txt")


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    mask_folders(tmp_path / "images", tmp_path / "masks", range(3))
    for path in (tmp_path / "images" / "0000.jpg", tmp_path / "masks" / "0001.png", tmp_path / "names.txt"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    (tmp_path / "images" / "0002.jpg").unlink()
    (tmp_path / "images" / "0002.jpg").symlink_to("/dev/zero")
    found = masked_images(tmp_path, "train", lambda *_: None)
    for read in (lambda: found.image(0), lambda: found.mask(1), lambda: found.image(2)):
        with pytest.raises(DataError, match="not a regular file"):
            read()
    with pytest.raises(DataError, match="not a regular file"):
        read_classes(tmp_path / "names.txt")


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    labelled_shard(folder / "train-0.tar", range(24), masks=True)
    labelled_shard(folder / "val-0.tar", range(100, 106), masks=True)
    return folder


def go(shards: Path, run: Path, **change: Any) -> Any:
    listener = change.pop("on_progress", lambda _: None)
    recipe = {"steps": 12, "warmup_steps": 2, "batch_size": 8, "lr": 0.01, "channels": 8, "classes": 2}
    recipe |= {"log_every": 1, "eval_every": 5, "drop_path": 0.1}
    return segment(
        change.pop("checkpoint", "random"),
        change.pop("train", str(shards / "train-*.tar")),
        change.pop("val", str(shards / "val-*.tar")),
        run,
        Params(student=TINY.model_copy(update={"depth": 4}), segment=SegmentSettings(**{**recipe, **change})),
        on_progress=listener,
    )


def curve(run: Path) -> dict[str, list[list[str]]]:
    metrics = run / "metrics" / "plots" / "metrics"
    return {
        name: [line.split("\t")[1:] for line in (metrics / f"{name}.tsv").read_text().splitlines()]
        for name in ("train/loss", "val/miou")
    }


def assert_same(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    left, right = open_checkpoint(run).weights("model"), open_checkpoint(whole).weights("model")
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert (run / "per_class.json").read_bytes() == (whole / "per_class.json").read_bytes()


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    go(shards, run)
    return run


def test_it_learns_what_is_bright(shards: Path, tmp_path: Path) -> None:
    report = go(shards, tmp_path / "run", steps=40, scales=(0.75, 1.0), stride=8)
    assert report.scores["aacc"] > 0.8
    assert report.scores["ms_aacc"] > 0.8
    assert {"ms_miou", "ms_aacc", "ms_macc"} <= report.scores.keys()
    table = json.loads((tmp_path / "run" / "per_class.json").read_text())
    assert [row["name"] for row in table] == ["class 0", "class 1"]
    assert report.scores["miou"] == pytest.approx(np.mean([row["iou"] for row in table]))
    assert sum(row["pixels"] for row in table) == sum(int((mask(number) != 255).sum()) for number in range(100, 106))
    with Image.open(tmp_path / "run" / "images" / "step-00000040.png") as sheet:
        assert sheet.width > 600


@pytest.mark.parametrize("every", [1, 4])
def test_a_broken_run_ends_as_the_whole_one(shards: Path, whole: Path, tmp_path: Path, every: int) -> None:
    for step in (5, 10):
        with pytest.raises(StopAtError):
            go(shards, tmp_path / "run", checkpoint_every=every, on_progress=stop_at(step))
    assert go(shards, tmp_path / "run", checkpoint_every=every, workers=1).resumed_from >= 8
    assert_same(tmp_path / "run", whole)


def test_ade20k_as_it_is_unpacked(tmp_path: Path) -> None:
    root = ade20k(tmp_path / "ade")
    report = go(tmp_path, tmp_path / "run", train=root, val=root, steps=2, classes=None)
    assert len(json.loads((tmp_path / "run" / "per_class.json").read_text())) == 150
    assert 0 <= report.scores["miou"] <= 1
    assert open_checkpoint(tmp_path / "run").record["configuration"]["data"]["rule"]["zero_is_ignored"] is True


@pytest.mark.ci
def test_killed_at_random_instants(shards: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "milan_pipe",
        "segment",
        "random",
        str(shards / "train-*.tar"),
        str(shards / "val-*.tar"),
    ]
    given_ = {
        **{f"student.{name}": value for name, value in TINY.model_dump(exclude={"model"}).items()},
        **{"segment.steps": 24, "segment.batch_size": 8, "segment.channels": 8, "segment.classes": 2},
        **{"segment.checkpoint_every": 3, "segment.eval_every": 8, "segment.log_every": 1},
    }
    settings_ = [word for name, value in given_.items() for word in ("--set", f"{name}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [tmp_path / name for name in ("whole", "run")]
    processes.run([*words, str(runs[0]), *settings_], check=True, capture_output=True, env=environment)
    killed_until_done([*words, str(runs[1]), *settings_], runs[1], kills=2, seed=2)
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"classes": "no.txt"}, MissingError, r"class list no.txt is not there"),
        ({"crop": 18}, SettingError, "no multiple of the patch"),
        ({"train": "nowhere"}, MissingError, "nowhere is not there"),
    ],
)
def test_mistakes_are_one_line(
    shards: Path, tmp_path: Path, change: dict[str, Any], kind: type[MilanError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        go(shards, tmp_path / "run", **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_mask_stops_the_run(shards: Path, tmp_path: Path, workers: int) -> None:
    mask_folders(tmp_path / "images", tmp_path / "masks", range(16))
    (tmp_path / "masks" / "0003.png").write_bytes(png(np.full(image(3, 0).shape[:2], 9, np.uint8)))
    with pytest.raises(LabelError, match="has value 9"):
        go(shards, tmp_path / "run", train=tmp_path, workers=workers)


def test_other_class_lists(shards: Path, tmp_path: Path) -> None:
    for name, classes in (("one", "a\nb\n"), ("two", "b\na\n")):
        mask_folders(tmp_path / name / "images", tmp_path / name / "masks", range(8))
        (tmp_path / name / "classes.txt").write_text(classes)
    with pytest.raises(MismatchError, match="different class lists"):
        go(shards, tmp_path / "run", train=tmp_path / "one", val=tmp_path / "two", classes=None)
