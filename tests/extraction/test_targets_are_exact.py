"""What the store holds is what the teacher gives for the very pixels that the store holds."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch

from milan_pipe.config.images import ViewSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.extraction import shard as extraction_shard
from milan_pipe.extraction.forward import Forward
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard
from milan_pipe.images.views import View, decode_jpeg, draw_view, encode_jpeg, render_view
from milan_pipe.targets.codec import codec_of, mean_cosine
from milan_pipe.targets.store import open_targets
from milan_pipe.teacher.clip import load_teacher


def runs(root):
    reader = open_targets(root)
    for shard in reader.shards:
        for view in range(reader.header.views.count):
            yield int(shard), view, reader.read(shard, view, 0, reader.samples(shard))


def decoded(root, run):
    scale = None if run.scale_NS is None else torch.from_numpy(run.scale_NS)
    return codec_of(open_targets(root).header.codec).decode(torch.from_numpy(run.code_NST), scale)


def check_offline_is_online(root, teacher, least):
    seen = 0
    for _, _, run in runs(root):
        live = teacher(torch.from_numpy(np.stack([decode_jpeg(jpeg) for jpeg in run.jpegs])))
        stored = decoded(root, run)
        for row in range(len(run.keys)):
            assert mean_cosine(live.features_BST[row], stored[row]) >= least
        size = live.features_BST.norm(dim=-1)
        assert ((stored.norm(dim=-1) - size).abs() <= 0.01 * size).all()
        importance = live.importance_BL / live.importance_BL.sum(dim=1, keepdim=True)
        torch.testing.assert_close(torch.from_numpy(run.attention_NL).float(), importance, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(run.attention_NL.astype(np.float64).sum(axis=1), 1, atol=2e-3)
        seen += len(run.keys)
    return seen


def test_offline_is_online_int8(whole):
    targets, report = whole
    assert check_offline_is_online(targets, load_teacher(TeacherSettings()), 0.9999) == 48
    assert 0.9999 <= report.mean_cosine < 1


def test_offline_is_online_float16(images, extract, tmp_path):
    report = extract(images / "train-000002.tar", tmp_path / "t", codec="float16")
    assert check_offline_is_online(tmp_path / "t", load_teacher(TeacherSettings()), 0.999999) == 8
    assert report.mean_cosine >= 0.999999


def test_another_view_size_than_the_teachers(images, extract, tmp_path):
    extract(images / "train-000002.tar", tmp_path / "t", view_size=48)
    assert check_offline_is_online(tmp_path / "t", load_teacher(TeacherSettings()), 0.9999) == 8
    run = open_targets(tmp_path / "t").read("000000", 0, 0, 1)
    assert decode_jpeg(run.jpegs[0]).shape == (48, 48, 3)


def test_stored_crop_and_flip_give_the_stored_view(whole, images):
    shards = [list(read_shard(path, lambda *bad: pytest.fail(str(bad)))) for path in expand_shards(images)]
    flips = []
    for shard, view, run in runs(whole[0]):
        samples = shards[shard]
        assert list(run.keys) == [sample.key for sample in samples]
        assert run.label_N.tolist() == [sample.label for sample in samples]
        for row, sample in enumerate(samples):
            top, left, height, width = run.crop_N4[row].tolist()
            stored = View(top=top, left=left, height=height, width=width, flip=bool(run.flip_N[row]))
            image_HWC = decode_pixels(sample.data)
            assert stored == draw_view(ViewSettings(count=2, seed=5), sample.key, view, *image_HWC.shape[:2])
            assert encode_jpeg(render_view(image_HWC, stored, 64), 95) == run.jpegs[row]
        flips += run.flip_N.tolist()
    assert {True, False} == set(flips)


def test_a_batch_takes_views_of_one_block_and_as_many_as_asked(images, extract, tmp_path, monkeypatch):
    sizes = []

    class Counting(Forward):
        def launch(self, views, clock):
            sizes.append(len(views))
            return super().launch(views, clock)

    monkeypatch.setattr(extraction_shard, "Forward", Counting)
    extract(images, tmp_path / "all", batch_size=1000)
    assert sizes == [20, 20, 8]
    sizes.clear()
    extract(images, tmp_path / "some", batch_size=7)
    assert sizes == [7, 7, 6, 7, 7, 6, 7, 1]
    for root in ("all", "some"):
        assert check_offline_is_online(tmp_path / root, load_teacher(TeacherSettings()), 0.9999) == 48
    assert open_targets(tmp_path / "all").header.views.renderer == "torch"


def test_views_differ_between_keys_and_views(whole):
    boxes = [tuple(row) for _, _, run in runs(whole[0]) for row in run.crop_N4.tolist()]
    assert len(boxes) == 48
    assert len(set(boxes)) > 44


def pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_sample_does_not_depend_on_its_neighbours(whole, images, extract, tmp_path):
    shard = expand_shards(images)[1]
    row, sample = list(enumerate(read_shard(shard, lambda *_: None)))[7]
    pack(tmp_path / "alone.tar", [(f"{sample.key}.png", sample.data)])
    extract(tmp_path / "alone.tar", tmp_path / "t")
    alone, among = open_targets(tmp_path / "t"), open_targets(whole[0])
    for view in range(2):
        one, many = alone.read("000000", view, 0, 1), among.read("000001", view, row, row + 1)
        assert list(one.keys) == list(many.keys)
        assert one.label_N.tolist() == [-1]
        assert list(one.jpegs) == list(many.jpegs)
        np.testing.assert_array_equal(one.crop_N4, many.crop_N4)
        np.testing.assert_array_equal(one.flip_N, many.flip_N)
        # The last bit of a float sum may depend on the batch, no more than that.
        assert mean_cosine(decoded(tmp_path / "t", one), decoded(whole[0], many)) > 0.9999


def test_store_size_is_near_a_byte_a_dimension(whole):
    _, report = whole
    assert (report.shards, report.skipped, report.samples, report.bad, report.views) == (3, 0, 24, 0, 48)
    assert report.bytes == sum(path.stat().st_size for path in whole[0].rglob("*") if path.is_file())
    assert report.bytes_per_view * 48 == pytest.approx(report.bytes)
    assert 65 * 128 * 0.5 < report.bytes_per_view < 65 * 128 * 1.0 + 8000


def test_runs_stand_side_by_side(whole):
    """View-major: all JPEGs of one view of a block lie one after another, in the order of the samples."""
    import zarr

    group = zarr.open_group(whole[0] / "shards" / "000000", mode="r")
    offset, length = group["view_offset"][...].ravel(), group["view_length"][...].ravel()
    assert all(o + n == following for (o, n), (following, _) in pairwise(zip(offset, length, strict=True)))
    # Padded to whole chunks, so that each can be read without its neighbours.
    chunk = group["view_bytes"].chunks[0]
    assert group["view_bytes"].shape[0] == -(-(offset[-1] + length[-1]) // chunk) * chunk
