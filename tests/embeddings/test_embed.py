"""Embeddings: the model's own features under their keys, whole files, and the same bytes however they came about."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from support import processes
from support.images import NAMES, TINY, class_folders, image, labelled_shard, png, write_tar
from support.timm_models import timm_folder

from milan_pipe import api
from milan_pipe.config.params import Params, load_params
from milan_pipe.embeddings import files, run
from milan_pipe.errors import DataError, SettingError
from milan_pipe.evaluation.backbone import pooled
from milan_pipe.evaluation.features import centre_view
from milan_pipe.evaluation.frozen import subject_of
from milan_pipe.images.decode import decode_image
from milan_pipe.images.tar import read_shard
from milan_pipe.storage import location_of


def params(*settings: str) -> Params:
    return load_params(None, ["embed.batch_size=4", "embed.threads=2", *settings]).model_copy(update={"student": TINY})


def unlabelled(path: Path, numbers: range) -> Path:
    return write_tar(path, {f"{number:04d}.png": png(image(number, number % 3)) for number in numbers})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    labelled_shard(folder / "a.tar", range(10))
    unlabelled(folder / "b.tar", range(20, 27))
    labelled_shard(folder / "c.tar", range(30, 35))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(out: Path) -> dict[str, Any]:
    """All rows, of either format."""
    found: dict[str, list[Any]] = {}
    for path in sorted(out.glob("0*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            for name in table.column_names:
                rows = table[name].to_pylist()
                found.setdefault(name, []).append(np.array(rows, object if name == "key" else None))
        else:
            group: Any = zarr.open_group(path, mode="r")
            for name in group.array_keys():
                found.setdefault(name, []).append(group[name][...])
    return {name: np.concatenate(parts) for name, parts in found.items()}


@torch.inference_mode()
def plain(checkpoint: str, images: Path, settings: Params) -> tuple[Any, Any]:
    """Embeddings and patches, one image at a time."""
    subject = subject_of(checkpoint, settings)
    embeddings, patches = [], []
    for shard in sorted(images.glob("*.tar")):
        for sample in read_shard(shard, lambda *_: None):
            view = torch.tensor(centre_view(decode_image(sample.data), subject.size, settings.embed.crop))
            tokens = subject.tokens(view[None])
            embeddings.append(pooled(tokens, settings.embed.pool, subject.layout)[0].numpy())
            patches.append(subject.layout.patches(tokens)[0].numpy())
    return np.stack(embeddings), np.stack(patches)


@pytest.mark.parametrize(
    ("checkpoint", "settings", "patches"),
    [
        ("random", (), False),
        ("random", ("embed.format=zarr", "embed.pool=mean"), True),
        ("teacher", ("embed.dtype=float16", "embed.crop=0.8"), True),
        ("map", ("embed.format=zarr", "embed.dtype=float16", "embed.pool=mean"), False),
    ],
)
def test_rows_are_the_models_own(
    checkpoint: str,
    settings: tuple[str, ...],
    patches: bool,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Groups of three rows, which no batch and no shard fills.
    monkeypatch.setattr(files, "_GROUP_BYTES", 3 * 16 * (17 if patches else 1) * 4)
    subject = f"timm:local-dir:{timm_folder(tmp_path / 'm', 'map')}" if checkpoint == "map" else checkpoint
    with_settings = params(*settings)
    report = api.embed(subject, images, tmp_path / "out", with_settings, patches=patches)
    found = read(tmp_path / "out")
    embedding, patch = plain(subject, images, with_settings)
    near = {"rtol": 1e-4, "atol": 1e-5} if with_settings.embed.dtype == "float32" else {"rtol": 2e-3, "atol": 1e-3}
    np.testing.assert_allclose(found["embedding"], embedding, **near)
    assert list(found["key"]) == [f"{n:04d}" for n in (*range(10), *range(20, 27), *range(30, 35))]
    assert list(found["label"]) == [n % 3 for n in range(10)] + [-1] * 7 + [n % 3 for n in range(30, 35)]
    assert ("patches" in found) == patches
    if patches:
        np.testing.assert_allclose(found["patches"], patch, **near)
    assert (report.images, report.shards, report.complete, report.skipped) == (22, 3, True, 0)
    assert report.width == embedding.shape[1]
    kind = pq.read_schema(tmp_path / "out" / "000000.parquet") if with_settings.embed.format == "parquet" else None
    value = (
        kind.field("embedding").type.value_type
        if kind
        else zarr.open_array(tmp_path / "out/000000.zarr/embedding").dtype
    )
    assert str(value) in (
        with_settings.embed.dtype,
        {"float32": "float", "float16": "halffloat"}[with_settings.embed.dtype],
    )


@pytest.mark.parametrize("out_format", ["parquet", "zarr"])
def test_what_was_broken_off_goes_on_to_the_same_bytes(out_format: str, images: Path, tmp_path: Path) -> None:
    settings = params(f"embed.format={out_format}")
    api.embed("random", images, tmp_path / "whole", settings, patches=True)
    out = tmp_path / "out"

    def break_off(now: run.EmbedProgress) -> None:
        # In the middle of the second shard.
        if now.images > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.embed("random", images, out, settings, patches=True, on_progress=break_off)
    assert [path.stem for path in sorted(out.glob("0*"))] == ["000000"]
    assert not list(out.glob(".partial-*"))
    first = (out / "records" / "000000.json").stat().st_mtime_ns
    # As after a kill between a file and its record.
    if out_format == "zarr":
        shutil.copytree(tmp_path / "whole" / "000002.zarr", out / "000002.zarr")
    seen: list[run.EmbedProgress] = []
    report = api.embed("random", images, out, settings, patches=True, on_progress=seen.append)
    assert report.skipped == 1
    assert (seen[0].shards_done, seen[-1].shards_done, seen[-1].images) == (1, 3, 12)
    assert (out / "records" / "000000.json").stat().st_mtime_ns == first
    assert content(out) == content(tmp_path / "whole")
    assert api.embed("random", images, out, settings, patches=True).skipped == 3


def test_shares_of_a_batch_queue(images: Path, tmp_path: Path) -> None:
    api.embed("random", images, tmp_path / "whole", params())
    one = api.embed("random", images, tmp_path / "out", params(), shards="1/2")
    assert (one.shards, one.complete, one.images) == (1, False, 7)
    both = api.embed("random", images, tmp_path / "out", params(), shards="0/2")
    assert (both.shards, both.complete, both.images) == (3, True, 22)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_bad_images_are_listed_and_bad_shards_do_not_stop_the_others(images: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(images, tmp_path / "images")
    write_tar(copy / "b.tar", {"x.png": b"no image", **{f"{n}.png": png(image(n, 0)) for n in range(3)}})
    whole = (copy / "a.tar").read_bytes()
    (copy / "a.tar").write_bytes(whole[:5000])
    out = tmp_path / "out"
    settings = params("embed.max_bad_fraction=0.2")
    with pytest.raises(DataError, match=r"1 of 3 shards failed: 000000: shard .*a\.tar is cut .* 2 are whole"):
        api.embed("random", copy, out, settings)
    assert list(read(out)["key"]) == ["0", "1", "2", *(f"{n:04d}" for n in range(30, 35))]
    (line,) = (json.loads(text) for text in (out / "bad_samples.jsonl").read_text().splitlines())
    assert (line["shard"], line["source"], line["key"]) == ("000001", "b.tar", "x")
    (copy / "a.tar").write_bytes(whole)
    assert api.embed("random", copy, out, settings).bad == 1
    with pytest.raises(DataError, match=r"more than embed\.max_bad_fraction 0\.01 allows"):
        api.embed("random", copy, out, params("embed.max_bad_fraction=0.01"))


def test_class_folders_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_IMAGES_OF_FOLDERS", 4)
    folder = class_folders(tmp_path / "images", range(9))
    (folder / NAMES[0] / "notes.txt").touch()
    report = api.embed("random", folder, tmp_path / "out", params("embed.max_bad_fraction=0.5"))
    found = read(tmp_path / "out")
    assert (report.shards, report.images, report.bad) == (3, 9, 1)
    assert [NAMES[label] for label in found["label"]] == [key.split("/")[0] for key in found["key"]]


@pytest.mark.parametrize("out_format", ["parquet", "zarr"])
def test_what_has_changed_since_is_embedded_again(out_format: str, images: Path, tmp_path: Path) -> None:
    copy, out = shutil.copytree(images, tmp_path / "images"), tmp_path / "out"
    settings = params(f"embed.format={out_format}")
    api.embed("random", copy, out, settings)
    whole = content(out)
    (written,) = out.glob("000001.*")
    file = max(filter(Path.is_file, [written, *written.rglob("*")]), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="1 shards are embedded again, .*: 000001"):
        assert api.embed("random", copy, out, settings).skipped == 2
    assert content(out) == whole
    # What is of another time may be other images of the same size.
    os.utime(copy / "a.tar", (1, 1))
    with pytest.warns(RuntimeWarning, match="1 shards are embedded again, .*: 000000"):
        assert api.embed("random", copy, out, settings).skipped == 2
    assert api.embed("random", copy, out, settings).skipped == 3


def test_replaced_images_of_a_class_folder_are_embedded_again(tmp_path: Path) -> None:
    folder, out = class_folders(tmp_path / "images", range(9)), tmp_path / "out"
    api.embed("random", folder, out, params())
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.write_bytes(png(image(50 + number, 0)))
    with pytest.warns(RuntimeWarning, match="are embedded again"):
        assert api.embed("random", folder, out, params()).skipped == 0
    api.embed("random", folder, tmp_path / "fresh", params())
    assert np.array_equal(read(out)["embedding"].tolist(), read(tmp_path / "fresh")["embedding"].tolist())


def test_no_embeddings_in_class_folders(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "images", range(6))
    for out in (folder, folder / "emb", folder / NAMES[0]):
        with pytest.raises(SettingError, match="whose folders are classes; name another folder"):
            api.embed("random", folder, out, params())
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)


def test_what_earlier_versions_recorded_counts(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.embed("random", images, out, params())
    for path in [out / "embeddings.json", *(out / "records").iterdir()]:
        record = json.loads(path.read_text())
        former = {name: value for name, value in record.items() if name not in ("structure", "written", "bytes")}
        assert former.keys() != record.keys()
        path.write_text(json.dumps(former))
    assert api.embed("random", images, out, params()).skipped == 3


@pytest.mark.parametrize("out_format", ["parquet", "zarr"])
def test_a_bucket_holds_what_a_folder_holds(out_format: str, images: Path, tmp_path: Path, bucket: str) -> None:
    settings = params(f"embed.format={out_format}")
    api.embed("random", images, tmp_path / "out", settings)
    for skipped in (0, 3):
        assert api.embed("random", images, f"{bucket}/out", settings).skipped == skipped
    there = location_of(f"{bucket}/out")
    assert {path: there.read(path) for path in there.sizes()} == content(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("out_format", ["parquet", "zarr"])
def test_killed_at_any_instant(out_format: str, tmp_path: Path) -> None:
    """The same command goes on to the same bytes, and nothing of what was killed is left."""
    for number in range(40):
        labelled_shard(tmp_path / "images" / f"{number:02d}.tar", range(5 * number, 5 * number + 5))
    settings = ["--set", "embed.threads=1", "--set", "student.width=32", "--format", out_format, "--patches"]

    def start(out: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "milan_pipe", "embed", "random", "images", out, *settings]
        return processes.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    rng, kills = random.Random(7), 0
    while kills < 12:
        process = start("out")
        records = len(list(tmp_path.glob("out/records/*.json")))
        ends = time.monotonic() + 60
        while process.poll() is None and len(list(tmp_path.glob("out/records/*.json"))) < records + 1:
            assert time.monotonic() < ends
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "out" / "records" / "000039.json").exists():
            assert start("out").wait() == 0
            assert content(tmp_path / "out") == content(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    assert start("out").wait() == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
