"""Images are counted without being read: what counts, what is only estimated, what is left to the reader."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.s3 import Proxy

from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError, MissingError
from milan_pipe.images.count import ImageCount, count_images, glance_at_images, indexed_images, spread_evenly
from milan_pipe.images.prepare import prepare
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard
from milan_pipe.storage import location_of


def tar_of(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def images(count: int, size: int = 3000) -> list[tuple[str, bytes]]:
    """Members that look like samples of an image, a label and a caption."""
    parts = (("jpg", bytes(size)), ("cls", b"1"), ("txt", b"words"))
    return [(f"{row:06d}.{suffix}", data) for row in range(count) for suffix, data in parts]


def counted(where: str | Path) -> ImageCount:
    return count_images(expand_shards(where), lambda *_: None)


def test_members_that_the_reader_passes_over_do_not_count(tmp_path: Path) -> None:
    readable = ["a.jpg", "a.png", "B.JPEG", "d/c.webp"]
    others = ["d.v2.jpg", "e.gif", "f.json", "__x__/g.jpg", ".h.jpg", "no suffix"]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of([(name, b"1") for name in readable + others]))
    assert counted(path).total == 3
    bad: list[str] = []
    keys = {sample.key for sample in read_shard(path, lambda key, _: bad.append(key))}
    # `a` has two images; of names that are no image's the reader tells, and they will not be in the store.
    assert keys | {"a"} == {"a", "B", "d/c"}


def test_links_and_folders_do_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/a.jpg", "d/b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    assert (counted(path).total, counted(path).source) == (2, "headers")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_counted_in_every_kind_of_tar(tmp_path: Path, format: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for row in range(5):
            info = tarfile.TarInfo(f"{'folder/' * 15}{row}.jpg")
            info.size = 10
            tar.addfile(info, io.BytesIO(bytes(10)))
    assert counted(path).total == 5


@pytest.mark.parametrize("keep", [0.3, 0.77])
def test_a_cut_shard_is_an_error_that_says_where(tmp_path: Path, keep: float) -> None:
    data = tar_of(images(30))
    (tmp_path / "whole.tar").write_bytes(data)
    (tmp_path / "cut.tar").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DataError, match=r"cut\.tar .*damaged"):
        counted(tmp_path)


def test_a_shard_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(5000))
    with pytest.raises(DataError, match="plain tar"):
        counted(tmp_path)


def test_an_empty_shard_beside_others_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(images(3)))
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.tar .*empty"):
        counted(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[", b'{"version": 99}'])
def test_a_damaged_index_is_no_index(tmp_path: Path, damage: bytes) -> None:
    prepare("demo", tmp_path / "i", PrepareSettings(train_scenes=12, test_scenes=0, samples_per_shard=5), workers=1)
    assert indexed_images(expand_shards(tmp_path / "i")) == 12
    (tmp_path / "i" / "index.json").write_bytes(damage)
    assert indexed_images(expand_shards(tmp_path / "i")) is None
    assert (counted(tmp_path / "i").total, counted(tmp_path / "i").source) == (12, "headers")


def test_a_part_of_the_shards_has_its_part_of_the_index(tmp_path: Path) -> None:
    prepare("demo", tmp_path / "i", PrepareSettings(train_scenes=12, test_scenes=4, samples_per_shard=5), workers=1)
    assert counted(f"{tmp_path}/i/train-*.tar").total == 12
    assert counted(f"{tmp_path}/i/test-000000.tar").total == 4
    (tmp_path / "i" / "more.tar").write_bytes(tar_of(images(2)))
    with pytest.warns(RuntimeWarning, match=r"prepare` wrote: more\.tar is not named there; all that is there is used"):
        assert (counted(tmp_path / "i").total, counted(tmp_path / "i").source) == (18, "headers")


def test_shards_that_are_not_those_of_the_index_are_told(tmp_path: Path, bucket: str) -> None:
    prepare("demo", tmp_path / "i", PrepareSettings(train_scenes=12, test_scenes=0, samples_per_shard=5), workers=1)
    for path in (tmp_path / "i").iterdir():
        location_of(bucket).write(f"i/{path.name}", path.read_bytes())
    (tmp_path / "i" / "train-000001.tar").unlink()
    location_of(bucket).remove("i/train-000001.tar")
    for where in (str(tmp_path / "i"), f"{bucket}/i"):
        with pytest.warns(RuntimeWarning, match=r"train-000001\.tar is lost; all that is there is used"):
            assert len(expand_shards(where)) == 2
    (tmp_path / "i" / "train-000000.tar").write_bytes(tar_of(images(5)))
    with pytest.warns(RuntimeWarning, match=r"train-000000\.tar is another, and 1 more; all"):
        assert len(expand_shards(tmp_path / "i")) == 2
    with warnings.catch_warnings(action="error"):
        assert len(expand_shards(f"{tmp_path}/i/*.tar")) == 2, "a glob names what it names"


def test_progress_names_what_is_looked_at(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.tar").write_bytes(tar_of(images(2)))
    seen: list[tuple[int, int]] = []
    count_images(expand_shards(tmp_path), lambda *now: seen.append(now))
    assert seen == [(done, 16) for done in range(1, 17)]


def test_large_shards_of_a_bucket_are_not_fetched_whole(proxied_bucket: str, s3_proxy: Proxy) -> None:
    location = location_of(f"{proxied_bucket}/images")
    for number in range(12):
        location.write(f"{number:02d}.tar", tar_of(images(100 + 10 * (number % 3), 60_000)))
    s3_proxy.requests.clear()
    found = counted(f"{proxied_bucket}/images")
    assert (found.source, found.shards, found.looked_at) == ("estimate", 12, 8)
    assert found.total == pytest.approx(4 * (100 + 110 + 120), rel=0.03)
    assert s3_proxy.bytes_sent(".tar") <= 8 * 4 * 1024 * 1024


def test_a_bucket_with_an_index_is_not_read(proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path) -> None:
    prepare("demo", tmp_path / "i", PrepareSettings(train_scenes=12, test_scenes=0, samples_per_shard=5), workers=1)
    location = location_of(f"{proxied_bucket}/images")
    for path in (tmp_path / "i").iterdir():
        location.write(path.name, path.read_bytes())
    s3_proxy.requests.clear()
    found = counted(f"{proxied_bucket}/images")
    assert (found.total, found.source) == (12, "index")
    assert s3_proxy.count("GET", ".tar") == 0


def test_a_bucket_that_lost_a_shard_is_an_error(bucket: str) -> None:
    location = location_of(f"{bucket}/images")
    location.write("a.tar", tar_of(images(3)))
    shards = expand_shards(f"{bucket}/images")
    location.remove("a.tar")
    with pytest.raises(MissingError, match=r"a\.tar"):
        count_images(shards, lambda *_: None)


# --- at a glance --------------------------------------------------------------------------------------------------


def test_a_glance_is_near_and_never_fails(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.tar").write_bytes(tar_of(images(20 + number)))
    shards = expand_shards(tmp_path)
    assert glance_at_images(shards) == pytest.approx(sum(20 + number for number in range(12)), rel=0.05)
    # Two of those that it looks at are damaged, and no longer have their size: it goes by the others.
    (tmp_path / "00.tar").write_bytes(tar_of(images(20))[:5000])
    (tmp_path / "03.tar").write_bytes(b"")
    left = sum(20 + number for number in range(12) if number not in (0, 3))
    assert glance_at_images(shards) == pytest.approx(left, rel=0.05)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no tar")
    assert glance_at_images(shards) is None
    for path in tmp_path.iterdir():
        path.unlink()
    assert glance_at_images(shards) is None


def test_spread_evenly() -> None:
    assert spread_evenly(range(3), 16) == [0, 1, 2]
    assert spread_evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread_evenly(range(1000), 4) == [0, 250, 500, 750]
