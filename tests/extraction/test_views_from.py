"""Views that a store has, seen by another teacher: the targets that its images would have given, to the byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.extraction import shards_with_bad
from support.web import web_server

from milan_pipe.config.images import PrepareSettings, ViewSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import MismatchError
from milan_pipe.extraction.run import ExtractProgress
from milan_pipe.images.prepare import prepare
from milan_pipe.targets.convert import convert_targets
from milan_pipe.targets.several import open_several
from milan_pipe.targets.store import open_targets

OTHER = TeacherSettings(pretrained="random")
ONE = ViewSettings(count=1, seed=5)


class Interrupted(BaseException):
    """Stands for Ctrl-C at a chosen moment."""


@pytest.fixture(scope="module")
def more(extract: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images of two shards, one of more than a block, both with some that cannot be read; and their targets."""
    root = tmp_path_factory.mktemp("more")
    prepare("demo", root / "all", PrepareSettings(train_scenes=140, test_scenes=0, samples_per_shard=133), workers=1)
    shards_with_bad(root / "all", root / "images", {0: [3, 132], 1: [0]})
    extract(root / "images", root / "targets", views=ONE, max_bad_fraction=0.1)
    return root / "images", root / "targets"


@pytest.mark.parametrize(
    ("store_format", "codec", "seen"), [("zarr", "klt", "webdataset"), ("webdataset", "int8", "zarr")]
)
def test_it_is_what_the_images_give(
    more: tuple[Path, Path], extract: Any, tree: Any, tmp_path: Path, store_format: str, codec: str, seen: str
) -> None:
    images, targets = more
    if seen == "webdataset":
        convert_targets(targets, tmp_path / "a", format="webdataset")
        targets = tmp_path / "a"
    settings = {"codec": codec, "format": store_format, "teacher": OTHER, "views": ONE}
    extract(images, tmp_path / "whole", max_bad_fraction=0.1, **settings)
    # More of them are bad than this run would bear, as it was the other's to judge.
    report = extract(None, tmp_path / "b", views_from=targets, max_bad_fraction=0, **settings)
    assert tree(tmp_path / "b") == tree(tmp_path / "whole")
    assert (report.shards, report.samples, report.bad, report.views) == (2, 137, 3, 137)
    open_several([targets, tmp_path / "b"])


def test_interrupted_and_shared_out(whole: Any, extract: Any, tree: Any, tmp_path: Path) -> None:
    targets = tmp_path / "b"

    def stop(now: ExtractProgress) -> None:
        if now.shards_done == 1 and now.views > 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        extract(None, targets, views_from=whole[0], on_progress=stop)
    assert open_targets(targets).shards == ("000000",)
    assert extract(None, targets, views_from=whole[0], shards="0/2").complete is False
    report = extract(None, targets, views_from=whole[0], shards="1/2")
    assert (report.skipped, report.views, report.complete) == (2, 20, True)
    assert tree(targets) == tree(whole[0])


def test_on_a_web_server(whole: Any, extract: Any, tree: Any, tmp_path: Path) -> None:
    with web_server() as web:
        for path, data in tree(whole[0]).items():
            web.serve(f"/targets/{path}", data)
        extract(None, tmp_path / "b", views_from=f"{web.url}/targets", shards="0/3")
        read = [path for path, headers in web.requests if "range" in map(str.lower, headers)]
    assert tree(tmp_path / "b").items() < tree(whole[0]).items()
    assert open_targets(tmp_path / "b").shards == ("000000",)
    assert any("/view_bytes/c/" in path for path in read)
    assert not any("/features/c/" in path for path in read)


def test_a_damaged_shard_names_the_command_that_repairs_it(
    whole: Any, images: Path, extract: Any, tree: Any, tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "a")
    broken = tmp_path / "a" / "shards" / "000001" / "view_bytes" / "c" / "0"
    data = bytearray(broken.read_bytes())
    data[100] ^= 1
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=rf"1 of 3 shards failed.*extract-targets IMAGES {tmp_path}/a --redo 000001"):
        extract(None, tmp_path / "b", views_from=tmp_path / "a")
    assert open_targets(tmp_path / "b").shards == ("000000", "000002")
    extract(images, tmp_path / "a", redo=["000001"])
    extract(None, tmp_path / "b", views_from=tmp_path / "a")
    assert tree(tmp_path / "b") == tree(whole[0])


def test_views_that_have_changed_since_are_refused(images: Path, extract: Any, tree: Any, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    first, *_, last = sorted((tmp_path / "images").glob("*.tar"))
    extract(tmp_path / "images", tmp_path / "a")
    extract(None, tmp_path / "b", views_from=tmp_path / "a")
    shutil.copy(last, first)
    extract(tmp_path / "images", tmp_path / "a", redo=["000000"])
    before = tree(tmp_path / "b")
    with pytest.raises(MismatchError, match=r"1 source shards have changed .*a/000000: .* bytes.*--redo 000000"):
        extract(None, tmp_path / "b", views_from=tmp_path / "a")
    assert tree(tmp_path / "b") == before
    extract(None, tmp_path / "b", views_from=tmp_path / "a", redo=["000000"])
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
