"""Odd images, odd tars, odd names: read exactly, or skipped with a reason; never a silent loss."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.s3 import Proxy
from webdataset.tariterators import base_plus_ext

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.images import tar
from milan_pipe.images.decode import decode_image, decode_pixels
from milan_pipe.images.index import PREPARE_MARKER, ImageIndex, ShardRecord, read_index, write_index
from milan_pipe.images.labelled import labelled_images
from milan_pipe.images.shards import ShardFile, expand_shards
from milan_pipe.images.tar import Sample, read_shard, split_member_name
from milan_pipe.storage import location_of


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


PNG = encoded(Image.fromarray(noise(5, 7)))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(path: ShardFile | str | Path) -> tuple[list[Sample], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    return list(read_shard(path, lambda key, reason: bad.append((key, reason)))), bad


# --- decode_image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_lossless_kinds_keep_every_pixel(kind: str) -> None:
    pixels = noise(9, 13)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(encoded(Image.fromarray(pixels), kind, **options))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_one_pixel() -> None:
    assert np.asarray(decode_image(encoded(Image.new("RGB", (1, 1), (3, 5, 7))))).tolist() == [[[3, 5, 7]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_turn_equals_what_exif_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Image.fromarray(noise(8, 16))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    flat = np.asarray(decode_image(encoded(source, kind, **options)))
    turned = np.asarray(decode_image(encoded(source, kind, exif=exif, **options)))
    # EXIF 2.3, tag 0x0112: where row 0 and column 0 of the stored image lie when it is seen.
    expected = {
        1: flat,
        2: flat[:, ::-1],
        3: flat[::-1, ::-1],
        4: flat[::-1],
        5: flat.transpose(1, 0, 2),
        6: np.rot90(flat, -1),
        7: flat[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(flat, 1),
    }[orientation]
    np.testing.assert_array_equal(turned, expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_reason_to_lose_a_image() -> None:
    data = encoded(Image.fromarray(noise(8, 8)), "JPEG")
    payload = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken"
    damaged = data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]
    np.testing.assert_array_equal(np.asarray(decode_image(damaged)), np.asarray(decode_image(data)))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB 0", "RGB 1", "RGB 2"])
@given(height=st.integers(1, 40), width=st.integers(1, 40), quality=st.integers(1, 100))
@settings(deadline=None, max_examples=15)
def test_a_jpegs_pixels_are_pillows(
    mode: str, progressive: bool, orientation: int, height: int, width: int, quality: int
) -> None:
    mode, _, subsampling = mode.partition(" ")
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Image.fromarray(noise(height, width)).convert(mode)
    options = {"quality": quality, "progressive": progressive, "subsampling": int(subsampling or 0), "exif": exif}
    data = encoded(source, "JPEG", **options)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    asked: list[tuple[int, int]] = []

    def shrink(*size: int) -> int:
        asked.append(size)
        return 2

    np.testing.assert_array_equal(decode_pixels(data), expected)
    half = decode_pixels(data, shrink)
    assert asked == [expected.shape[:2]]
    sides = expected.shape[:2]
    whole = orientation == 6 and sides[1] % 2
    assert half.shape[:2] == (sides if whole else tuple(-(-side // 2) for side in sides))


def test_cmyk() -> None:
    image = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = np.asarray(image)[4, 4].tolist()
    assert image.mode == "RGB"
    assert red > 245
    assert max(green, blue) < 10


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = np.array([[0, 255, 256, 257], [32768, 40000, 65279, 65535]], np.uint16)
    image = decode_image(encoded(Image.fromarray(values)))
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(image), expected)


def png_by_hand(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour() -> None:
    rows = b"\0" + struct.pack(">6H", 65535, 256, 0, 1000, 2000, 30000)
    pixels = np.asarray(decode_image(png_by_hand(2, 1, 16, 2, rows)))
    assert pixels.tolist() == [[[255, 1, 0], [3, 7, 117]]]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white(mode: str) -> None:
    pixels = np.asarray(decode_image(encoded(Image.new(mode, (3, 2), 255))))
    assert pixels.shape == (2, 3, 3)
    assert (pixels == 255).all()


def test_palette_without_transparency() -> None:
    colours = Image.fromarray(noise(4, 4)).quantize(8)
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(colours))), np.asarray(colours.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency_lies_on_white(kind: str) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((0, 0), 0)
    pixels = np.asarray(decode_image(encoded(image, kind, transparency=0)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[3, 3].tolist() == [0, 0, 200]


def test_alpha_lies_on_white() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    assert np.asarray(decode_image(encoded(Image.fromarray(pixels))))[0, :, 0].tolist() == [255, 127, 0]
    grey = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")
    assert np.asarray(decode_image(encoded(grey)))[0, :, 1].tolist() == [255, 9]


def test_one_transparent_colour_without_palette() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    pixels = np.asarray(decode_image(encoded(image, transparency=(1, 2, 3))))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (6, 6), (250, 0, 0)), Image.new("RGB", (6, 6), (0, 0, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert np.asarray(decode_image(data))[3, 3].tolist() == [250, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8])
def test_truncated_images_are_errors_of_one_line(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(noise(40, 40)), kind)
    with pytest.raises(DataError) as caught:
        decode_image(data[: int(share * len(data))])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n", pickle.dumps([1])])
def test_other_formats_are_refused_with_the_same_words_each_time(data: bytes) -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            decode_image(data)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_raise_nothing_but_data_error() -> None:
    rng = np.random.default_rng(0)
    whole = [encoded(Image.fromarray(noise(12, 12)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    for number in range(300):
        data = bytearray(whole[number % len(whole)])
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        with contextlib.suppress(DataError):
            assert decode_image(bytes(data)).mode == "RGB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 13400, 60000])
def test_bombs_are_refused_before_they_are_unpacked(side: int) -> None:
    with pytest.raises(DataError, match=r"pixels, more than images\.max_pixels 89478485$"):
        decode_image(png_by_hand(side, side, 8, 2, b""))


# --- read_shard


def test_samples_with_labels_and_captions(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("cat/001.JPG", PNG),
            ("cat/001.cls", b" 3\n"),
            ("cat/001.txt", "eine Katze, größer".encode()),
            ("./b.left.png", b"not the image"),
            ("./b.png", PNG),
            ("c.json", b'{"label": 7, "caption": "seven"}'),
            ("c.webp", PNG),
            ("d.jpeg", PNG),
            ("d.json", b'{"cls": 1, "txt": "no"}'),
            ("d.txt", b"yes"),
            ("d.cls", b"-1"),
            ("e v.1.png", b"extension is 1.png"),
            ("e v.2.PNG", b"so it is no image of its own"),
            ("x/.hidden.png", b"is passed over"),
            ("ünï côde.png", PNG),
        ],
    )
    samples, bad = read_all(shard)
    assert [key for key, reason in bad if "first dot" in reason] == ["e v.1.png", "e v.2.PNG"]
    assert len(bad) == 2
    assert [(s.key, s.label, s.caption) for s in samples] == [
        ("cat/001", 3, "eine Katze, größer"),
        ("./b", -1, None),
        ("c", 7, "seven"),
        ("d", -1, "yes"),
        ("ünï côde", -1, None),
    ]
    assert all(s.data == PNG for s in samples)


def test_keys_are_those_of_webdataset() -> None:
    names = [
        "a.png",
        "x/a.PNG",
        "x.y/a.png",
        "./q.png",
        "x/.hidden.png",
        ".png",
        "a b/ü.png",
        "n/a.b.png",
        "plain",
        "x/",
    ]
    for name in names:
        prefix, suffix = base_plus_ext(name)
        expected = (prefix or "", (suffix or "").lower())
        assert split_member_name(name) == expected


@given(st.text("ab./_", max_size=12))
@settings(deadline=None, max_examples=500)
def test_any_name_has_the_key_of_webdataset(name: str) -> None:
    prefix, suffix = (None, None) if re.match(r"__[^/]*__($|/)", name) else base_plus_ext(name)
    assert split_member_name(name) == (prefix or "", (suffix or "").lower())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["/" * 2**20, "a/" * 2**19 + "a", "." * 2**20, "__" * 2**19 + "/a.png"])
def test_a_long_name_takes_no_square_of_its_length(name: str) -> None:
    assert split_member_name(name) == ("", "")


def long_headers(kind: str) -> bytes:
    """The begin of a tar whose first member has a header of 3 MB."""
    info = tarfile.TarInfo("a.png")
    if kind == "long name":
        info.name = "a" * 3_000_000
        return info.tobuf(tarfile.GNU_FORMAT)
    if kind == "records":
        info.pax_headers = {"a": "a" * 3_000_000}
        return info.tobuf(tarfile.PAX_FORMAT)
    if kind == "digits":
        head = tarfile.TarInfo("a")
        head.type, head.size = tarfile.XHDTYPE, 2**19
        return head.tobuf(tarfile.GNU_FORMAT) + b"1" * 2**19 + info.tobuf(tarfile.GNU_FORMAT)
    if kind == "many names":
        info.name = "a" * 10_000
        buffer = info.tobuf(tarfile.GNU_FORMAT)
        return buffer[:-512] * 300 + buffer[-512:]
    if kind == "holes":
        info.type = tarfile.GNUTYPE_SPARSE
        head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        head[482] = 1
        head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * 32)
        return bytes(head) + (b"0" * 504 + b"\1" + bytes(7)) * 6000 + bytes(512)
    assert kind == "holes in the data"
    info.size, info.pax_headers = 3_000_000, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return info.tobuf(tarfile.PAX_FORMAT) + b"9999999\n" + b"1\n" * 1_499_996


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["long name", "records", "digits", "many names", "holes", "holes in the data"])
def test_headers_of_one_member_are_bounded(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tar").write_bytes(long_headers(kind) + bytes(10_240))
    with pytest.raises(DataError, match=r"a\.tar.*(longer than 1 MiB; copy or prepare it again|is damaged$)"):
        read_all(tmp_path / "a.tar")


def test_records_for_all_members_are_bounded(tmp_path: Path) -> None:
    def tar(count: int) -> Path:
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a"}) as opened:
            assert opened.fileobj is not None
            for number in range(count):
                opened.fileobj.write(tarfile.TarInfo.create_pax_global_header({f"MILAN.{number}": "a"}))
                opened.offset = opened.fileobj.tell()
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(PNG)
                opened.addfile(info, io.BytesIO(PNG))
        return tmp_path / "a.tar"

    assert len(read_all(tar(90))[0]) == 90
    with pytest.raises(DataError, match="damaged"):
        read_all(tar(110))


def test_text_too_large_to_be_any_is_left_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milan_pipe.images.tar.MAX_TEXT_BYTES", 2**20)
    large = b"[" * (2**20 + 1)
    members = [("a.png", PNG), ("a.json", large), ("all.json", large), ("b.png", PNG), ("b.txt", b"b")]
    samples, bad = read_all(write_tar(tmp_path / "a.tar", members))
    assert [sample.key for sample in samples] == ["b"]
    assert bad == [("a", "the .json member is larger than 1 MiB")]


def test_key_stays_with_its_neighbours_only(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("b.png", PNG), ("a.cls", b"1"), ("b.cls", b"2")]
    samples, bad = read_all(write_tar(tmp_path / "a.tar", members))
    assert [s.key for s in samples] == ["a", "b"]
    assert [key for key, _ in bad] == ["a", "b"]
    assert "side by side" in bad[0][1]


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/milan_pipe_unpickled",))


def test_pickles_stay_bytes_and_names_stay_names(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    members = [
        ("a.png", PNG),
        ("a.pkl", pickle.dumps(_Bomb())),
        ("a.pyd", pickle.dumps(_Bomb())),
        ("../../up.png", PNG),
        ("/tmp/milan_pipe_absolute.png", PNG),
        ("x/../../y.png", PNG),
        ("x/..y.png", PNG),
        ("z.png", PNG),
    ]
    shard = write_tar(folder / "a.tar", members)
    samples, bad = read_all(shard)
    assert [s.key for s in samples] == ["a", "z"]
    assert [key for key, _ in bad] == ["../../up", "/tmp/milan_pipe_absolute", "x/../../y"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [shard]
    assert not Path("/tmp/milan_pipe_unpickled").exists()
    assert not Path("/tmp/milan_pipe_absolute.png").exists()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b"")], "empty file"),
        ([("a.png", PNG), ("a.cls", b"cat")], "'cat'"),
        ([("a.png", PNG), ("a.cls", b"")], "whole number"),
        ([("a.png", PNG), ("a.cls", b"1.0")], "whole number"),
        ([("a.png", PNG), ("a.cls", b"-2")], "-2"),
        ([("a.png", PNG), ("a.cls", b"\xff\xfe")], "whole number"),
        ([("a.png", PNG), ("a.cls", b"9223372036854775808")], "2\\*\\*63"),
        ([("a.png", PNG), ("a.txt", b"\xff\xfe")], "UTF-8"),
        ([("a.png", PNG), ("a.json", b"{")], "json"),
        ([("a.png", PNG), ("a.json", b"[" * 100_000)], "json"),
        ([("a.png", PNG), ("a.json", b'{"label": true}')], "True"),
        ([("a.png", PNG), ("a.png", PNG)], "two images"),
        ([("a.png", PNG), ("a.jpg", PNG)], "two images"),
        ([("a.png", PNG), ("a.cls", b"1"), ("a.cls", b"2")], "two .cls"),
        ([("a.tiff", b"II*")], "convert"),
    ],
)
def test_faults_of_one_sample_are_reported_once_and_the_rest_goes_on(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    samples, bad = read_all(write_tar(tmp_path / "a.tar", [*members, ("good.png", PNG)]))
    assert [s.key for s in samples] == ["good"]
    assert [key for key, _ in bad] == ["a"]
    with pytest.raises(DataError, match=reason):
        raise DataError(bad[0][1])


def test_duplicate_key_keeps_the_first(tmp_path: Path) -> None:
    other = encoded(Image.new("RGB", (1, 1)))
    samples, bad = read_all(write_tar(tmp_path / "a.tar", [("a.png", PNG), ("b.png", PNG), ("a.png", other)]))
    assert [(s.key, s.data) for s in samples] == [("a", PNG), ("b", PNG)]
    assert [(key, reason.split(":")[0]) for key, reason in bad] == [("a", "duplicate key")]


def test_links_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (
            ("folder.png", tarfile.DIRTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/hostname" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
        for name in ("bad\udcff", "good"):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    samples, bad = read_all(path)
    assert [s.key for s in samples] == ["good"]
    assert [key for key, _ in bad] == ["link", "pipe", "bad\\udcff"]
    assert "UTF-8" in bad[2][1]


@pytest.mark.parametrize(("suffix", "kept"), [("txt", True), ("cls", False)])
def test_a_caption_that_is_a_link_is_none_and_a_label_is_not_guessed(tmp_path: Path, suffix: str, kept: bool) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG)])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(f"a.{suffix}")
        info.type, info.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(info)
    samples, bad = read_all(path)
    assert [(sample.key, sample.caption) for sample in samples] == [("a", None)] * kept
    assert bad == [("a", "the .cls member is a link or special file, no plain file")] * (not kept)


def test_too_large_members_are_skipped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_ENCODED_BYTES", len(PNG))
    samples, bad = read_all(write_tar(tmp_path / "a.tar", [("a.png", PNG + b"x"), ("b.png", PNG)]))
    assert [s.key for s in samples] == ["b"]
    assert [key for key, _ in bad] == ["a"]


def test_cut_at_any_byte_gives_whole_samples_and_then_an_error(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "a.tar",
        [(f"{n}.{kind}", PNG if kind == "png" else b"5") for n in range(3) for kind in ("png", "cls")],
    )
    data = whole.read_bytes()
    used = tarfile.BLOCKSIZE * 6 + 3 * (-(-len(PNG) // 512) * 512 + 512)
    cut = tmp_path / "cut.tar"
    reached = set()
    for length in [*range(0, used, 256), used - 1, used, used + 1, used + 511]:
        cut.write_bytes(data[:length])
        samples: list[Sample] = []
        with pytest.raises(DataError, match=r"cut\.tar"):
            samples.extend(read_shard(cut, lambda *_: None))
        assert all(s.data == PNG and s.label == 5 for s in samples)
        reached.add(len(samples))
    assert reached == {0, 1, 2}
    cut.write_bytes(data[: used + 512])
    assert len(read_all(cut)[0]) == 3


def test_damaged_header_between_members_is_no_end(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("b.png", PNG), ("c.png", PNG)])
    data = bytearray(shard.read_bytes())
    data[data.index(b"b.png")] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        read_all(shard)


def test_damaged_tars_raise_nothing_but_data_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    whole = write_tar(tmp_path / "a.tar", [("ü" * 120 + ".png", PNG), ("b.png", PNG)]).read_bytes()
    shard = tmp_path / "b.tar"
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 5000, 4):
            data[place] = rng.integers(256)
        shard.write_bytes(data)
        with contextlib.suppress(DataError):
            read_all(shard)


# --- expand_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "t-000002.tar",
        "t-000000.tar",
        "t-000001.tar",
        "v-000000.tar",
        "notes.txt",
        "guitar",
        ".t-000009.tar",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub.tar").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("", ["t-000000.tar", "t-000001.tar", "t-000002.tar", "v-000000.tar"]),
        ("/t-{000000..000002}.tar", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("/{v,t,v}-00000{0..0}.tar", ["t-000000.tar", "v-000000.tar"]),
        ("/{v-000000,t-{000001..000002}}.tar", ["t-000001.tar", "t-000002.tar", "v-000000.tar"]),
        ("/t-*.tar", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("/[vu]-00000?.tar", ["v-000000.tar"]),
        ("/v-000000.tar", ["v-000000.tar"]),
    ],
)
def test_expand_shards(folder: Path, spec: str, names: list[str]) -> None:
    expected = [ShardFile(location_of(folder), name) for name in names]
    assert expand_shards(f"{folder}{spec}") == expected
    assert expand_shards(Path(f"{folder}{spec}")) == expected
    assert [str(shard) for shard in expected] == [str(folder / name) for name in names]
    assert [shard.size() for shard in expected] == [1] * len(names)


def test_relative_paths_stay_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for spec in ("v-000000.tar", "v-*.tar", "v-{000000..000000}.tar"):
        assert [str(shard) for shard in expand_shards(spec)] == ["v-000000.tar"]
    (folder / "sub").mkdir()
    shard = write_tar(folder / "sub" / "a.tar", [("a.png", PNG)])
    (found,) = expand_shards("sub")
    assert str(found) == "sub/a.tar"
    assert found.size() == shard.stat().st_size
    assert read_all(found) == read_all(shard) == read_all("sub/a.tar")


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]{2}.tar"
    odd.write_bytes(b"x")
    assert [str(shard) for shard in expand_shards(odd)] == [str(odd)]


@pytest.mark.timeout(60)
def test_a_shard_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for spec in (tmp_path, tmp_path / "pipe.tar", tmp_path / "*.tar", tmp_path / "{pipe,pipe}.tar"):
        with pytest.raises(DataError, match="regular file"):
            expand_shards(spec)
    (tmp_path / "pipe.tar").unlink()
    (tmp_path / "zeros.tar").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="regular file"):
        labelled_images(tmp_path, lambda *_: None)


# --- shards in object stores


@pytest.fixture
def remote(bucket: str) -> str:
    location = location_of(bucket)
    for name in (
        "t-000002.tar",
        "t-000000.tar",
        "t-000001.tar",
        "v-000000.tar",
        "notes.txt",
        "guitar",
        ".t-000009.tar",
    ):
        location.write(f"set/{name}", b"x")
    location.write("set/sub.tar/t-000000.tar", b"xx")
    location.write("set/deep/er/t-000000.tar", b"xxx")
    return bucket


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("/set", ["t-000000.tar", "t-000001.tar", "t-000002.tar", "v-000000.tar"]),
        ("/set/", ["t-000000.tar", "t-000001.tar", "t-000002.tar", "v-000000.tar"]),
        ("/set/t-{000000..000002}.tar", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("/set/{v,t,v}-00000{0..0}.tar", ["t-000000.tar", "v-000000.tar"]),
        ("/{set,set/sub.tar}/t-000000.tar", ["sub.tar/t-000000.tar", "t-000000.tar"]),
        ("/set/t-*.tar", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("/set/[vu]-00000?.tar", ["v-000000.tar"]),
        ("/*/v-*.tar", ["v-000000.tar"]),
        ("/set/*/t-*.tar", ["sub.tar/t-000000.tar"]),
        ("/s*/**/t-*0.tar", ["deep/er/t-000000.tar", "sub.tar/t-000000.tar", "t-000000.tar"]),
        ("/set/.t*", [".t-000009.tar"]),
        ("/set/v-000000.tar", ["v-000000.tar"]),
    ],
)
def test_expand_shards_of_a_bucket(remote: str, spec: str, names: list[str]) -> None:
    shards = expand_shards(remote + spec)
    assert [str(shard) for shard in shards] == [f"{remote}/set/{name}" for name in names]
    assert [shard.size() for shard in shards] == [shard.location.size(shard.name) for shard in shards]
    assert pickle.loads(pickle.dumps(shards)) == shards == sorted({*shards})


def test_globs_are_those_of_a_shell(bucket: str, tmp_path: Path) -> None:
    for path in ("a/b/1.tar", "a/b/c/2.tar", "a/3.tar", "a/.h/4.tar", "a/b/.5.tar", "ab/6.tar", "a/b.tar/7.tar"):
        location_of(bucket).write(path, b"x")
        location_of(tmp_path).write(path, b"x")
    patterns = ("*/*.tar", "a/**/*.tar", "a/**", "**/*.tar", "a/*/[!2].tar", "?b/*", "a/.h/*.tar", "a/**/c/*.tar")
    for pattern in patterns:
        names = [str(shard).removeprefix(f"{tmp_path}/") for shard in expand_shards(f"{tmp_path}/{pattern}")]
        assert [str(shard).removeprefix(f"{bucket}/") for shard in expand_shards(f"{bucket}/{pattern}")] == names


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("/set/t-{000000..000004}.tar", MissingError, "2 of the 5"),
        ("/set/t-{000000..000099}.tar", MissingError, "97 of the 100"),
        ("/set/t-{3..1}.tar", DataError, "upwards"),
        ("/set/q-*.tar", MissingError, "no file matches"),
        ("/gone", MissingError, "a folder of"),
        ("", DataError, "1 subfolders"),
    ],
)
def test_expand_shards_errors_of_a_bucket(remote: str, spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        expand_shards(remote + spec)
    assert remote in str(caught.value)


def test_remote_folders_without_shards_say_what_was_found(bucket: str) -> None:
    location = location_of(bucket)
    location.write("a/x.csv", b"")
    with pytest.raises(DataError, match=r"x\.csv"):
        expand_shards(f"{bucket}/a")
    location.write("a/a.JPG", PNG)
    with pytest.raises(DataError, match="1 images"):
        expand_shards(f"{bucket}/a")
    location.write(f"a/{PREPARE_MARKER}", b"")
    location.write("a/a.tar", b"")
    with pytest.raises(DataError, match="not complete"):
        expand_shards(f"{bucket}/a")


def test_many_shards_are_looked_for_by_one_listing(proxied_bucket: str, s3_proxy: Proxy) -> None:
    for number in range(70):
        location_of(proxied_bucket).write(f"a/{number:06d}.tar", b"x")
    s3_proxy.requests.clear()
    shards = expand_shards(f"{proxied_bucket}/a/{{000000..000069}}.tar")
    assert sum(shard.size() for shard in shards) == 70
    assert len(s3_proxy.requests) == 1


@pytest.fixture
def blocks_of_80_kb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milan_pipe.storage.object_store.READ_AHEAD_BYTES", 80_000)


def images_of_many_sizes() -> list[tuple[str, bytes]]:
    sizes = np.random.default_rng(0).integers(1, 12_000, 100)
    members = [(f"{n:03d}.png", PNG + b"x" * int(size)) for n, size in enumerate(sizes)]
    return [member for n, (name, data) in enumerate(members) for member in ((name, data), (f"{n:03d}.cls", b"7"))]


@pytest.mark.usefixtures("blocks_of_80_kb")
def test_a_remote_shard_is_read_as_the_local_one_and_its_bytes_come_once(
    proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path
) -> None:
    local = write_tar(tmp_path / "a.tar", images_of_many_sizes())
    location_of(proxied_bucket).write("a.tar", local.read_bytes())
    (shard,) = expand_shards(proxied_bucket)
    samples, bad = read_all(shard)
    assert (samples, bad) == read_all(local)
    assert len(samples) == 100
    size = local.stat().st_size
    # The zeros that fill up a tar's end need not come.
    assert size - 80_000 <= s3_proxy.bytes_sent("/a.tar") <= size
    assert read_all(f"{proxied_bucket}/a.tar") == (samples, bad)


@pytest.mark.usefixtures("blocks_of_80_kb")
def test_large_members_of_no_use_are_not_fetched(proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path) -> None:
    local = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.npy", bytes(5_000_000)), ("b.png", PNG)])
    location_of(proxied_bucket).write("a.tar", local.read_bytes())
    assert [sample.key for sample in read_all(f"{proxied_bucket}/a.tar")[0]] == ["a", "b"]
    assert s3_proxy.bytes_sent("/a.tar") < 500_000


@pytest.mark.usefixtures("blocks_of_80_kb", "short_patience")
@pytest.mark.parametrize("rest", ["images", "headers"])
def test_a_store_that_is_lost_within_a_shard_is_no_damaged_shard(
    proxied_bucket: str, s3_proxy: Proxy, tmp_path: Path, rest: str
) -> None:
    members = images_of_many_sizes()
    if rest == "headers":
        members[4:] = [(f"{n:03d}.npy", bytes(5000)) for n in range(100)]
    local = write_tar(tmp_path / "a.tar", members)
    location_of(proxied_bucket).write("a.tar", local.read_bytes())
    reader = read_shard(f"{proxied_bucket}/a.tar", lambda *_: None)
    assert next(reader).key == "000"
    s3_proxy.fail_every = 1
    with pytest.raises(StoreError, match="500") as caught:
        list(reader)
    assert "\n" not in str(caught.value)


def test_remote_shards_of_no_use(bucket: str, tmp_path: Path) -> None:
    location = location_of(bucket)
    with pytest.raises(MissingError, match="gone"):
        read_all(f"{bucket}/gone.tar")
    location.write("c.tar", b"")
    with pytest.raises(DataError, match="empty"):
        read_all(f"{bucket}/c.tar")
    location.write("d.tar", PNG * 20)
    with pytest.raises(DataError, match="plain tar"):
        read_all(f"{bucket}/d.tar")
    whole = write_tar(tmp_path / "e.tar", [("a.png", PNG), ("b.png", PNG)]).read_bytes()
    location.write("e.tar", whole[:1400])
    with pytest.raises(DataError, match="damaged"):
        read_all(f"{bucket}/e.tar")


@pytest.fixture
def web(bucket: str, s3_proxy: Proxy) -> str:
    s3_proxy.sign = True
    return f"{s3_proxy.endpoint}/{bucket.removeprefix('s3://')}"


def test_shards_of_a_web_server(bucket: str, web: str, tmp_path: Path) -> None:
    local = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.cls", b"3")])
    for number in range(3):
        location_of(bucket).write(f"set/t-{number:06d}.tar", local.read_bytes())
    shards = expand_shards(f"{web}/set/t-{{000000..000002}}.tar")
    assert [str(shard) for shard in shards] == [f"{web}/set/t-{number:06d}.tar" for number in range(3)]
    assert [shard.size() for shard in shards] == [local.stat().st_size] * 3
    assert read_all(shards[1]) == read_all(local)
    assert expand_shards(f"{web}/set/t-000001.tar") == [shards[1]]
    with pytest.raises(MissingError, match="1 of the 4"):
        expand_shards(f"{web}/set/t-{{000000..000003}}.tar")
    with pytest.raises(MissingError, match="a shard or braces"):
        expand_shards(f"{web}/set/gone.tar")
    for spec in ("/set", "/set/", "/set/t-*.tar", "/set/t-00000?.tar"):
        with pytest.raises(DataError, match="listed"):
            expand_shards(web + spec)


# --- index.json


def test_index_round_trip_and_faults(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="prepare"):
        read_index(tmp_path)
    shard = ShardRecord(name="train-000000.tar", split="train", samples=3, bytes=10240, sha256="ab")
    for classes in (None, ("a\u202eb\x9b", "ü"), ("größe", "x")):
        index = ImageIndex(shards=(shard,), classes=classes, source={"kind": "demo", "seed": 0})
        write_index(tmp_path, index)
        assert read_index(tmp_path) == index
        # As it may be shown on a terminal.
        assert all(line.isprintable() for line in (tmp_path / "index.json").read_text().splitlines())
    path = tmp_path / "index.json"
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.json"]
    text = path.read_text()
    for damaged in (text[:40], "[]", text.replace("samples", "simples"), text.replace("train-0", "../train-0")):
        path.write_text(damaged)
        with pytest.raises(DataError, match="prepare"):
            read_index(tmp_path)
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(MismatchError, match="version 2"):
        read_index(tmp_path)
