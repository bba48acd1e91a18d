"""`extract-targets` warns, before the first view is made, where what is left to do may not fit on the disk."""

from __future__ import annotations

import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
from support.disks import small_disk

from milan_pipe import cli
from milan_pipe.config.images import PrepareSettings
from milan_pipe.extraction import space
from milan_pipe.images.prepare import prepare
from milan_pipe.storage import location_of
from milan_pipe.targets.store import read_header


class Begun(BaseException):
    """Ends a run at its first progress, before a view is made."""


def warned(run):
    """What `run` warns of free disk before its first view."""

    def stop(now):
        assert now.views == 0
        raise Begun

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Begun):
            run(on_progress=stop)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if " are free at " in text]


def needed(line):
    """Bytes that a warning names."""
    number, unit = line.partition("up to ")[2].split(",")[0].split()
    return float(number) * {"KB": 1e3, "MB": 1e6}[unit]


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that every disk says it has free."""
    return lambda count: monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=count))


def test_a_small_disk_is_reported_before_the_first_view(images, extract, tmp_path):
    with small_disk(tmp_path / "disk", 300 * 1024) as disk:
        lines = warned(lambda **more: extract(images, disk / "t", **more))
        assert len(lines) == 1
        assert lines[0].endswith("name a folder with room, or choose fewer views (views.count) or a smaller codec")
        assert str(disk / "t") in lines[0]


def test_without_an_index_headers_tell(images, extract, tmp_path, free):
    shutil.copytree(images, tmp_path / "plain", ignore=shutil.ignore_patterns("index.json"))
    free(10_000)
    lines = warned(lambda **more: extract(tmp_path / "plain", tmp_path / "t", **more))
    indexed = warned(lambda **more: extract(images, tmp_path / "u", **more))
    assert lines[0].partition(" free at ")[0] == indexed[0].partition(" free at ")[0]


def test_only_what_is_missing_counts(images, extract, whole, tmp_path, free):
    targets = tmp_path / "t"
    shutil.copytree(whole[0], targets)
    free(10_000)
    lines = warned(lambda **more: extract(images, targets, **more))
    assert lines == []
    first = warned(lambda **more: extract(images, targets, redo=["000002"], **more))
    every = warned(lambda **more: extract(images, tmp_path / "u", **more))
    # The last of three shards has 4 of 24 images.
    assert needed(first[0]) == pytest.approx(needed(every[0]) / 6, rel=0.01)


def test_a_share_counts_its_own_shards(images, extract, tmp_path, free):
    announced_bytes = []
    for share in (None, "2/3"):
        free(10_000)
        lines = warned(lambda share=share, **more: extract(images, tmp_path / str(share)[:1], shards=share, **more))
        announced_bytes.append(needed(lines[0]))
    assert announced_bytes[1] == pytest.approx(announced_bytes[0] / 6, rel=0.01)


def test_a_disk_with_room_is_passed_over_in_silence(images, extract, tmp_path):
    lines = warned(lambda **more: extract(images, tmp_path / "t", **more))
    assert lines == []


# What codec and format add to the bound are terms of one sum.
@pytest.mark.parametrize(("codec", "store_format"), [("float16", "zarr"), ("int8", "webdataset"), ("klt", "zarr")])
def test_the_bound_is_one(extract, tmp_path, codec, store_format):
    # In one shard: what a store keeps for each shard, whatever is in it, is not of the bound.
    prepare("demo", tmp_path / "i", PrepareSettings(train_scenes=48, test_scenes=0, samples_per_shard=48), workers=1)
    report = extract(tmp_path / "i", tmp_path / "t", codec=codec, format=store_format)
    header = read_header(location_of(tmp_path / "t"))
    bound = space.most_bytes_per_view(header)
    assert report.bytes_per_view < bound < 4 * report.bytes_per_view


def test_the_command_warns_in_one_line(images, tmp_path, free, capsys, monkeypatch):
    free(10_000)
    words = ["views.count=1", "extract.threads=1", "extract.device=cpu"]
    settings = [part for text in words for part in ("--set", text)]
    monkeypatch.setattr(sys, "argv", ["milan-pipe", "extract-targets", str(images), str(tmp_path / "t"), *settings])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert ended.value.code in (0, None)
    assert len(lines) == 1
    assert "may need up to" in lines[0]
    assert f"10.00 KB are free at {tmp_path / 't'}" in lines[0]
