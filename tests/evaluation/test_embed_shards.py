"""Shards to features: the right pixels, the right order, and no image lost without a word."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import write_tar
from torch import Tensor

from milan_pipe.config.evaluation import EmbedSettings
from milan_pipe.config.images import MAX_PIXELS, ImageSettings
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import DataError, MissingError, ShapeError
from milan_pipe.evaluation.backbone import Backbone, backbone_of, pooled
from milan_pipe.evaluation.features import (
    LabelledFeatures,
    centre_view,
    check_same_task,
    embed_shards,
    tokens_of,
)
from milan_pipe.student.encoder import encode_all

SIZE = 8


def noise(seed: int, height: int = 10, width: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def labelled(first: int, count: int) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members[f"{number:04d}.png"] = png(noise(number, 9 + number % 4, 9 + number % 7))
        members[f"{number:04d}.cls"] = str(number % 3).encode()
    return members


def raw(pixels_BHWC: Tensor) -> Tensor:
    assert pixels_BHWC.dtype == torch.uint8
    assert pixels_BHWC.shape[1:] == (SIZE, SIZE, 3)
    return pixels_BHWC.flatten(1).double()


def tiny() -> Backbone:
    return backbone_of("random", StudentSettings(image_size=SIZE, patch_size=4, width=16, depth=1, heads=2), 0)


# --- the pixels


def torchvision_view(image: Image.Image, size: int, crop: float) -> np.ndarray:
    transforms = pytest.importorskip("torchvision.transforms")
    resize = transforms.Resize(int(size / crop), transforms.InterpolationMode.BICUBIC)
    return np.asarray(transforms.CenterCrop(size)(resize(image)))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 31), (31, 20), (5, 17), (64, 9), (6, 6)])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
def test_centre_view_is_that_of_torchvision(height: int, width: int, crop: float) -> None:
    image = noise(height * width, height, width)
    np.testing.assert_array_equal(centre_view(image, 8, crop), torchvision_view(image, 8, crop))


def test_centre_of_a_image_of_the_right_height_is_cut_out_unchanged() -> None:
    image = noise(1, SIZE, 20)
    np.testing.assert_array_equal(centre_view(image, SIZE, 1.0), np.asarray(image)[:, 6 : 6 + SIZE])
    np.testing.assert_array_equal(
        centre_view(image.rotate(90, expand=True), SIZE, 1.0), np.asarray(image.rotate(90, expand=True))[6 : 6 + SIZE]
    )


def test_centre_view_with_pillow_alone() -> None:
    image = noise(2, 30, 50)
    reference = image.resize((26, 16), Image.Resampling.BICUBIC).crop((9, 4, 17, 12))
    np.testing.assert_array_equal(centre_view(image, 8, 0.5), np.asarray(reference))


def test_a_thread_of_a_image_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(DataError, match="too long and thin"):
        centre_view(Image.new("RGB", (MAX_PIXELS // 64 // 64 + 64, 1)), 64, 1.0)


# --- shards


def test_features_labels_and_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", labelled(7, 4))
    write_tar(tmp_path / "a.tar", labelled(0, 7))
    seen: list[int] = []
    found = embed_shards(tmp_path, raw, SIZE, EmbedSettings(batch_size=3, threads=2, crop=0.8), on_progress=seen.append)
    expected = [centre_view(noise(n, 9 + n % 4, 9 + n % 7), SIZE, 0.8).ravel() for n in range(11)]
    np.testing.assert_array_equal(found.features_NF.numpy(), np.stack(expected))
    assert found.features_NF.dtype == torch.float32
    assert not found.features_NF.is_inference()
    assert found.label_N.tolist() == [n % 3 for n in range(11)]
    assert seen == [3, 6, 9, 11]


def test_threads_do_not_change_the_result(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", labelled(0, 70))
    tokens = tokens_of(tiny(), torch.device("cpu"))

    def embedder(pixels_BHWC: torch.Tensor) -> torch.Tensor:
        return pooled(tokens(pixels_BHWC), "mean")

    one, four = (embed_shards(shard, embedder, SIZE, EmbedSettings(batch_size=16, threads=n)) for n in (1, 4))
    assert torch.equal(one.features_NF, four.features_NF)
    assert torch.equal(one.label_N, four.label_N)


def test_no_more_images_are_read_ahead_than_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from milan_pipe.evaluation import features

    shard = write_tar(tmp_path / "a.tar", labelled(0, 120))
    begun = done = lead = 0
    plain = features.decode_image

    def counted(data: bytes, limits: ImageSettings) -> Image.Image:
        nonlocal begun
        begun += 1
        return plain(data, limits)

    def embedder(pixels_BHWC: Tensor) -> Tensor:
        nonlocal done, lead
        done += len(pixels_BHWC)
        lead = max(lead, begun - done)
        return raw(pixels_BHWC)

    monkeypatch.setattr(features, "decode_image", counted)
    embed_shards(shard, embedder, SIZE, EmbedSettings(batch_size=4, threads=1))
    assert begun == done == 120
    assert lead <= 32


def test_unreadable_images_are_skipped(tmp_path: Path) -> None:
    members = labelled(0, 5)
    members["0002.png"] = members["0002.png"][:60]
    members |= {"bad_label.png": png(noise(9)), "bad_label.cls": b"cat"}
    bad: list[str] = []
    shard = write_tar(tmp_path / "a.tar", members)
    found = embed_shards(shard, raw, SIZE, EmbedSettings(threads=1), on_bad=lambda key, _: bad.append(key))
    assert sorted(bad) == ["0002", "bad_label"]
    assert found.label_N.tolist() == [0, 1, 0, 1]
    assert len(embed_shards(shard, raw, SIZE, EmbedSettings(threads=1)).label_N) == 4


def test_a_image_without_label_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {**labelled(0, 2), "lonely.png": png(noise(5))})
    with pytest.raises(DataError, match="lonely"):
        embed_shards(shard, raw, SIZE, EmbedSettings(threads=1))


def test_nothing_readable(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.png": b"no image", "a.cls": b"0", "b.png": b"", "b.cls": b"1"})
    with pytest.raises(DataError, match="none of the 2 images"):
        embed_shards(shard, raw, SIZE, EmbedSettings(threads=1))
    with pytest.raises(MissingError):
        embed_shards(tmp_path / "absent", raw, SIZE, EmbedSettings())


def test_embedders_of_the_wrong_kind(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", labelled(0, 2))
    with pytest.raises(ShapeError, match="expected \\(B, F\\)"):
        embed_shards(shard, lambda pixels: pixels.float(), SIZE, EmbedSettings(threads=1))
    with pytest.raises(DataError, match="2 of 2 images"):
        embed_shards(shard, lambda pixels: raw(pixels) * torch.nan, SIZE, EmbedSettings(threads=1))


# --- the student


def test_pooled_takes_the_tokens_it_says() -> None:
    encoder = tiny().encoder()
    pixels_BHWC = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        tokens = encode_all(encoder, ((pixels_BHWC / 255 - mean) / std).permute(0, 3, 1, 2))
        found = tokens_of(tiny(), torch.device("cpu"))(pixels_BHWC)
    cls, patches = pooled(found, "cls"), pooled(found, "mean")
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 1:].mean(1))
    with pytest.raises(ShapeError, match="image_size"):
        tokens_of(tiny(), torch.device("cpu"))(pixels_BHWC[:, :4])


def test_tokens_are_deterministic_with_drop_path(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = tiny().encoder().train()
    encoder.blocks[0].drop_path1 = torch.nn.Dropout(0.5)
    monkeypatch.setattr(Backbone, "encoder", lambda _: encoder)
    tokens = tokens_of(tiny(), torch.device("cpu"))
    pixels_BHWC = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    assert torch.equal(tokens(pixels_BHWC), tokens(pixels_BHWC))


# --- the record


def test_labelled_features_are_checked() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(ShapeError, match="shape"):
        LabelledFeatures(features_NF=good, label_N=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="float64"):
        LabelledFeatures(features_NF=good.double(), label_N=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="no features"):
        LabelledFeatures(features_NF=good[:0], label_N=torch.zeros(0, dtype=torch.int64))
    for broken in (0.0, torch.nan, torch.inf):
        with pytest.raises(DataError, match="1 of 2 images"):
            LabelledFeatures(features_NF=good * torch.tensor([[1.0], [broken]]), label_N=torch.tensor([0, 1]))
    with pytest.raises(DataError, match="label -1"):
        LabelledFeatures(features_NF=good, label_N=torch.tensor([0, -1]))


def test_partners_must_fit() -> None:
    train = LabelledFeatures(features_NF=torch.ones(2, 3), label_N=torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="3 wide"):
        check_same_task(train, LabelledFeatures(features_NF=torch.ones(1, 4), label_N=torch.tensor([0])))
    with pytest.raises(DataError, match="no train image has"):
        check_same_task(train, LabelledFeatures(features_NF=torch.ones(3, 3), label_N=torch.tensor([7, 0, 5])))


@pytest.mark.ci
def test_transfer_sees_neither_teacher_nor_targets_nor_decoder() -> None:
    code = (
        "import sys, milan_pipe.evaluation.features, milan_pipe.evaluation.knn, milan_pipe.evaluation.linear_probe\n"
        "own = ('teacher', 'targets', 'extraction', 'student.decoder', 'student.model')\n"
        "banned = (*('milan_pipe.' + name for name in own), 'open_clip', 'zarr')\n"
        "seen = [m for m in sys.modules if m.startswith(banned)]\n"
        "sys.exit(', '.join(seen) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
