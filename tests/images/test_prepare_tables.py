"""Preparing from parquet files with images and from lists: the hub's form, paths, URLs, and what is wrong with them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import pickle
import socket
import sys
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import processes
from support.hub import hub_of, use_hub
from support.images import bad_of, image, png
from support.web import Web, send, web_server

from milan_pipe.config.images import ImageSettings, PrepareSettings
from milan_pipe.config.params import load_params
from milan_pipe.errors import DataError, LabelError
from milan_pipe.images import download as download_module
from milan_pipe.images import source_table, table
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.index import read_index
from milan_pipe.images.prepare import PrepareReport, prepare
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.source_table import find_tables, split_of, table_source
from milan_pipe.images.table import read_rows, rows_and_labels
from milan_pipe.images.tar import Sample, read_shard
from milan_pipe.storage.local import LocalFolder

PICTURES = [png(image(number, number % 3)) for number in range(7)]


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(number, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def hub_table(path: Path, count: int, names: tuple[str, ...] = (), group: int = 3, **columns: list[Any]) -> Path:
    """A parquet file as the library `datasets` writes it, image by image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": PICTURES[number % 7], "path": f"{number}.png"} for number in range(count)]
    table = pa.table({"image": pa.array(rows, kind), **columns})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)
    return path


def for_ever(handler: BaseHTTPRequestHandler, data: bytes, pause: float) -> None:
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(data)
            time.sleep(pause)


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def samples(folder: Path, split: str = "train") -> list[Sample]:
    def fail(key: str, reason: str) -> None:
        raise AssertionError((key, reason))

    names = [shard.name for shard in read_index(folder).shards if shard.split == split]
    return [sample for name in names for sample in read_shard(folder / name, fail)]


def run(source: Path | str, out: Path, workers: int = 1, **values: object) -> PrepareReport:
    return prepare(source, out, PrepareSettings(**values), workers=workers)  # type: ignore[arg-type]


# --- parquet with images


def test_the_hubs_form(tmp_path: Path) -> None:
    """Splits by file names, classes by the names beside the schema, bytes as they are."""
    data, names = tmp_path / "set" / "data", ("ant", "bee", "cat")
    hub_table(data / "train-00000-of-00002.parquet", 7, names, label=[0, 1, 2, 0, 1, 2, -1])
    hub_table(data / "train-00001-of-00002.parquet", 2, names, label=[2, None])
    hub_table(data / "validation-00000-of-00001.parquet", 1, names, label=[1])
    report = run(tmp_path / "set", tmp_path / "out", samples_per_shard=5)
    assert report.classes == read_index(tmp_path / "out").classes == names
    train = samples(tmp_path / "out")
    assert [sample.data for sample in train] == [*PICTURES, *PICTURES[:2]]
    assert [sample.label for sample in train] == [0, 1, 2, 0, 1, 2, -1, 2, -1]
    assert train[6].key == "data-train-00000-of-00002-0000006"
    assert [sample.label for sample in samples(tmp_path / "out", "val")] == [1]
    # A file, a folder and a pattern give the same samples.
    for number, source in enumerate([data, data / "*.parquet"]):
        run(source, tmp_path / str(number))
        assert [sample.data for sample in samples(tmp_path / str(number))] == [sample.data for sample in train]
    assert run(data / "validation-00000-of-00001.parquet", tmp_path / "one").samples == 1


def test_captions_labels_by_name_and_plain_bytes(tmp_path: Path) -> None:
    """Other forms than the hub's: binary columns, names as labels, several captions an image."""
    table = pa.table(
        {
            "JPG": pa.array([jpeg(0), jpeg(1), jpeg(2)], pa.binary()),
            "labels": pa.array(["dog", " cat", None]),
            "text": pa.array([["a dog", "a\nbrown  dog"], ["a cat"], None]),
        }
    )
    pq.write_table(table, tmp_path / "pets.parquet")
    report = run(tmp_path / "pets.parquet", tmp_path / "out", split="val")
    assert report.classes == ("cat", "dog")
    found = samples(tmp_path / "out", "val")
    assert [(s.label, s.caption) for s in found] == [(1, "a dog\na brown dog"), (0, "a cat"), (-1, None)]
    assert [s.data for s in found] == [jpeg(0), jpeg(1), jpeg(2)]
    assert [s.key for s in found] == ["pets-0000000", "pets-0000001", "pets-0000002"]


