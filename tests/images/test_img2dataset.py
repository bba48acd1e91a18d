"""Shards as img2dataset writes them are images as they are: captions, failed rows, and what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.project import Project
from webdataset import TarWriter

from milan_pipe import api
from milan_pipe.images.count import count_images
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import Sample, read_shard


def write_shards(folder: Path, images: list[bytes], per_shard: int = 4) -> None:
    """As its webdataset writer does: a failed row is in the parquet file beside the shard alone."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(images), per_shard)):
        rows = []
        with TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            for row, data in enumerate(images[start : start + per_shard]):
                failed, key = row == 1, f"{number:05d}{row:04d}"
                meta = {
                    "url": f"https://host/{key}.jpg?sig=1",
                    "caption": f"caption {key}",
                    "key": key,
                    "status": "failed_to_download" if failed else "success",
                    "error_message": "HTTP Error 404: Not Found" if failed else None,
                    "width": None if failed else 48,
                    "exif": None if failed else "{}",
                    "sha256": None if failed else "0" * 64,
                }
                rows.append(meta)
                if not failed:
                    tar.write({"__key__": key, "png": data, "txt": meta["caption"], "json": json.dumps(meta, indent=4)})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": per_shard, "successes": per_shard - 1}))


@pytest.fixture
def pictures(project: Project) -> list[bytes]:
    return [sample.data for sample in samples(Path(project.images[1].replace("*", "000000")))]


def samples(shard: Path) -> list[Sample]:
    def fail(key: str, reason: str) -> None:
        raise AssertionError((key, reason))

    return list(read_shard(shard, fail))


def test_every_stage_takes_them(pictures: list[bytes], project: Project, tmp_path: Path) -> None:
    write_shards(tmp_path / "laion", pictures[:8])
    shards = expand_shards(tmp_path / "laion")
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar"]
    found = samples(tmp_path / "laion" / "00001.tar")
    assert [(s.key, s.caption, s.label) for s in found] == [
        (f"00001{row:04d}", f"caption 00001{row:04d}", -1) for row in (0, 2, 3)
    ]
    assert [s.data for s in found] == [pictures[4], *pictures[6:8]]
    assert count_images(shards, lambda *_: None).total == 6
    assert api.plan(tmp_path / "laion", tmp_path / "targets", project.params, sample=2).images.total == 6
    report = api.extract_targets(tmp_path / "laion", tmp_path / "targets", project.params)
    assert (report.samples, report.bad, report.complete) == (6, 0, True)
    assert (tmp_path / "targets" / "bad_samples.jsonl").read_text() == ""
    kept = [path for path in (tmp_path / "targets").rglob("*") if path.is_file() and b"sig=1" in path.read_bytes()]
    assert not kept


def test_captions_come_from_json_where_there_is_no_text(tmp_path: Path, pictures: list[bytes]) -> None:
    """And rows that failed are no images that were lost, also where other writers keep them."""
    failed = {"status": "failed_to_resize", "caption": "gone"}
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "0", "png": pictures[0], "json": {"caption": "of json", "status": "success"}})
        tar.write({"__key__": "1", "json": failed, "txt": "gone"})
        tar.write({"__key__": "2", "png": pictures[0], "json": {"caption": "of json"}, "txt": ""})
        tar.write({"__key__": "3", "png": pictures[0], "json": {"caption": None}, "txt": ""})
    found = [(s.key, s.caption) for s in samples(tmp_path / "a.tar")]
    assert found == [
        ("0", "of json"),
        ("2", "of json"),
        ("3", None),
    ]
