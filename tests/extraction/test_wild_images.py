"""From a wild folder, or tars that nobody should have packed, to a store: shown as a viewer does, or skipped."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import processes
from support.targets import tree
from support.wild import Command, Marker, Member, WildImage, encoded, pack, scene, slow_bmp, wild_images

from milan_pipe.images.views import decode_jpeg
from milan_pipe.storage import location_of
from milan_pipe.targets.store import open_targets

# A view is the whole image, so that it can be compared with what a viewer shows.
SETTINGS = {
    "views.count": 2,
    "views.scale": [1, 1],
    "views.ratio": [0.1, 10],
    "views.flip": 0,
    "extract.batch_size": 8,
    "extract.threads": 1,
    "extract.teacher_threads": 1,
    "extract.device": "cpu",
    "extract.max_bad_fraction": 1,
}
WORDS = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
PNG = encoded(scene())


@pytest.fixture
def milan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    threads = torch.get_num_threads()
    yield Command(capsys, monkeypatch)
    torch.set_num_threads(threads)


def stored(targets: Path) -> list[tuple[str, int, np.ndarray]]:
    """Key, label and pixels of the second view of every sample, in order."""
    store = open_targets(targets)
    found = []
    for shard in store.shards:
        run = store.read(shard, 1, 0, store.samples(shard))
        found += [(k, int(n), decode_jpeg(j)) for k, n, j in zip(run.keys, run.label_N, run.jpegs, strict=True)]
    return found


def seems(pixels: np.ndarray, image: WildImage) -> bool:
    """Whether a stored view is what a viewer shows, but for two JPEG encodings."""
    assert image.shown is not None
    height, width, _ = image.shown.shape
    # Of what is longer than it may be, one piece is as good as another: it has one colour.
    scaled = Image.fromarray(np.ascontiguousarray(image.shown[: 10 * width, : 10 * height]))
    expected = np.asarray(scaled.resize((64, 64), Image.Resampling.BICUBIC))
    return float(np.abs(pixels.astype(float) - expected).mean()) < 8


def bad_lines(targets: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (targets / "bad_samples.jsonl").read_bytes().decode().split("\n") if line]


def test_a_wild_folder(milan: Command, tmp_path: Path) -> None:
    wild = wild_images()
    root, images = tmp_path / "wild f\u00f6lder", tmp_path / "images"
    expected: dict[tuple[str, ...], WildImage] = {}
    for number, image in enumerate(wild):
        folder = ("Caf\u00e9 v1.2",) if number % 3 == 0 and image.name != "plain.jpg" else ()
        expected[*folder, image.name] = image
        path = root.joinpath(*folder, image.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.data)
    for hidden in (".hidden.png", "._plain.jpg", "Caf\u00e9 v1.2/.a.png"):
        (root / hidden).write_bytes(PNG)
    (root / "a.pkl").write_bytes(b"\x80")
    (root / "link.png").symlink_to(root / "plain.jpg")
    (root / "broken link.png").symlink_to(root / "gone.png")
    expected["link.png",] = next(image for image in wild if image.name == "plain.jpg")
    expected["broken link.png",] = WildImage(name="broken link.png", data=b"", reason="cannot be read")
    ordered = [expected[parts] for parts in sorted(expected)]
    good = [image for image in ordered if not image.reason]

    prepared = milan("prepare", root, images, "--set", "prepare.samples_per_shard=25", "--json")
    assert prepared.code == 0, prepared.err
    assert prepared.report["samples"] == len(good)
    lines = [json.loads(line) for line in (images / "bad_samples.jsonl").read_bytes().decode().split("\n") if line]
    found = {line["file"]: line["reason"] for line in lines}
    assert found.keys() == {"/".join(parts) for parts, image in expected.items() if image.reason}
    wrong = {
        name: found[name] for parts, p in expected.items() if p.reason not in found.get(name := "/".join(parts), "")
    }
    assert wrong == {}

    trees = {}
    for store_format in ("zarr", "webdataset"):
        targets = tmp_path / store_format
        done = milan("extract-targets", images, targets, "--format", store_format, *WORDS, "--json")
        assert done.code == 0, done.err
        assert (done.report["samples"], done.report["bad"], done.report["shards"]) == (len(good), 0, 3)
        assert milan("verify-targets", targets).code == 0
        found = stored(targets)
        assert len({key for key, _, _ in found}) == len(found) == len(good)
        assert [p.name for p, (_, _, pixels) in zip(good, found, strict=True) if not seems(pixels, p)] == []
        labels = [0 if len(parts) > 1 else -1 for parts in sorted(expected) if not expected[parts].reason]
        assert [label for _, label, _ in found] == labels
        trees[store_format] = tree(targets)
        other = tmp_path / f"from {store_format}"
        into = "webdataset" if store_format == "zarr" else "zarr"
        assert milan("convert-targets", targets, other, "--format", into).code == 0
    assert tree(tmp_path / "from zarr") == trees["webdataset"]
    assert tree(tmp_path / "from webdataset") == trees["zarr"]


# --- tars by hand -------------------------------------------------------------------------------------------------


def wild_tars(folder: Path, outside: Path) -> tuple[list[WildImage], list[str], dict[str, str]]:
    """Two shards. Returns images that are read, their keys, and key and reason of what is skipped.

    What would be made by unpickling, or by unpacking, lies in `outside`.
    """
    numbered = [(f"{number:02d} {image.stem}", image) for number, image in enumerate(wild_images())]
    files = [
        (key, image, Member(name=f"{key}.{image.name.rpartition('.')[2]}", data=image.data)) for key, image in numbered
    ]
    plain = WildImage(name="plain.png", data=PNG, shown=scene())
    gone = str(outside / "absolute.png")
    marker = Member(name="", data=pickle.dumps(Marker(outside / "unpickled")))
    odd = ["line\nbreak", "sep\u2028arator", "tab\tstop", "./dot", "a/b/c", "d" * 90 + "/" + "e" * 200, "x.y/z"]
    skipped = {
        "../up": "'..'",
        "x/../../../up": "'..'",
        gone.removesuffix(".png"): "absolute",
        "symlink": "a link or special file",
        "hardlink": "a link or special file",
        "device": "a link or special file",
        "pipe": "a link or special file",
        "twice": "duplicate key",
        "two": "two images of one key",
        "label": "cls is not a whole number",
        "holiday.2020.jpg": "ends at the first dot",
        "holiday.2021.JPG": "ends at the first dot",
    }
    second = [
        *(Member(name=f"{key}.png", data=PNG) for key in odd),
        Member(name="lonely.pkl", data=marker.data),
        Member(name="image.pkl", data=marker.data),
        Member(name="image.png", data=PNG),
        Member(name="image.pth", data=marker.data),
        Member(name="twice.png", data=PNG),
        Member(name="../up.png", data=PNG),
        Member(name="x/../../../up.png", data=PNG),
        Member(name=gone, data=PNG),
        Member(name="symlink.png", kind=tarfile.SYMTYPE, link="/etc/hostname"),
        Member(name="hardlink.png", kind=tarfile.LNKTYPE, link="image.png"),
        Member(name="device.png", kind=tarfile.CHRTYPE),
        Member(name="pipe.png", kind=tarfile.FIFOTYPE),
        Member(name="folder.png", kind=tarfile.DIRTYPE),
        Member(name="twice.png", data=encoded(scene()[::-1].copy())),
        Member(name="two.png", data=PNG),
        Member(name="two.jpg", data=PNG),
        Member(name="label.png", data=PNG),
        Member(name="label.cls", data=b"cat"),
        Member(name="holiday.2020.jpg", data=PNG),
        Member(name="holiday.2021.JPG", data=PNG),
        Member(name=".hidden.png", data=PNG),
        Member(name="x/._hidden.png", data=PNG),
        Member(name="notes.md", data=b"#"),
    ]
    half = len(files) // 2
    pack(folder / "wild-000000.tar", [member for _, _, member in files[:half]])
    pack(folder / "wild-000001.tar", [*second, *(member for _, _, member in files[half:])])
    read = [(key, image) for key, image, _ in files if not image.reason]
    cut = sum(not image.reason for _, image, _ in files[:half])
    mine = [(key, plain) for key in (*odd, "image", "twice")]
    keys, shown = zip(*[*read[:cut], *mine, *read[cut:]], strict=True)
    skipped |= {key: image.reason for key, image, _ in files if image.reason}
    return list(shown), list(keys), skipped


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_tars_by_hand(milan: Command, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, outside = tmp_path / "images", tmp_path / "outside"
    outside.mkdir()
    here = tmp_path / "a" / "b" / "c"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    shown, keys, skipped = wild_tars(images, outside)
    before = everything_below(tmp_path)

    # A first run, and one that finds shards of the first: neither may pass for a good one.
    for _ in range(2):
        strict = milan("extract-targets", images, tmp_path / "zarr", *WORDS, "--set", "extract.max_bad_fraction=0.05")
        assert re.search(r"\d+ of \d+ images are unreadable, more than extract\.max_bad_fraction 0\.05", strict.error)
    trees = {}
    for store_format in ("zarr", "webdataset"):
        targets = tmp_path / store_format
        done = milan("extract-targets", images, targets, "--format", store_format, *WORDS, "--json")
        assert done.code == 0, done.err
        assert (done.report["samples"], done.report["bad"]) == (len(keys), len(skipped))
        assert milan("verify-targets", targets).code == 0
        found = stored(targets)
        assert [key for key, _, _ in found] == keys
        assert [k for p, (k, _, pixels) in zip(shown, found, strict=True) if not seems(pixels, p)] == []
        lines = bad_lines(targets)
        assert sorted(line["key"] for line in lines) == sorted(skipped)
        assert [line for line in lines if skipped[line["key"]] not in line["reason"]] == []
        order = [(line["shard"], line["key"]) for line in lines]
        assert order == sorted(order)
        assert all("\n" not in line["reason"] and len(line["reason"]) < 200 for line in lines)
        assert {line["source"] for line in lines} == {"wild-000000.tar", "wild-000001.tar"}
        trees[store_format] = tree(targets)
    assert milan("convert-targets", tmp_path / "zarr", tmp_path / "other", "--format", "webdataset").code == 0
    assert tree(tmp_path / "other") == trees["webdataset"]

    # Two processes, from a bucket to a bucket.
    for path, data in tree(images).items():
        location_of(f"{bucket}/images").write(path, data)
    words = ["extract-targets", f"{bucket}/images", f"{bucket}/t", *WORDS, "--workers", "2"]
    process = processes.run(
        [sys.executable, "-m", "milan_pipe", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert tree(f"{bucket}/t") == trees["zarr"]
    # Dask keeps two locks there for whoever comes next.
    left = [path.name for path in Path(tempfile.gettempdir()).rglob("*") if not path.name.endswith(".lock")]
    assert left in ([], ["dask-scratch-space"])

    stores = {tmp_path / name for name in ("zarr", "webdataset", "other")}
    made = {path for path in everything_below(tmp_path) - before if not stores & {path, *path.parents}}
    assert made == set()


def test_an_image_that_takes_too_long_does_not_hold_up_its_shard(milan: Command, tmp_path: Path) -> None:
    names = ["a.png", "b.png", "slow.png", "z.png"]
    pack(tmp_path / "a.tar", [Member(name=n, data=slow_bmp(5_000_000) if n == "slow.png" else PNG) for n in names])
    limited = [*WORDS, "--set", "images.max_seconds=0.5"]
    done = milan("extract-targets", tmp_path / "a.tar", tmp_path / "t", *limited, "--json")
    assert (done.code, done.report["samples"], done.report["bad"]) == (0, 3, 1), done.err
    assert [key for key, _, _ in stored(tmp_path / "t")] == ["a", "b", "z"]
    (line,) = bad_lines(tmp_path / "t")
    assert line["key"] == "slow"
    assert re.fullmatch(
        r"not decoded after 0\.5\d* s of one processor, more than images\.max_seconds 0\.5", line["reason"]
    )


def test_tars_of_no_use_are_reported_and_the_others_are_done(milan: Command, tmp_path: Path) -> None:
    images, targets = tmp_path / "images", tmp_path / "targets"
    whole = pack(images / "0.tar", [Member(name=f"{n}.png", data=PNG) for n in range(3)])
    data = whole.read_bytes()
    spoilt = bytearray(data)
    spoilt[spoilt.index(b"1.png")] ^= 1
    reasons = {
        "1": (b"", "is an empty file"),
        "2": (pack(tmp_path / "none.tar", []).read_bytes(), "holds no images"),
        "3": (gzip.compress(data), "is not a plain tar file (a compressed one must be unpacked first)"),
        "4": (data[: data.index(b"1.png") + 700], "is cut or damaged at byte"),
        "5": (bytes(spoilt), "is cut or damaged at byte"),
    }
    for name, (content, _) in reasons.items():
        (images / f"{name}.tar").write_bytes(content)
    pack(images / "6.tar", [Member(name=f"{n}.PNG", data=PNG) for n in range(3, 6)])
    failed = milan("extract-targets", images, targets, *WORDS)
    assert "5 of 7 shards failed" in failed.error
    assert "2 shards are committed; repair these and run the same command again" in failed.error
    for name, (_, reason) in reasons.items():
        assert re.search(rf"00000{name}: [^;]*{name}\.tar {re.escape(reason)}", failed.error), (name, failed.error)
    assert open_targets_names(targets) == ("000000", "000006")
    assert not list(targets.glob(".*"))
    unfinished = milan("verify-targets", targets, "--json")
    assert unfinished.code == 1
    assert ["extraction has not come to its end" in found["what"] for found in unfinished.report["problems"]] == [True]

    for name in reasons:
        pack(images / f"{name}.tar", [Member(name=f"{name}-{n}.png", data=PNG) for n in range(2)])
    done = milan("extract-targets", images, targets, *WORDS, "--json")
    assert (done.code, done.report["skipped"], done.report["shards"]) == (0, 2, 7)
    assert milan("verify-targets", targets).code == 0
    assert milan("extract-targets", images, tmp_path / "fresh", *WORDS).code == 0
    assert tree(targets) == tree(tmp_path / "fresh")


def open_targets_names(targets: Path) -> tuple[str, ...]:
    with pytest.warns(RuntimeWarning, match=r"no manifest\.json"):
        return open_targets(targets).shards


def test_only_unreadable_images(milan: Command, tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [Member(name="a.jpg", data=b"text"), Member(name="b.v2.jpg", data=PNG)])
    found = milan("extract-targets", tmp_path / "a.tar", tmp_path / "t", *WORDS).error
    assert re.search(r"a\.tar has no readable image \(2 skipped; the first: ", found)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"text")
    found = milan("prepare", tmp_path / "in", tmp_path / "out").error
    assert "none of the 1 images" in found
    assert "a.jpg: not a JPEG" in found
    os.truncate(tmp_path / "in" / "a.jpg", 0)
    assert "empty file" in milan("prepare", tmp_path / "in", tmp_path / "out").error