def test_rows_without_a_readable_image_are_skipped(tmp_path: Path) -> None:
    gif = io.BytesIO()
    Image.new("RGB", (3, 3)).save(gif, "GIF")
    # As many cameras write a JPEG: with another picture behind it.
    two_shots = io.BytesIO()
    Image.new("RGB", (3, 3)).save(two_shots, "MPO", save_all=True, append_images=[Image.new("RGB", (3, 3))])
    rows = [
        {"bytes": PICTURES[0], "path": None},
        {"bytes": two_shots.getvalue(), "path": "camera.jpg"},
        {"bytes": None, "path": "gone.png"},
        {"bytes": PICTURES[1][:100], "path": "cut.png"},
        {"bytes": gif.getvalue(), "path": "x.gif"},
        None,
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    report = run(tmp_path / "a.parquet", tmp_path / "out")
    bad = bad_of(tmp_path / "out")
    assert (report.samples, report.bad, len(bad)) == (2, 4, 4)
    assert dict(bad) == {
        "gone.png": "the row has a path and no bytes; write the table again with its images embedded",
        "cut.png": bad[1][1],
        "x.gif": "images of type GIF are not read; convert to jpg, png or webp",
        "a.parquet": "the row names no image",
    }


def test_any_number_of_workers_and_any_row_groups_give_the_same_bytes(tmp_path: Path) -> None:
    outputs = []
    for number, (workers, group) in enumerate([(1, 3), (2, 3), (1, 100)]):
        source = tmp_path / str(number) / "many.parquet"
        hub_table(source, 23, ("a", "b"), group, label=[n % 2 for n in range(23)])
        out = tmp_path / str(number) / "out"
        run(source, out, workers, samples_per_shard=5)
        outputs.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == 5


def test_killed_in_the_middle_the_same_command_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    source = hub_table(tmp_path / "a.parquet", 7)
    run(source, tmp_path / "whole", samples_per_shard=2)
    calls = 0

    def decode(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KilledError

    monkeypatch.setattr(source_table, "decode_pixels", decode)
    with pytest.raises(KilledError):
        run(source, tmp_path / "out", samples_per_shard=2)
    monkeypatch.undo()
    run(source, tmp_path / "out", samples_per_shard=2)
    whole, out = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole == out


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    """One row group of 192 MB, read by a process of its own that says how much it has used."""
    data = np.random.default_rng(0).bytes(2_000_000)
    table = pa.table({"image": pa.array([data] * 96, pa.binary())})
    pq.write_table(table, tmp_path / "large.parquet", compression="none", row_group_size=96, use_dictionary=False)
    program = (
        "import resource\n"
        "from milan_pipe.images.table import read_rows, rows_and_labels\n"
        "from milan_pipe.images.shards import shard_file\n"
        "list(read_rows(rows_and_labels(shard_file('large.parquet'), None, 4)[0][0], ['image']))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for rows in rows_and_labels(shard_file('large.parquet'), None, 32)[0]:\n"
        "    assert sum(len(row['image']) > 0 for row in read_rows(rows, ['image'])) == 32\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = processes.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 80e6


@contextlib.contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """The most bytes that arrow and Python hold meanwhile."""
    usual, found = pa.default_memory_pool(), dict[str, int]()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield found
    finally:
        found |= {"arrow": pool.max_memory(), "python": tracemalloc.get_traced_memory()[1]}
        tracemalloc.stop()
        pa.set_memory_pool(usual)


@pytest.mark.parametrize("form", ["hub", "plain", "dictionary"])
def test_an_image_that_stands_in_many_rows_is_not_held_once_for_each(tmp_path: Path, form: str) -> None:
    """A file of 70 kB whose 3000 rows are 197 MB."""
    data = np.random.default_rng(0).bytes(2**16)
    images: Any = pa.DictionaryArray.from_arrays(np.zeros(3000, np.int32), pa.array([data]))
    if form != "dictionary":
        images = images.cast(pa.binary())
    if form == "hub":
        images = pa.StructArray.from_arrays([images], names=["bytes"])
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=3000)
    with peaks() as peak:
        [rows], _ = rows_and_labels(ShardFile(LocalFolder(tmp_path), "a.parquet"), None, 3000)
        found = (row["image"]["bytes"] if form == "hub" else row["image"] for row in read_rows(rows, ["image"]))
        assert sum(each == data for each in found) == 3000
    assert max(peak.values()) < 10e6


def test_rows_of_a_file_that_makes_itself_small_are_not_held_together(tmp_path: Path) -> None:
    """Its footer may say that a row group has a byte."""
    images = [bytes(2**17 + number) for number in range(300)]
    rows = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(rows, tmp_path / "a.parquet", compression="zstd", data_page_size=1, write_batch_size=1)
    with peaks() as peak:
        [part], _ = rows_and_labels(ShardFile(LocalFolder(tmp_path), "a.parquet"), None, 300)
        assert sum(len(row["image"]) for row in read_rows(part, ["image"])) == sum(map(len, images))
    assert max(peak.values()) < 20e6


def test_large_rows_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """A value of 4 MB that stands in 8 rows: once in arrow, and once in Python."""
    images = pa.DictionaryArray.from_arrays(np.zeros(8, np.int32), pa.array([bytes(2**22)])).cast(pa.binary())
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", compression="zstd")
    with peaks() as peak:
        [rows], _ = rows_and_labels(ShardFile(LocalFolder(tmp_path), "a.parquet"), None, 8)
        assert sum(len(row["image"]) for row in read_rows(rows, ["image"])) == 2**25
    assert max(peak.values()) < 16e6


@pytest.mark.parametrize("form", ["hub", "plain", "dictionary"])
def test_a_row_above_the_bounds_is_skipped_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(source_table, "MAX_ENCODED_BYTES", 2**20)
    monkeypatch.setattr(source_table, "MAX_TEXT_BYTES", 2**10)
    good = PICTURES[0]
    images: list[Any] = [good, good.ljust(2**20, b"\0"), good.ljust(2**20 + 1, b"\0"), good, good, None]
    if form == "hub":
        images = [{"bytes": each, "path": None} for each in images]
    array = pa.array(images)
    captions = [["a" * 500, "b" * 522], None, ["c"], ["a"] * 513, ["d"], ["e"]]
    rows = pa.table({"image": array.dictionary_encode() if form == "dictionary" else array, "caption": captions})
    pq.write_table(rows, tmp_path / "a.parquet")
    report = run(tmp_path / "a.parquet", tmp_path / "out")
    assert report.samples == 3
    assert [reason for _, reason in bad_of(tmp_path / "out")][:2] == [
        "the value of column image is larger than 1 MiB",
        "the value of column caption is larger than 0 MiB",
    ]


@pytest.mark.parametrize("column", ["image", "caption"])
def test_text_above_the_bound_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    monkeypatch.setattr(source_table, "MAX_TEXT_BYTES", 2**10)
    (tmp_path / "good.png").write_bytes(PICTURES[0])
    columns = {"image": ["good.png"] * 2, "caption": ["a" * 2**10] * 2}
    columns[column][1] = "a" * (2**10 + 1)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out").samples == 1
    assert [reason for _, reason in bad_of(tmp_path / "out")] == [f"the value of column {column} is larger than 0 MiB"]


def test_a_label_that_stands_in_many_rows_is_not_held_once_for_each(tmp_path: Path) -> None:
    names = ["a" * 2**16, "b" * 2**16, None]
    labels = pa.DictionaryArray.from_arrays(np.arange(3000, dtype=np.int32) % 3, pa.array(names)).cast(pa.string())
    pq.write_table(pa.table({"label": labels}), tmp_path / "a.parquet")
    with peaks() as peak:
        assert rows_and_labels(ShardFile(LocalFolder(tmp_path), "a.parquet"), "label", 3000)[1] == set(names)
    assert max(peak.values()) < 10e6


def test_labels_of_more_text_than_classes_have_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_MOST_LABEL_BYTES", 2**20)
    labels = [f"{number:01000d}" for number in range(1100)]
    hub_table(tmp_path / "a.parquet", 1100, group=1100, label=labels)
    with pytest.raises(LabelError, match=r"column label has more than 1 MiB of different values, expected names of"):
        run(tmp_path / "a.parquet", tmp_path / "out")


@pytest.mark.parametrize("kind", ["numbers", "csv"])
def test_other_labels_than_text_are_bounded_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(table, "_MOST_LABEL_BYTES", 2**16)
    if kind == "csv":
        (tmp_path / "a.csv").write_text("label\n" + "".join(f"{number}\n" for number in range(3000)))
    else:
        pq.write_table(pa.table({"label": np.arange(3000)}), tmp_path / "a.parquet")
    (name,) = [path.name for path in tmp_path.iterdir()]
    with pytest.raises(LabelError, match="more than 0 MiB of different values"):
        rows_and_labels(ShardFile(LocalFolder(tmp_path), name), "label", 1000)


def test_a_file_that_says_it_has_more_rows_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_MOST_ROWS", 2999)
    pq.write_table(pa.table({"label": np.arange(3000)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="says that it has 3000 rows, expected at most 2999"):
        rows_and_labels(ShardFile(LocalFolder(tmp_path), "a.parquet"), None, 1000)


def test_a_file_that_says_another_number_of_rows_than_it_has_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array(PICTURES[:3], pa.binary())}), tmp_path / "a.parquet", compression=None)
    data = (tmp_path / "a.parquet").read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # A 64-bit field of 3, as the format writes it; the first that stands for the rows of the file.
    places = [at for at in range(footer, len(data)) if data[at : at + 2] == b"\x16\x06"]
    for at in places:
        (tmp_path / "a.parquet").write_bytes(data[: at + 1] + b"\x0a" + data[at + 2 :])
        if pq.read_metadata(tmp_path / "a.parquet").num_rows == 5:
            break
    with pytest.raises(DataError, match="says that it has 5 rows, its parts have 3"):
        run(tmp_path / "a.parquet", tmp_path / "out")
    rows = table.Rows(file=ShardFile(LocalFolder(tmp_path), "b.parquet"), first=0, count=5)
    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"b\.parquet ends at row 3, expected 5"):
        list(table.read_rows(rows, ["image"]))


