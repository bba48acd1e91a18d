"""What a teacher gives is looked at before it is stored: no shard is committed with targets that teach nothing."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError
from milan_pipe.extraction import run
from milan_pipe.extraction.worker import load_extraction_teacher
from milan_pipe.images.prepare import prepare
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard
from milan_pipe.targets.store import open_targets

# Three shards of four images, two views each, in batches of two: the eighth batch ends the second view of shard 000001.
CALL, ROW, SAMPLE, VIEW = 7, 0, 2, 1


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "images"
    prepare("demo", folder, PrepareSettings(train_scenes=12, test_scenes=0, samples_per_shard=4), workers=1)
    return folder


@pytest.fixture
def disturb(monkeypatch):
    """Let the real teacher's output pass through a function in its n-th batch."""

    def start(change, call=CALL):
        calls = iter(range(10_000))

        @torch.inference_mode()
        def hook(_module, _inputs, output):
            if next(calls) == call:
                change(output.features_BST, output.importance_BL)

        def load(params):
            teacher = load_extraction_teacher(params)
            teacher.register_forward_hook(hook)
            return teacher

        monkeypatch.setattr(run, "load_extraction_teacher", load)

    return start


def key_of(images, shard, row):
    return list(read_shard(expand_shards(images)[shard], lambda *_: None))[row].key


def set_feature(value):
    def change(features, _importance):
        features[ROW, 5, 3] = value
        features[ROW + 1, 5, 3] = value

    return change


def zero_token(features, _importance):
    features[ROW, 5] = 0
    features[ROW + 1] = 0


def scale(factor):
    def change(features, _importance):
        features[ROW] *= factor

    return change


def set_attention(value):
    def change(_features, importance):
        importance[ROW, 5] = value
        importance[ROW + 1, 5] = value

    return change


def no_attention(_features, importance):
    importance[ROW] = 0


CHANGES = {
    "feature no number": (set_feature(float("nan")), "features that are not finite"),
    "feature infinite": (set_feature(-float("inf")), "features that are not finite"),
    "zero token": (zero_token, "all zeros"),
    "attention no number": (set_attention(float("nan")), "attention that is not finite"),
    "attention infinite": (set_attention(float("inf")), "attention that is not finite"),
    "attention negative": (set_attention(-1e-3), "negative attention"),
    "attention zero": (no_attention, "zero for every patch"),
    "too small to keep": (scale(1e-9), "mean cosine of 0.0"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("codec", "name"),
    [*(("int8", name) for name in CHANGES), ("float16", "feature no number"), ("float16", "too small to keep")],
)
def test_shard_is_not_committed(name, codec, few, extract, disturb, tmp_path):
    change, message = CHANGES[name]
    disturb(change)
    with pytest.raises(DataError, match=message) as caught:
        extract(few, tmp_path / "t", codec=codec, batch_size=2)
    assert f"train-000001.tar: view {VIEW} of {key_of(few, 1, SAMPLE)}: " in str(caught.value)
    with pytest.warns(RuntimeWarning, match=r"2 of 3 shards"):
        store = open_targets(tmp_path / "t")
    assert store.shards == ("000000", "000002")
    assert not list((tmp_path / "t").glob(".*"))


def test_goes_on_with_a_sound_teacher(few, extract, disturb, tree, tmp_path, monkeypatch):
    disturb(no_attention)
    with pytest.raises(DataError, match="attention"):
        extract(few, tmp_path / "t", batch_size=2)
    monkeypatch.undo()
    extract(few, tmp_path / "whole", batch_size=2)
    assert extract(few, tmp_path / "t", batch_size=2).skipped == 2
    assert tree(tmp_path / "t") == tree(tmp_path / "whole")


def test_feature_that_a_codec_cannot_take_is_named(few, extract, disturb, tmp_path):
    disturb(scale(1e8))
    with pytest.raises(DataError, match="float16") as caught:
        extract(few, tmp_path / "t", codec="float16", batch_size=2)
    assert f"view {VIEW} of {key_of(few, 1, SAMPLE)}: " in str(caught.value)


def test_earlier_fault_is_reported_where_a_later_batch_cannot_be_encoded(few, extract, disturb, tmp_path):
    def change(features, importance):
        importance[ROW] = 0
        features[ROW + 1, 1, 1] = float("nan")

    disturb(change)
    with pytest.raises(DataError, match="zero for every patch") as caught:
        extract(few, tmp_path / "t", batch_size=2)
    assert f"view {VIEW} of {key_of(few, 1, SAMPLE)}: " in str(caught.value)


@pytest.mark.parametrize("change", [set_feature(float("nan")), zero_token], ids=["no number", "zero token"])
def test_klt_is_not_fitted_to_what_is_no_feature(change, few, extract, disturb, tmp_path):
    disturb(change, call=0)
    with pytest.raises(DataError, match=f"{key_of(few, 0, ROW)}: the teacher"):
        extract(few, tmp_path / "t", codec="klt", batch_size=2)
    assert not (tmp_path / "t").exists()


def test_klt_keeps_images_unlike_those_that_it_was_fitted_to(few, extract, tmp_path):
    """The limit of fidelity is for what is broken, not for what is rare."""
    rng = np.random.default_rng(0)
    rare = [np.full((64, 64, 3), grey, np.uint8) for grey in (0, 128, 255)]
    rare += [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    (tmp_path / "images").mkdir()
    for name in ("train-000000.tar", "train-000001.tar"):
        (tmp_path / "images" / name).write_bytes((few / name).read_bytes())
    with tarfile.open(tmp_path / "images" / "train-000002.tar", "w") as tar:
        for number, pixels in enumerate(rare):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            info = tarfile.TarInfo(f"rare-{number}.png")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    report = extract(tmp_path / "images", tmp_path / "t", codec="klt")
    assert report.samples == 14
    assert report.mean_cosine > 0.998
