"""Frozen features of images in a bucket are those of the same images on the disk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.s3 import Proxy

from milan_pipe.config.evaluation import EmbedSettings
from milan_pipe.errors import StoreError
from milan_pipe.evaluation.features import embed_shards
from milan_pipe.images.labelled import labelled_images
from milan_pipe.storage import location_of


def embed(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    return pixels_BHWC.flatten(1).float()


def write_shard(path: Path, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + 3):
            image = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image, "PNG")
            for name, data in ((f"{number}.png", image.getvalue()), (f"{number}.cls", str(number).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("cut", [False, True])
def test_an_image_that_comes_short_is_no_bad_image(
    proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path, cut: bool
) -> None:
    write_shard(tmp_path / "0.tar", 0)
    whole = (tmp_path / "0.tar").read_bytes()
    location_of(proxied_bucket).write("set/0.tar", whole)
    found = labelled_images(f"{proxied_bucket}/set", lambda *_: None)
    if cut:
        location_of(proxied_bucket).write("set/0.tar", whole[: len(whole) // 4])
    else:
        s3_proxy.halve = lambda *_: True
    with pytest.raises(StoreError, match=r"0\.tar.* of (the )?\d+ bytes"):
        found.read(2)


def test_features_of_a_bucket(bucket: str, tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", 3 * number)
        location_of(bucket).write(f"set/{number}.tar", (tmp_path / f"{number}.tar").read_bytes())
    settings = EmbedSettings(batch_size=4, threads=1)
    local = embed_shards(tmp_path, embed, 8, settings)
    remote = embed_shards(f"{bucket}/set", embed, 8, settings)
    assert remote.label_N.tolist() == local.label_N.tolist() == list(range(6))
    assert torch.equal(remote.features_NF, local.features_NF)
    with pytest.raises(StoreError, match="there is no bucket"):
        embed_shards("s3://no-such-bucket-at-all/set", embed, 8, settings)