class Counted(LocalFolder):
    """A folder that counts what is read from its files, in bytes."""

    count = 0

    def open(self, path: str) -> IO[bytes]:
        folder = self

        class File(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                folder.count += (size := super().readinto(buffer))
                return size

        return io.BufferedReader(File(self.local / path))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("group", [7, 60])
def test_a_row_group_of_many_shards_is_read_once(
    tmp_path: Path, group: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that packs all of them, or some; and in any order the rows are those that were asked for."""
    monkeypatch.setattr(table, "_ROWS_AT_ONCE", batch)
    monkeypatch.setattr(table, "_READ_AHEAD", 1)
    images = [np.random.default_rng(number).bytes(3000) for number in range(60)]
    for name in ("a", "b"):
        rows = pa.table({"image": pa.array(images, pa.binary()), "number": range(60)})
        pq.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=group, use_dictionary=False)
    folder = Counted(tmp_path)
    parts = {name: rows_and_labels(ShardFile(folder, f"{name}.parquet"), None, 5)[0] for name in ("a", "b")}

    def read(name: str, number: int) -> None:
        found = list(read_rows(parts[name][number], ["image", "number"]))
        assert [row["number"] for row in found] == list(range(5 * number, 5 * number + 5))
        assert [row["image"] for row in found] == images[5 * number : 5 * number + 5]

    size = (tmp_path / "a.parquet").stat().st_size
    for numbers in (range(12), range(0, 12, 2)):
        folder.count = 0
        for number in numbers:
            read("a", number)
        # Each opening reads the footer.
        assert folder.count < (1.5 if group == 60 else 2.5) * size
    for name, number in [("a", 11), ("a", 3), ("b", 4), ("a", 4), ("a", 4), ("a", 9), ("a", 5), ("b", 5), ("b", 7)]:
        read(name, number)


# --- lists


def test_a_list_of_paths(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    (folder / "sub").mkdir(parents=True)
    for number in range(4):
        (folder / "sub" / f"{number}.png").write_bytes(PICTURES[number])
    rows = [
        {"file_name": f"sub/{n}.png", "label": ("b", "a", "", "b")[n], "caption": f'say "{n}",\nso'} for n in range(4)
    ]
    rows.append({"file_name": "sub/gone.png", "label": "a", "caption": ""})
    source = write_csv(folder / "list.csv", rows)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    run(source, tmp_path / "out", samples_per_shard=2)
    found = samples(tmp_path / "out")
    assert [(s.key, s.label, s.caption) for s in found] == [
        (f"list-000000{n}", (1, 0, -1, 1)[n], f'say "{n}", so') for n in range(4)
    ]
    assert [s.data for s in found] == PICTURES[:4]
    assert bad_of(tmp_path / "out") == [("sub/gone.png", "cannot be read: No such file or directory")]
    tabs = write_csv(folder / "list.tsv", rows[:4])
    run(tabs, tmp_path / "tabs", samples_per_shard=3)
    assert [(s.label, s.caption, s.data) for s in samples(tmp_path / "tabs")] == [
        (s.label, s.caption, s.data) for s in found
    ]


def test_a_list_of_urls(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """As img2dataset takes them: many at a time, in their order, and each that fails with its reason."""
    monkeypatch.setattr(download_module, "MAX_DOWNLOADED_BYTES", 50_000)
    monkeypatch.setattr(download_module, "_WAITS", (0.0, 0.0))
    tries = iter([503, 503])

    def busy(handler: BaseHTTPRequestHandler) -> None:
        status = next(tries, 200)
        send(handler, status, PICTURES[1] if status == 200 else b"")

    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        send(handler, 200, PICTURES[0])

    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x" * 10)

    def endless_redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("location", "/ok.png?after=endless")
        handler.end_headers()
        for_ever(handler, bytes(2**16), 0)

    web.answers |= {
        "/slow.png": slow,
        "/busy.png": busy,
        "/cut.png": cut,
        "/endless.png": endless_redirect,
        "/large.png": lambda handler: send(handler, 200, bytes(60_000)),
        "/moved.png": lambda handler: send(handler, 302, location="/ok.png?again=1"),
        "/to-file.png": lambda handler: send(handler, 302, location=f"file://{tmp_path}/secret.png"),
        "/to-ftp.png": lambda handler: send(handler, 302, location="ftp://127.0.0.1/secret.png"),
        "/to-no-name.png": lambda handler: send(handler, 302, location="http://a..b/x"),
        "/to-no-address.png": lambda handler: send(handler, 302, location="http://[bad/x"),
    }
    web.serve("/ok.png", PICTURES[2])
    web.serve("/page.html", b"<html>")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/x.png"
    (tmp_path / "secret.png").write_bytes(PICTURES[3])
    names = ["slow.png", "busy.png", "ok.png", "moved.png", "endless.png", "cut.png", "large.png"]
    names += ["to-file.png", "to-ftp.png", "page.html", "gone.png", "to-no-name.png", "to-no-address.png"]
    urls = [f"{web.url}/{name}" for name in names]
    urls += [nobody, f"file://{tmp_path}/secret.png", "ftp://host/x.png", "http://[::1/x.png"]
    source = write_csv(tmp_path / "laion.csv", [{"URL": url, "TEXT": f"number {n}"} for n, url in enumerate(urls)])
    run(source, tmp_path / "out")
    found = samples(tmp_path / "out")
    assert [s.data for s in found] == [PICTURES[0], PICTURES[1], PICTURES[2], PICTURES[2], PICTURES[2]]
    assert [s.caption for s in found] == [f"number {n}" for n in range(5)]
    web_reasons = {
        "cut.png": "cut off 990 bytes before its end (tried 3 times)",
        "large.png": "larger than the 50000 bytes that are fetched",
        "to-file.png": "its server answered 302 Found",
        "to-ftp.png": "its server redirects to ftp:, which is not followed",
        "to-no-name.png": "its URL cannot be understood",
        "to-no-address.png": "its URL cannot be understood",
        "page.html": "not a JPEG, PNG, WebP, GIF or BMP image, or its header is damaged",
        "gone.png": "its server answered 404 Not Found",
    }
    known = "expected a path, or s3://, gs://, az://, hf://, https://, http://"
    assert dict(bad_of(tmp_path / "out")) == {
        **{f"{web.url}/{name}": reason for name, reason in web_reasons.items()},
        nobody: "no answer: [Errno 111] Connection refused (tried 3 times)",
        f"file://{tmp_path}/secret.png": f"addresses that begin with file:// are not read; {known}",
        "ftp://host/x.png": f"addresses that begin with ftp:// are not read; {known}",
        "http://[::1/x.png": "its URL cannot be understood",
    }
    busy_requests = [path for path, _ in web.requests if path == "/busy.png"]
    assert len(busy_requests) == 3


def test_few_images_of_a_list_are_in_memory(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two downloads: four images encoded, one decoded, while the first one lets the others wait."""
    decoding: list[int] = []
    most = asked = 0

    def decode(data: bytes, **limits: Any) -> object:
        nonlocal most
        decoding.append(1)
        most = max(most, len(decoding))
        time.sleep(0.01)
        decoding.pop()
        return decode_pixels(data, **limits)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        nonlocal asked
        time.sleep(0.3)
        asked = len(web.requests)
        send(handler, 200, PICTURES[0])

    monkeypatch.setattr(source_table, "decode_pixels", decode)
    web.answers["/0.png"] = slow
    urls = [f"{web.url}/0.png", *(web.serve(f"/{number}.png", PICTURES[1]) for number in range(1, 12))]
    report = run(write_csv(tmp_path / "list.csv", [{"url": url} for url in urls]), tmp_path / "out", downloads=2)
    assert (report.samples, most) == (12, 1)
    assert asked <= 4


def test_servers_that_never_end_are_left(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a try is for all of it, whatever comes byte by byte, and for all redirects together."""
    monkeypatch.setattr(download_module, "_WAITS", ())

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for_ever(handler, b"x", 0.05)

    def drip_headers(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nx: ")
        for_ever(handler, b"x", 0.05)

    def round_and_round(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            send(handler, 302, location=f"/round.png?{time.monotonic()}")

    web.answers |= {"/drip.png": drip, "/headers.png": drip_headers, "/round.png": round_and_round}
    urls = [f"{web.url}{path}" for path in web.answers]
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    source = write_csv(tmp_path / "list.csv", [{"url": url} for url in [*urls, "0.png"]])
    run(source, tmp_path / "out", download_seconds=0.3)
    assert bad_of(tmp_path / "out") == [(url, "not there after 0.3 s (tried 1 times)") for url in urls]


def test_secrets_of_urls_are_used_and_not_kept(tmp_path: Path, web: Web) -> None:
    """A signature in a query and a password reach their server, and neither a redirect's nor any file or message."""
    with web_server() as other:
        other.serve("/a.png", PICTURES[0])
        web.answers["/moved.png"] = lambda handler: send(handler, 302, location=f"{other.url}/a.png")
        web.serve("/a b.png", PICTURES[1])
        login = web.url.replace("://", "://user:SECRET@")
        urls = [f"{login}/moved.png?sig=SECRET", f"{login}/a%20b.png?sig=SECRET#SECRET", f"{login}/gone.png?sig=SECRET"]
        urls += [f"{web.url}/a b.png?sig=SECRET", f"{web.url}/no ne.png?any=sig=SECRET"]
        web.answers["/a%20b.png"] = web.answers["/a b.png"]
        source = write_csv(tmp_path / "list.csv", [{"url": url} for url in urls])
        report = run(source, tmp_path / "out")
    assert [path for path, _ in web.requests if "sig=SECRET" in path] == [path for path, _ in web.requests]
    assert sum(headers.get("Authorization") == "Basic dXNlcjpTRUNSRVQ=" for _, headers in web.requests) == 3
    assert [headers.get("Authorization") for _, headers in other.requests] == [None]
    assert report.samples == 3
    shown = [f"{web.url.replace('://', '://***@')}/gone.png?***", f"{web.url}/no%20ne.png?***"]
    assert bad_of(tmp_path / "out") == [(url, "its server answered 404 Not Found") for url in shown]
    assert not [path.name for path in (tmp_path / "out").iterdir() if b"SECRET" in path.read_bytes()]


@pytest.mark.parametrize(
    ("labels", "found"),
    [(["0.0", "2.0", "10.0", ""], [0, 2, 10, -1]), (["0", "2", "10", "-1"], [0, 2, 10, -1]), (["b", "a"], [1, 0])],
)
def test_labels_of_a_list_are_what_they_say(tmp_path: Path, labels: list[str], found: list[int]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    source = write_csv(tmp_path / "list.csv", [{"path": "a.jpg", "label": label} for label in labels])
    run(source, tmp_path / "out")
    assert [sample.label for sample in samples(tmp_path / "out")] == found


def test_labels_and_captions_that_are_not_wanted(tmp_path: Path) -> None:
    rows = {"image": [PICTURES[0]], "labels": [[1, 2]], "text": ["a"], "other": [3]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    none = load_params(None, ["prepare.label_column=false", "prepare.caption_column=false"]).prepare
    prepare(tmp_path / "a.parquet", tmp_path / "none", none, workers=1)
    run(tmp_path / "a.parquet", tmp_path / "other", label_column="other")
    found = [(s.label, s.caption) for name in ("none", "other") for s in samples(tmp_path / name)]
    assert found == [(-1, None), (3, "a")]


@pytest.mark.parametrize("labels", [["0", "10", "N/A"], ["1.5", "2"], ["-2", "3"], ["0", "cat"]])
def test_labels_of_two_kinds_are_refused(tmp_path: Path, labels: list[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    source = write_csv(tmp_path / "list.csv", [{"path": "a.jpg", "label": label} for label in labels])
    with pytest.raises(LabelError, match="no whole numbers from 0"):
        run(source, tmp_path / "out")


def test_what_img2dataset_reports_is_a_list(tmp_path: Path, web: Web) -> None:
    """Its parquet files beside the shards have `url`, `caption` and whether it went well: another try."""
    rows = {"url": [web.serve("/1.png", PICTURES[1])], "caption": ["one"], "key": ["000000000"], "status": ["failed"]}
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    run(tmp_path, tmp_path / "out")
    assert [(s.caption, s.data) for s in samples(tmp_path / "out")] == [("one", PICTURES[1])]


def test_a_list_on_a_server_has_no_say_about_this_machine(tmp_path: Path, web: Web) -> None:
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    rows: list[dict[str, object]] = [{"path": "1.png"}, {"path": str(tmp_path / "secret.png")}, {"path": "../2.png"}]
    text = write_csv(tmp_path / "list.csv", rows).read_bytes()
    web.serve("/set/list.csv", text)
    web.serve("/set/1.png", PICTURES[1])
    web.serve("/2.png", PICTURES[2])
    run(f"{web.url}/set/list.csv", tmp_path / "out")
    assert [s.data for s in samples(tmp_path / "out")] == [PICTURES[1]]
    reason = "the path leads out of its list's folder, which is not on this machine"
    assert [found for _, found in bad_of(tmp_path / "out")] == [reason, reason]


def test_a_list_on_a_hub_and_its_images_are_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "list.csv", [{"path": "sub/0.png"}])
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    (tmp_path / "1.png").write_bytes(PICTURES[1])
    with hub_of(tmp_path / "hub") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        for number in (0, 1):
            files = {"in/list.csv": tmp_path / "list.csv", "in/sub/0.png": tmp_path / f"{number}.png"}
            hub.commit("datasets/org/data", files)
            if number == 0:
                url = "hf://datasets/org/data/in/list.csv"
                (job,) = table_source(url, find_tables(url), PrepareSettings(), ImageSettings()).jobs
        # As to another process.
        ((_, members),) = pickle.loads(pickle.dumps(job.part)).members([])
    assert members["png"] == PICTURES[0]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005.parquet", "train"),
        ("validation-00000-of-00001.parquet", "val"),
        ("unsupervised-00000-of-00001-0123456789abcdef.parquet", "unsupervised"),
        ("plain_text/test/0000.parquet", "test"),
        ("my_train_file.parquet", "train"),
        ("training.parquet", "train"),
        ("contest/latest.parquet", "else"),
    ],
)
def test_splits_by_names(name: str, split: str) -> None:
    assert split_of(name.split("/"), "else") == split


def test_a_damaged_table(tmp_path: Path) -> None:
    """What is found behind an intact footer is one error, from whatever process."""
    source = hub_table(tmp_path / "a.parquet", 40, group=40)
    data = bytearray(source.read_bytes())
    data[20:4000] = bytes(3980)
    source.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        run(source, tmp_path / "out", workers=2, samples_per_shard=10)


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ({}, {"kind": {"_type": "ClassLabel", "names": ["ant", "bee"]}}),
        ({"label": [0]}, {"label": {"_type": "ClassLabel", "names": ["ant\ud800", "bee"]}}),
    ],
    ids=["of no column", "half a surrogate pair"],
)
def test_class_names_that_cannot_be_used_are_passed_over(tmp_path: Path, columns: Any, features: Any) -> None:
    table = pa.table({"image": [png(np.zeros((5, 7, 3), np.uint8))], **columns})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet", tmp_path / "out", PrepareSettings(), workers=1).classes is None


def test_a_caption_of_a_parquet_file_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe2")])
    pq.write_table(pa.table({"image": [png(np.zeros((5, 7, 3), np.uint8))], "caption": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        prepare(tmp_path / "a.parquet", tmp_path / "out", PrepareSettings(), workers=1)
