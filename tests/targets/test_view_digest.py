"""The digest of a shard's views: the same of any format, codec and teacher, another of any other view."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.targets import header, random_blocks, write_blocks

from milan_pipe.api import convert_targets
from milan_pipe.digests import with_digest
from milan_pipe.targets.schema import StoreHeader, TargetBlock
from milan_pipe.targets.store import TargetStoreWriter, open_targets

HEAD = header(shards=1)
BLOCKS = random_blocks(HEAD, 140)
KINDS = [header(codec, format=kind, width=8) for codec in ("int8", "float16", "klt") for kind in ("zarr", "webdataset")]


def digest_of(where: Path, head: StoreHeader, blocks: list[TargetBlock]) -> str:
    write_blocks(where, head, [blocks])
    found = open_targets(where)
    digest = found.record("000000").views_sha256
    assert digest is not None
    assert found.views_sha256("000000") == digest
    return digest


def as_the_page_says(blocks: list[TargetBlock]) -> str:
    whole = hashlib.sha256()
    for block in blocks:
        whole.update(np.uint64(len(block.keys)).tobytes())
        for key in block.keys:
            whole.update(np.uint64(len(key.encode())).tobytes() + key.encode())
        whole.update(block.crop_KN4.astype("<i4").tobytes() + block.flip_KN.astype(np.uint8).tobytes())
        for view in block.jpegs:
            for jpeg in view:
                whole.update(np.uint64(len(jpeg)).tobytes() + bytes(jpeg))
    return whole.hexdigest()


@pytest.mark.parametrize("head", KINDS, ids=lambda head: f"{head.codec.name}-{head.format}")
def test_neither_format_nor_codec_nor_teacher_counts(head: StoreHeader, tmp_path: Path) -> None:
    views = ("keys", "crop_KN4", "flip_KN", "jpegs", "label_N")
    blocks = [
        replace(one, **{name: getattr(of, name) for name in views})
        for one, of in zip(random_blocks(head, 140, seed=5), BLOCKS, strict=True)
    ]
    assert digest_of(tmp_path / "store", head, blocks) == as_the_page_says(BLOCKS)


def changed(name: str) -> list[TargetBlock]:
    first, *rest = BLOCKS
    values: Any = getattr(first, name)
    if name == "keys":
        return [replace(first, keys=[f"{values[0]}x", *values[1:]]), *rest]
    if name == "jpegs":
        return [replace(first, jpegs=[[values[0][1], values[0][0], *values[0][2:]], *values[1:]]), *rest]
    other = values.copy()
    other.flat[0] = not other.flat[0] if name == "flip_KN" else other.flat[0] + 1
    return [replace(first, **{name: other}), *rest]


@pytest.mark.parametrize("name", ["keys", "crop_KN4", "flip_KN", "jpegs"])
def test_any_change_of_a_view_counts(name: str, tmp_path: Path) -> None:
    assert digest_of(tmp_path / "store", HEAD, changed(name)) != as_the_page_says(BLOCKS)


def test_converting_adds_it(tmp_path: Path) -> None:
    write_blocks(tmp_path / "old", HEAD, [BLOCKS])
    record = tmp_path / "old" / "manifest" / "000000.json"
    values = json.loads(record.read_text())
    del values["views_sha256"], values["sha256"]
    record.write_bytes(json.dumps(with_digest(values), sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n")
    (tmp_path / "old" / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"has no manifest\.json"):
        old = open_targets(tmp_path / "old")
    assert old.views_sha256("000000") is None
    TargetStoreWriter(tmp_path / "old", HEAD).finish()
    assert "views_sha256" not in (tmp_path / "old" / "manifest.json").read_text()
    convert_targets(tmp_path / "old", tmp_path / "new", format="webdataset")
    assert open_targets(tmp_path / "new").views_sha256("000000") == as_the_page_says(BLOCKS)
