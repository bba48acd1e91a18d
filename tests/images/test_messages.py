"""What the errors of images say, word for word. Paths are relative: each case runs in a folder of its own."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.images import bad_of, png, write_tar
from support.messages import Case, require_message

from milan_pipe.config.images import PrepareSettings
from milan_pipe.errors import DataError, LabelError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.images.index import PREPARE_MARKER, ImageIndex, begin_index, read_index, write_index
from milan_pipe.images.masked import MaskRule, decode_mask, read_classes
from milan_pipe.images.prepare import prepare
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard

PNG = png(np.zeros((5, 7, 3), np.uint8))
MEMBERS = {"a.png": PNG, "b.png": PNG}


def read(path: str) -> None:
    list(read_shard(path, lambda *_: None))


def shard(path: str, change: Callable[[bytes], bytes]) -> None:
    """Read a shard of two images whose bytes were changed."""
    file = write_tar(Path(path), MEMBERS)
    file.write_bytes(change(file.read_bytes()))
    read(path)


def packed() -> None:
    with tarfile.open("a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    read("a.tar")


def expand(spec: str, *files: str) -> None:
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    expand_shards(spec)


def folder(*files: str) -> None:
    Path("in").mkdir()
    expand("in", *(f"in/{name}" for name in files))


def broken_link() -> None:
    Path("in").mkdir()
    Path("in/a.tar").symlink_to("gone.tar")
    expand_shards("in")


def pipe() -> None:
    os.mkfifo("pipe.tar")
    expand_shards("pipe.tar")


def pack(source: str, *files: str, into: str = "out") -> None:
    """Prepare a folder of these files."""
    for name in files:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if path.suffix == ".png" else b"")
    prepare(source, into, PrepareSettings(train_scenes=2, test_scenes=0), workers=1)


def pack_two_sources() -> None:
    pack("one", "one/a.png")
    pack("two", "two/a.png")


def table(*names: str, into: str = "a.parquet", **columns: object) -> None:
    """Prepare from a parquet file of these columns, and copies of it."""
    for name in (into, *names):
        pq.write_table(pa.table(columns), name)
    pack(into)


def listed(text: str, name: str = "a.csv", **settings: object) -> None:
    """Prepare from a list of this text."""
    Path(name).write_text(text)
    prepare(name, "out", PrepareSettings(**settings), workers=1)  # type: ignore[arg-type]


def classes_that_differ() -> None:
    for name, classes in (("a", ["x"]), ("b", ["y"])):
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        rows = pa.table({"image": [PNG], "label": [0]}).replace_schema_metadata(metadata)
        Path("in").mkdir(exist_ok=True)
        pq.write_table(rows, f"in/{name}.parquet")
    pack("in")


def index(change: Callable[[str], str]) -> None:
    write_index(Path(), ImageIndex(shards=(), classes=None, source={}))
    Path("index.json").write_text(change(Path("index.json").read_text()))
    read_index(Path())


NO_TAR = "a.tar is not a plain tar file (a compressed one must be unpacked first)"
BRACES = "are not understood; expected {000000..000127} or {train,test}"
SOURCE = "a folder of images, parquet files, a list of images (.csv, .tsv) or the word 'demo'"
FILE = f"is a file, expected {SOURCE}"
CASES: dict[str, Case] = {
    # Shards that are read.
    "shard missing": (lambda: read("a.tar"), MissingError, "shard a.tar is not there"),
    "shard empty": (lambda: shard("a.tar", lambda _: b""), DataError, "shard a.tar is an empty file"),
    "no tar": (lambda: shard("a.tar", lambda _: PNG * 20), DataError, NO_TAR),
    "compressed": (packed, DataError, NO_TAR),
    "cut": (
        lambda: shard("a.tar", lambda data: data[:1400]),
        DataError,
        "shard a.tar is cut or damaged at byte 1024; copy or prepare it again",
    ),
    "damaged header": (
        lambda: shard("a.tar", lambda data: data.replace(b"b.png", b"c.png")),
        DataError,
        "shard a.tar is cut or damaged at byte 1024; copy or prepare it again",
    ),
    "no images in a tar": (
        lambda: read(str(write_tar(Path("a.tar"), {"a.txt": b"x"}))),
        DataError,
        "a.tar holds no images; expected members that end in jpg, jpeg, png, webp",
    ),
    "empty tar": (
        lambda: read(str(write_tar(Path("a.tar"), {}))),
        DataError,
        "a.tar holds no images; expected members that end in jpg, jpeg, png, webp",
    ),
    "folder as a shard": (lambda: read("."), DataError, "shard . cannot be read: not a regular file"),
    # Shards that are looked for.
    "some missing": (
        lambda: expand("t-{0..4}.tar", "t-0.tar", "t-1.tar", "t-2.tar"),
        MissingError,
        "t-3.tar is not there (2 of the 5 shards of t-{0..4}.tar are missing)",
    ),
    "downwards": (
        lambda: expand("t-{3..1}.tar"),
        DataError,
        "{3..1} in t-{3..1}.tar must run upwards and over less than 1000000 numbers",
    ),
    "too many numbers": (
        lambda: expand("t-{0..99999999}.tar"),
        DataError,
        "{0..99999999} in t-{0..99999999}.tar must run upwards and over less than 1000000 numbers",
    ),
    "too many shards": (
        lambda: expand("{0..999}{0..1000}.tar"),
        DataError,
        "{0..999}{0..1000}.tar names more than 1000000 shards",
    ),
    "no such braces": (lambda: expand("t-{abc}.tar"), DataError, f"braces in t-{{abc}}.tar {BRACES}"),
    "nested braces": (lambda: expand("t-{0,{x}}.tar"), DataError, f"braces in t-{{0,{{x}}}}.tar {BRACES}"),
    "open braces": (lambda: expand("t-{0..1.tar"), DataError, f"braces in t-{{0..1.tar {BRACES}"),
    "no match": (lambda: expand("q-*.tar"), MissingError, "no file matches q-*.tar"),
    "nothing": (
        lambda: expand("gone"),
        MissingError,
        "gone is not there; expected a folder of .tar shards, a shard, braces or a glob",
    ),
    "command": (
        lambda: expand("pipe:rm -rf x"),
        DataError,
        "pipe:rm -rf x is a command, which is not run; give a folder of .tar shards, a shard, or a glob",
    ),
    "no name": (
        lambda: expand(""),
        DataError,
        "no image shards were named; give a folder of .tar shards, a shard, or a glob",
    ),
    "pattern in a bucket's name": (
        lambda: expand("s3://*/a.tar"),
        DataError,
        "s3://*/a.tar has a pattern in its bucket; patterns are for what lies in a bucket",
    ),
    "no bucket": (
        lambda: expand("s3:///a.tar"),
        SettingError,
        "s3:// cannot be opened; expected a path, or s3://, gs://, az:// or https:// with a bucket or host",
    ),
    "other scheme": (
        lambda: expand("ftp://host/a.tar"),
        SettingError,
        "ftp://host cannot be opened; expected a path, or s3://, gs://, az:// or https:// with a bucket or host",
    ),
    "empty folder": (folder, DataError, "in is empty; expected .tar shards, which `milan-pipe prepare` writes"),
    "other files": (
        lambda: folder("x.csv"),
        DataError,
        "in holds no .tar shards; found 1 other files, as x.csv",
    ),
    "images alone": (
        lambda: folder("a.JPG"),
        DataError,
        "in holds 1 images and no .tar shards; run `milan-pipe prepare` to pack images into shards",
    ),
    "not prepared to the end": (
        lambda: folder("a.tar", PREPARE_MARKER),
        DataError,
        "in is not complete: `milan-pipe prepare` still runs or was stopped; run it again",
    ),
    "broken link": (broken_link, MissingError, "in/a.tar is a link to a file that is not there"),
    "pipe": (
        pipe,
        DataError,
        "pipe.tar is not a regular file; a shard is a tar file, remove this or rename it",
    ),
    "web folder": (
        lambda: expand("http://127.0.0.1:9/set"),
        DataError,
        "http://127.0.0.1:9/set cannot be listed, as no web server can; name its shards one by one or by braces, "
        "as https://host/folder/train-{000000..000127}.tar",
    ),
    # `prepare`.
    "near the word": (lambda: pack("dmeo"), MissingError, "source 'dmeo' is not there; did you mean 'demo'?"),
    "no source": (
        lambda: pack("gone"),
        MissingError,
        f"source 'gone' is not there; give {SOURCE}",
    ),
    "empty source": (
        lambda: (Path("in").mkdir(), pack("in")),
        DataError,
        "source in is empty; expected images (jpg, jpeg, png, webp), in class folders or right there",
    ),
    "source without images": (
        lambda: pack("in", "in/sub/x.csv"),
        DataError,
        "source in holds no images; found 1 other files, as sub/x.csv; expected jpg, jpeg, png, webp; is "
        "sub/x.csv the list of images? Name it as the source",
    ),
    "source of shards": (
        lambda: pack("in", "in/a.tar"),
        DataError,
        "source in holds .tar shards and no images; use it as images without `prepare`",
    ),
    "source is a shard": (
        lambda: pack("a.tar", "a.tar"),
        DataError,
        f"source a.tar {FILE}; it is a shard already, use it as images without `prepare`",
    ),
    "source is an image": (
        lambda: pack("a.png", "a.png"),
        DataError,
        f"source a.png {FILE}; name the folder it lies in",
    ),
    "splits beside classes": (
        lambda: pack("in", "in/train/1.png", "in/test/1.png", "in/bus/1.png"),
        DataError,
        "source in holds the splits train, test beside bus; expected only split folders or only class folders: "
        "move the rest elsewhere",
    ),
    "nothing readable": (
        lambda: pack("in", "in/a.jpg"),
        DataError,
        "none of the 1 images in in can be read; the first is a.jpg: empty file",
    ),
    "into itself": (
        lambda: pack("in", "in/a.png", into="in"),
        DataError,
        "source and images are the same folder, in; choose another one to write shards into",
    ),
    "into a file": (
        lambda: pack("demo", "a.png", into="a.png"),
        StoreError,
        "a.png is a file; expected a folder to write shards into",
    ),
    "into foreign shards": (
        lambda: pack("demo", "out/mine.tar"),
        MismatchError,
        "out holds 1 shards that `prepare` did not write there, as mine.tar; choose an empty folder, or move them away",
    ),
    "into shards of another source": (
        pack_two_sources,
        MismatchError,
        "out holds shards of one, the source is two; choose another folder, or delete this one",
    ),
    # `prepare` from tables.
    "table without images": (
        lambda: table(text=["a"], number=[1]),
        DataError,
        "a.parquet has no column of images among text, number; expected bytes of images, as in `image`, or their paths "
        "or URLs, as in `path` or `url`: name it with prepare.image_column",
    ),
    "column of images that is none": (
        lambda: listed("a,b\n1,2\n", image_column="c"),
        SettingError,
        "prepare.image_column is 'c', a.csv has the columns a, b",
    ),
    "several columns of images": (
        lambda: table(left=[PNG], right=[PNG]),
        DataError,
        "a.parquet has several columns of images, left, right; choose with prepare.image_column",
    ),
    "no parquet": (
        lambda: pack("a.parquet", "a.parquet"),
        DataError,
        "a.parquet cannot be read as parquet: ...; copy it again",
    ),
    "parquet without rows": (
        lambda: table(image=pa.array([], pa.binary())),
        DataError,
        "source a.parquet has no rows; expected one for each image",
    ),
    "empty list": (
        lambda: listed(""),
        DataError,
        "a.csv has no column of images among none at all; expected bytes of images, as in `image`, or their paths or "
        "URLs, as in `path` or `url`: name it with prepare.image_column",
    ),
    "list of a header": (
        lambda: listed("url\n"),
        DataError,
        "source a.csv has no rows; expected one for each image",
    ),
    "list of another encoding": (
        lambda: (Path("a.csv").write_bytes(b"url\n\xff\n"), prepare("a.csv", "out", PrepareSettings(), workers=1)),
        DataError,
        "a.csv cannot be read as csv: ...; copy it again",
    ),
    **{
        f"list with {name}": (
            lambda text=text: listed(text),
            DataError,
            f"a.csv: the row that begins in line {line} is longer than the 131072 bytes that are read; look for a "
            "quote that is not closed, or shorten it",
        )
        for name, text, line in [
            ("a long field", f"path\na.png\n{'x' * 2**17}\n", 3),
            ("a long header", "x," * 2**17, 1),
            ("a quote that is not closed", 'path,text\na.png,"b\n' + "c.png,d\n" * 2**15, 2),
        ]
    },
    "table at a signed address": (
        lambda: pack("https://127.0.0.1:9/a.parquet?sig=SECRET"),
        DataError,
        "source https://127.0.0.1:9/a.parquet?*** is a web address with a query, as signed ones have; tables are read "
        "from addresses without one: download it, and name the file",
    ),
    "label that is a fraction": (
        lambda: table(image=[PNG], label=[0.5]),
        LabelError,
        "a.parquet: '0.5' in column label is no label; expected whole numbers from 0, names, or nothing (-1) where "
        "there is none",
    ),
    "negative label": (
        lambda: table(image=[PNG], label=[-2]),
        LabelError,
        "a.parquet: '-2' in column label is no label; expected whole numbers from 0, names, or nothing (-1) where "
        "there is none",
    ),
    **{
        f"labels that are {name}": (
            lambda values=values: table(image=[PNG], labels=values),
            LabelError,
            f"a.parquet: column labels has values of type {kind}, no labels; expected whole numbers from 0, or names: "
            "name another one with prepare.label_column=NAME, or none with prepare.label_column=false",
        )
        for name, values, kind in [
            ("lists of numbers", [[1, 2]], "list"),
            ("lists of names", [["a", "b"]], "list of text"),
            ("structs", [{"a": 1}], "struct"),
            ("true and false", [True], "bool"),
            ("bytes", [b"a"], "bytes"),
        ]
    },
    "other classes": (
        classes_that_differ,
        DataError,
        "in/b.parquet has other classes than in/a.parquet; prepare them one by one, or correct one",
    ),
    "list of what is nowhere": (
        lambda: listed("path\ngone.png\n"),
        DataError,
        "none of the 1 images in a.csv can be read; the first is gone.png: cannot be read: No such file or directory",
    ),
    "list elsewhere": (
        lambda: pack("ftp://host/a.csv"),
        SettingError,
        "ftp://host cannot be opened; expected a path, or s3://, gs://, az:// or https:// with a bucket or host",
    ),
    "folder on a web server": (
        lambda: pack("https://127.0.0.1:9/images"),
        DataError,
        "source https://127.0.0.1:9/images is a URL, expected a local folder of images, or parquet files, which may "
        "lie anywhere; copy the images to a disk. Shards in a bucket are used as images without `prepare`",
    ),
    # index.json.
    "no index": (
        lambda: read_index(Path()),
        MissingError,
        "./index.json is not there; `milan-pipe prepare` writes it as its last step",
    ),
    "damaged index": (
        lambda: index(lambda text: text[:10]),
        DataError,
        "./index.json is damaged (...); run `milan-pipe prepare` again",
    ),
    "newer index": (
        lambda: index(lambda text: text.replace('"version": 1', '"version": 2')),
        MismatchError,
        "./index.json has version 2, this package reads version 1; run `milan-pipe prepare` again",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])


DEEP = "[" * 100_000


def test_a_class_list_that_is_too_deep_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(DEEP)
    with pytest.raises(DataError, match=r"class list .* cannot be read"):
        read_classes(tmp_path / "classes.json")


def test_what_an_earlier_prepare_said_may_be_damaged(tmp_path: Path) -> None:
    (tmp_path / PREPARE_MARKER).write_text(DEEP)
    begin_index(tmp_path, {"kind": "demo"})
    assert json.loads((tmp_path / PREPARE_MARKER).read_text()) == {"kind": "demo"}


def test_a_mask_that_says_it_is_huge_is_one_error() -> None:
    data = png(np.zeros((5, 7), np.uint8))
    header = b"IHDR" + struct.pack(">II", 2**15, 2**15) + data[24:29]
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(LabelError, match="mask of 'k'"):
        decode_mask(data, MaskRule(classes=2, ignore_index=255, zero_is_ignored=False), (5, 7), "k")


def test_a_path_with_a_zero_byte_is_an_image_that_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "list.csv").write_bytes(b"path\na.png\nb\0.png\n")
    assert prepare(tmp_path / "list.csv", tmp_path / "out", PrepareSettings(), workers=1).bad == 1
    assert [reason for _, reason in bad_of(tmp_path / "out")] == ["cannot be read: embedded null byte"]
