"""What the errors of a plan say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.images import write_tar
from support.messages import Case, require_message

from milan_pipe import api
from milan_pipe.config.params import load_params
from milan_pipe.errors import DataError, SettingError
from milan_pipe.images.shards import expand_shards
from milan_pipe.planning.store import sample_images


def sample(*shards: str) -> None:
    """Draw images of shards that hold none that can be read."""
    for name in shards:
        write_tar(Path("i", name), {"a.jpg": b"<html>"})
    sample_images(expand_shards("i"), load_params(None), 8, lambda _: None)


def plan(*changes: str, **values: Any) -> None:
    write_tar(Path("i/a.tar"), {"a.jpg": b"<html>"})
    api.plan("i", "t", load_params(None, changes), **values)


NOT_ABOVE_0 = "a plan needs a number above 0"
CASES: dict[str, Case] = {
    "no image of one shard": (
        lambda: sample("a.tar"),
        DataError,
        "i/a.tar has no readable image to measure with; the first: a: not a JPEG, PNG...",
    ),
    "no image of three shards": (
        lambda: sample("a.tar", "b.tar", "c.tar"),
        DataError,
        "i/a.tar and 2 more of 3 shards have no readable image to measure with; the first: a: not a JPEG, PNG...",
    ),
    "neither images nor a store": (
        lambda: api.plan(None, "t"),
        SettingError,
        "expected images or views_from, a store whose views are seen; found neither",
    ),
    "both": (
        lambda: api.plan("i", "t", views_from="a"),
        SettingError,
        "expected images or views_from, a store whose views are seen; found both",
    ),
    "a target without features": (
        lambda: api.plan(None, "t", load_params(None, ["target=pixels"]), views_from="a"),
        SettingError,
        "target 'pixels' needs no features, and a second teacher's are planned",
    ),
    "into the store that is seen": (
        lambda: api.plan(None, "a", views_from="a"),
        SettingError,
        "a is the store that is read; name another folder for the new store",
    ),
    "no sample": (lambda: plan(sample=0), SettingError, f"sample is 0; {NOT_ABOVE_0}"),
    "no images in all": (lambda: plan(total=0), SettingError, f"total is 0; {NOT_ABOVE_0}"),
    "no devices": (lambda: plan(devices=0), SettingError, f"devices is 0; {NOT_ABOVE_0}"),
    "no speed": (lambda: plan(tflops=0.0), SettingError, f"tflops is 0.0; {NOT_ABOVE_0}"),
    "negative speed": (lambda: plan(tflops=-1.0), SettingError, f"tflops is -1.0; {NOT_ABOVE_0}"),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
