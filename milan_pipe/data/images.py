"""Webdataset image shards: which there are, what is in one, and how a picture is decoded.

This is the package's only reader of image shards. It keeps webdataset's rules for members and keys, and reads the tar
with the standard library: webdataset's own reader ends without a word at a damaged header or a cut between two
members, hands over every member's bytes, and its import loads torch.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan_pipe.data.files import MAX_ENCODED_BYTES
from milan_pipe.data.index import PREPARE_MARKER
from milan_pipe.errors import DataError, MilanError, MissingError, StoreError, resource_hint
from milan_pipe.storage import Listing, Place, is_url, place_of, split_url

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes, in lower case and without the dot, of the pictures that are read."""

OTHER_PICTURE_SUFFIXES = (
    *("apng", "avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe"),
    *("jxl", "pbm", "pgm", "pnm", "ppm", "tif", "tiff"),
)
"""Suffixes that show a picture which is not read: they are reported, never passed over in silence."""

MASK_SUFFIX = "mask.png"
"""Suffix of a sample's segmentation, a picture of class indices, as it is written."""

MASK_SUFFIXES = (MASK_SUFFIX, "seg.png")
"""Suffixes that are read as such."""

MAX_PIXELS = 89_478_485
"""Height x width above which a picture is refused: 2**28 bytes of RGB, the size at which Pillow warns of a bomb."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MAX_BRACE_NAMES = 1_000_000
_NUL_BLOCK = bytes(tarfile.BLOCKSIZE)

OnBad = Callable[[str, str], None]
"""Takes the key and a one-line reason of a sample that is set aside."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture of a shard, still encoded.

    Attributes:
        key: webdataset key: the member's path up to the first dot of its last part.
        data: the encoded picture, at least one byte.
        label: class index, -1 where there is none.
        caption: None where there is none.
    """

    key: str
    data: bytes
    label: int
    caption: str | None


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes `start` to `stop` - 1 of a shard's file."""

    start: int
    stop: int

    def __bool__(self) -> bool:
        return self.stop > self.start


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where one picture of a shard lies, and what is said of it.

    Attributes:
        key, label: as of a `Sample`.
        picture: of the encoded picture, at least one byte.
        mask: of the sample's `MASK_SUFFIX` member; None where there is none.
    """

    key: str
    label: int
    picture: Span
    mask: Span | None


# --- which shards there are ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardFile:
    """A shard's tar file, local or in an object store. It can be sent to other processes, and sorts by its address.

    Attributes:
        place: its folder.
        name: its file name.
        known_size: bytes, where a listing has told them.
    """

    place: Place
    name: str
    known_size: int | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.place.local / self.name) if self.place.local is not None else f"{self.place}/{self.name}"

    def __lt__(self, other: ShardFile) -> bool:
        return str(self) < str(other)

    def size(self) -> int:
        """Bytes of the tar.

        Raises:
            MissingError: it is not there.
            StoreError: it cannot be read.
        """
        return self.place.size(self.name) if self.known_size is None else self.known_size

    def open(self) -> IO[bytes]:
        """A seekable file to read from. Raises as `size`, also while it is read."""
        return self.place.open(self.name)


def shard_file(where: str | Path) -> ShardFile:
    """The shard of this path or URL; whether it is there is not looked at."""
    folder, name = split_url(str(where))
    return ShardFile(place_of(folder), name)


def expand_shards(spec: str | Path) -> list[ShardFile]:
    """List the shards that `spec` names, sorted and each once.

    Args:
        spec: a folder (its `*.tar`), one shard, a path with braces as `train-{000000..000127}.tar` or
            `{train,test}-000000.tar`, or a glob. Each of them may be a URL; web servers (`https://`) cannot be
            listed, so that only single shards and braces are possible there. A local file or folder of exactly
            this name goes first.

    Raises:
        MissingError: the folder, the file, one of the braces' files, or any match of the glob is not there.
        DataError: a folder without shards or that `prepare` has not finished, a folder or glob on a web server, or
            braces that make no sense, or a shard that is no regular file.
        SettingError: a URL of an unknown kind.
        StoreError: the object store cannot be read.
    """
    text = str(spec)
    if not text.strip():
        raise DataError("no image shards were named; give a folder of .tar shards, a shard, or a glob")
    if text.startswith("pipe:"):
        raise DataError(f"{text} is a command, which is not run; give a folder of .tar shards, a shard, or a glob")
    if is_url(text):
        return _remote_shards(text)
    path = Path(text)
    if path.is_dir():
        return _shards_in(path)
    if path.exists():
        return _regular([shard_file(path)])
    if "{" in text:
        names = _expand_braces(text)
    elif glob.has_magic(text):
        names = [name for name in glob.glob(text, recursive=True) if not Path(name).is_dir()]  # noqa: PTH207
        if not names:
            raise MissingError(f"no file matches {text}")
    else:
        raise MissingError(f"{text} is not there; expected a folder of .tar shards, a shard, braces or a glob")
    shards = [shard_file(name) for name in sorted(set(names))]
    missing = [shard for shard in shards if not Path(str(shard)).exists()]
    if missing:
        raise _missing(missing, len(shards), text)
    return _regular(shards)


def _regular(shards: list[ShardFile]) -> list[ShardFile]:
    for shard in shards:
        if not Path(str(shard)).is_file():
            raise DataError(f"{shard} is not a regular file; a shard is a tar file, remove this or rename it")
    return shards


def _missing(missing: list[ShardFile], count: int, text: str) -> MissingError:
    return MissingError(f"{missing[0]} is not there ({len(missing)} of the {count} shards of {text} are missing)")


def _remote_shards(url: str) -> list[ShardFile]:
    text = url.rstrip("/")
    if "{" in text:
        return _remote_braces(text)
    folder, name = split_url(text)
    place = place_of(folder)
    if not place.listable and (glob.has_magic(text) or not name.endswith(".tar")):
        raise DataError(
            f"{text} cannot be listed, as no web server can; name its shards one by one or by braces, as "
            "https://host/folder/train-{000000..000127}.tar"
        )
    if glob.has_magic(text):
        shards = sorted(_remote_glob(text))
        if not shards:
            raise MissingError(f"no file matches {text}")
        return shards
    size = place.present([name]).get(name) if name else None
    if size is not None:
        return [ShardFile(place, name, size)]
    folder_place = place_of(text)
    listing = folder_place.listing() if place.listable else Listing(files={}, folders=())
    if not listing.files and not listing.folders:
        expected = "a folder of .tar shards, a shard, braces or a glob" if place.listable else "a shard or braces"
        raise MissingError(f"{text} is not there; expected {expected}")
    return _shards_of(folder_place, listing.files, listing.folders)


def _remote_braces(text: str) -> list[ShardFile]:
    urls = sorted(set(_expand_braces(text)))
    names: dict[str, list[str]] = {}
    for folder, name in map(split_url, urls):
        names.setdefault(folder, []).append(name)
    shards, missing = [], []
    for folder, wanted in names.items():
        place = place_of(folder)
        sizes = place.present(wanted)
        shards += [ShardFile(place, name, size) for name, size in sizes.items()]
        missing += [ShardFile(place, name) for name in wanted if name not in sizes]
    if missing:
        raise _missing(sorted(missing), len(urls), text)
    return sorted(shards)


def _remote_glob(url: str) -> Iterator[ShardFile]:
    scheme, _, rest = url.partition("://")
    bucket, *parts = rest.split("/")
    plain = next(index for index, part in enumerate([*parts, "*"]) if glob.has_magic(part))
    if glob.has_magic(bucket) or plain == len(parts):
        raise DataError(f"{url} has a pattern in its bucket; patterns are for what lies in a bucket")
    yield from _matches(place_of("/".join([f"{scheme}://{bucket}", *parts[:plain]])), parts[plain:])


def _matches(place: Place, patterns: list[str]) -> Iterator[ShardFile]:
    """Files whose parts below `place` match the patterns, as in a shell; `**` is any number of folders."""
    pattern, *below = patterns
    listing = place.listing()
    if pattern == "**":
        yield from _matches(place, below or ["*"])
        for folder in listing.folders:
            if not folder.startswith("."):
                yield from _matches(place.child(folder), patterns)
    elif below:
        for folder in _like(listing.folders, pattern):
            yield from _matches(place.child(folder), below)
    else:
        yield from (ShardFile(place, name, listing.files[name]) for name in _like(listing.files, pattern))


def _like(names: Iterable[str], pattern: str) -> list[str]:
    hidden = pattern.startswith(".")
    return [name for name in names if fnmatchcase(name, pattern) and (hidden or not name.startswith("."))]


def _shards_in(folder: Path) -> list[ShardFile]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = {entry.name: None for entry in entries if not entry.is_dir()}
    shards = _shards_of(place_of(folder), files, folders)
    dangling = [shard for shard in shards if not (folder / shard.name).exists()]
    if dangling:
        raise MissingError(f"{dangling[0]} is a link to a file that is not there")
    return _regular(shards)


def _shards_of(place: Place, files: Mapping[str, int | None], folders: Iterable[str]) -> list[ShardFile]:
    """The shards of a folder that holds these files, with their sizes where they are known, and these folders."""
    if PREPARE_MARKER in files:
        raise DataError(f"{place} is not complete: `milan-pipe prepare` still runs or was stopped; run it again")
    names = sorted(name for name in files if not name.startswith("."))
    shards = [ShardFile(place, name, files[name]) for name in names if name.endswith(".tar")]
    if shards:
        return shards
    pictures = sum(_suffix(name) in IMAGE_SUFFIXES for name in names)
    subfolders = sum(not name.startswith(".") for name in folders)
    if pictures or subfolders:
        found = " and ".join(f"{n} {noun}" for n, noun in ((pictures, "pictures"), (subfolders, "subfolders")) if n)
        raise DataError(
            f"{place} holds {found} and no .tar shards; run `milan-pipe prepare` to pack pictures into shards"
        )
    if not names:
        raise DataError(f"{place} is empty; expected .tar shards, which `milan-pipe prepare` writes")
    raise DataError(f"{place} holds no .tar shards; found {len(names)} other files, as {names[0]}")


def _expand_braces(text: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1], re.ASCII)
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= _MAX_BRACE_NAMES:
            raise DataError(f"{{{match[1]}}} in {text} must run upwards and over less than {_MAX_BRACE_NAMES} numbers")
        # As in a shell: a leading zero asks for numbers of one width.
        padded = any(len(end) > 1 and end.startswith("0") for end in span.groups())
        width = max(map(len, span.groups())) if padded else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise DataError(f"{{{match[1]}}} in {text} is not understood; expected {{000000..000127}} or {{train,test}}")
    before, after = text[: match.start()], text[match.end() :]
    names = [name for choice in choices for name in _expand_braces(before + choice + after)]
    if len(names) > _MAX_BRACE_NAMES:
        raise DataError(f"{text} names more than {_MAX_BRACE_NAMES} shards")
    return names


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


# --- what is in a shard -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Group:
    """Members of one key, in the order of the tar. `fault` is the first reason to set the sample aside.

    `dotted` are names as `a.v2.jpg`: of one more file of a sample, or of a picture with a dot in its name.
    """

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)
    image: bytes | Span | None = None
    mask: Span | None = None
    fault: str | None = None

    def spoil(self, reason: str) -> None:
        self.fault = self.fault or reason


def read_shard(shard: ShardFile | str | Path, on_bad: OnBad, copy: IO[bytes] | None = None) -> Iterator[Sample]:
    """Read a shard's samples, in their order, one at a time; nothing is unpickled or written to disk.

    Neighbouring members of one key are one sample: a picture (`IMAGE_SUFFIXES`), and where there are such `cls` (a
    whole number), `txt` (caption) and `json` (label under "label" or "cls", caption under "caption" or "txt"; `cls`
    and `txt` win). Other members are skipped unread.

    Args:
        shard: a plain tar file, or its path or URL.
        on_bad: called for each sample that is not yielded, as soon as it is known. A key that comes again is
            reported, its first sample stays. Keys without a picture are passed over, but not where its name has a
            second dot: `a.v2.jpg` is file `v2.jpg` of sample `a`.
        copy: the shard's bytes, where they have been fetched; a seekable file, left open.

    Raises:
        MissingError: the shard is not there.
        DataError: the shard cannot be read, is no plain tar, holds no picture at all, or is cut or damaged; in
            this last case after the samples before the damage. Raised while iterating.
        StoreError: the object store cannot be read, or no longer.
    """
    for group, label, caption in _whole_groups(shard, on_bad, copy, locate=False):
        assert isinstance(group.image, bytes)
        yield Sample(key=group.key, data=group.image, label=label, caption=caption)


def locate_samples(shard: ShardFile | str | Path, on_bad: OnBad) -> Iterator[Located]:
    """Find a shard's samples by its headers, without reading a picture; else as `read_shard`."""
    for group, label, _ in _whole_groups(shard, on_bad, None, locate=True):
        assert isinstance(group.image, Span)
        yield Located(key=group.key, label=label, picture=group.image, mask=group.mask)


def _whole_groups(
    shard: ShardFile | str | Path, on_bad: OnBad, copy: IO[bytes] | None, *, locate: bool
) -> Iterator[tuple[_Group, int, str | None]]:
    """Groups with a picture and no fault, with label (-1: none) and caption."""
    shard = shard if isinstance(shard, ShardFile) else shard_file(shard)
    seen: set[str] = set()
    pictures = 0
    for group in _groups(shard, copy, locate=locate):
        if group.key in seen:
            on_bad(group.key, "duplicate key: the shard holds it twice, or its members do not stand side by side")
            continue
        seen.add(group.key)
        if group.image is None and group.fault is None:
            # One by one, as each may be a picture of its own and counts as lost.
            for name in group.dotted:
                on_bad(name, _DOTTED)
            pictures += len(group.dotted)
            continue
        pictures += 1
        try:
            label, caption = _told_of(group)
        except DataError as error:
            on_bad(group.key, str(error))
        else:
            yield group, label, caption
    if not pictures:
        raise DataError(f"{shard} holds no pictures; expected members that end in {', '.join(IMAGE_SUFFIXES)}")


def _groups(shard: ShardFile, copy: IO[bytes] | None, *, locate: bool) -> Iterator[_Group]:
    group: _Group | None = None
    for name, info, data in _members(shard, copy, locate=locate):
        prefix, suffix = split_member_name(name)
        if not prefix:
            continue
        key = _utf8(prefix)
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key=key)
        _add(group, prefix, suffix, info, data)
    if group is not None:
        yield group


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _add(group: _Group, prefix: str, suffix: str, info: tarfile.TarInfo, data: bytes | Span | None) -> None:
    if suffix in MASK_SUFFIXES and _is_plain(info):
        group.mask = Span(start=info.offset_data, stop=info.offset_data + info.size)
    if suffix in OTHER_PICTURE_SUFFIXES:
        group.spoil(f"pictures of type .{suffix} are not read; convert to {', '.join(IMAGE_SUFFIXES)}")
        return
    if suffix not in _WANTED:
        # With no name before the first dot it is a hidden file.
        if "." in suffix and _suffix(suffix) in _PICTURES and not prefix.endswith("/"):
            group.dotted.append(_utf8(info.name))
        return
    is_image = suffix in IMAGE_SUFFIXES
    if data is None:
        kind = "larger than 256 MiB" if _is_plain(info) else "a link or special file, no plain file"
        if is_image:
            group.spoil(f"the .{suffix} member is {kind}")
        else:
            group.parts[suffix] = b""
        return
    if is_image and group.image is not None:
        group.spoil("two pictures of one key")
    elif suffix in group.parts:
        group.spoil(f"two .{suffix} members of one key")
    elif is_image:
        group.image = data
        # Names are never used as paths here, but keys become member names in what is written later.
        if prefix.startswith("/") or ".." in prefix.split("/"):
            group.spoil("member name is absolute or has '..'")
        if group.key != prefix:
            group.spoil("member name is not UTF-8")
    else:
        assert isinstance(data, bytes)
        group.parts[suffix] = data


def _is_plain(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not info.issparse()


_PICTURES = frozenset((*IMAGE_SUFFIXES, *OTHER_PICTURE_SUFFIXES))
_DOTTED = "its sample has no picture: a key ends at the first dot of a name; rename, or use `milan-pipe prepare`"
_WANTED = frozenset((*IMAGE_SUFFIXES, "cls", "txt", "json"))


def split_member_name(name: str) -> tuple[str, str]:
    """Key and lower-case suffix by webdataset's rule: cut at the first dot of the last part; ("", "") if none."""
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.DOTALL)
    if match is None or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return match[1], match[2].lower()


_Member = tuple[str, tarfile.TarInfo, bytes | Span | None]


def _members(shard: ShardFile, copy: IO[bytes] | None, *, locate: bool) -> Iterator[_Member]:
    """Name, header and bytes of each member; bytes are read only for suffixes that are of use.

    Args:
        locate: say of pictures where their bytes lie, and leave them unread.
    """
    try:
        if copy is not None:
            yield from _walk(shard, copy, locate=locate)
            return
        with shard.open() as file:
            yield from _walk(shard, file, locate=locate)
    except MissingError as error:
        raise MissingError(f"shard {error}") from None
    except MilanError as error:
        if not isinstance(error, StoreError) or shard.place.local is None:
            raise
        raise DataError(f"shard {error}") from error
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {resource_hint(error) or error.strerror or error}") from error


def _walk(shard: ShardFile, file: IO[bytes], *, locate: bool) -> Iterator[_Member]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size == 0:
        raise DataError(f"shard {shard} is an empty file")
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except tarfile.TarError:
        raise DataError(f"{shard} is not a plain tar file (a compressed one must be unpacked first)") from None
    # What cannot be read is not damaged.
    except (MilanError, OSError):
        raise
    except Exception as error:
        raise _damaged(shard, 0) from error
    end = -1
    while True:
        try:
            info = tar.next()
        except (MilanError, OSError):
            raise
        # tarfile lets ValueError, OverflowError and others through when a header is damaged.
        except Exception as error:
            raise _damaged(shard, max(end, 0)) from error
        if info is None:
            break
        # The list would grow with the shard; and a header may claim a size that leads backwards or past the end.
        tar.members = []  # type: ignore[attr-defined]
        if tar.offset <= end or info.size < 0 or info.offset_data + (0 if info.issparse() else info.size) > size:
            raise _damaged(shard, info.offset)
        end = tar.offset
        data: bytes | Span | None = None
        suffix = split_member_name(info.name)[1]
        usable = suffix in _WANTED and _is_plain(info) and info.size <= MAX_ENCODED_BYTES
        if usable and locate and suffix in IMAGE_SUFFIXES:
            data = Span(start=info.offset_data, stop=info.offset_data + info.size)
        elif usable:
            file.seek(info.offset_data)
            data = file.read(info.size)
            if len(data) != info.size:
                raise _damaged(shard, info.offset)
        if not info.isdir():
            yield info.name, info, data
    # tarfile takes a cut, or a damaged header, between two members for the end. The true end is a block of zeros.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != _NUL_BLOCK:
        raise _damaged(shard, tar.offset)


def _damaged(shard: ShardFile, offset: int) -> DataError:
    return DataError(f"shard {shard} is cut or damaged at byte {offset}; copy or prepare it again")


def _told_of(group: _Group) -> tuple[int, str | None]:
    """Label, -1 for none, and caption; raises where the sample is to be set aside."""
    if group.fault is not None:
        raise DataError(group.fault)
    if not group.image:
        raise DataError("empty file")
    label: int | None = None
    caption: str | None = None
    if "json" in group.parts:
        label, caption = _from_json(group.parts["json"])
    if "cls" in group.parts:
        text = group.parts["cls"].decode("utf-8", "replace").strip()
        if not re.fullmatch(r"-?\d{1,19}", text, re.ASCII):
            raise DataError(f"cls is not a whole number, found {text[:40]!r}")
        label = _checked_label(int(text), "cls")
    if "txt" in group.parts:
        try:
            caption = group.parts["txt"].decode("utf-8")
        except UnicodeDecodeError:
            raise DataError("txt is not UTF-8") from None
    return -1 if label is None else label, caption


def _from_json(data: bytes) -> tuple[int | None, str | None]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("json cannot be parsed") from None
    if not isinstance(values, dict):
        return None, None
    label = next((values[name] for name in ("label", "cls") if values.get(name) is not None), None)
    if label is not None:
        label = _checked_label(label, "label in json")
    caption = next((values[name] for name in ("caption", "txt") if isinstance(values.get(name), str)), None)
    return label, caption


def _checked_label(value: object, where: str) -> int:
    if type(value) is not int or not -1 <= value < 2**63:
        raise DataError(f"{where} must be a whole number from -1 to 2**63 - 1, found {str(value)[:40]!r}")
    return value


# --- one picture --------------------------------------------------------------------------------------------------


def decode_image(data: bytes) -> Image.Image:
    """Decode a picture to RGB, turned as its EXIF orientation says.

    The first frame of an animation is taken; transparency is laid on white; 16-bit grey keeps its high byte, as
    16-bit colour does in Pillow; CMYK is converted without a colour profile. Always decoded at full size: the JPEG
    decoder's own down-scaling would change the pixels.

    Args:
        data: encoded picture: JPEG, PNG, WebP, GIF or BMP, whatever the file was called.

    Returns:
        A loaded Pillow image of mode RGB.

    Raises:
        DataError: empty, of another format, truncated, damaged, or above `MAX_PIXELS`; the message is one short
            line without the picture's name.
    """
    if not data:
        raise DataError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are read")
            image.load()
            return _turned(_rgb(image), image)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError("not a JPEG, PNG, WebP, GIF or BMP picture, or its header is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"more than the {MAX_PIXELS} pixels that are read") from None
    # Pillow's parsers raise SyntaxError, struct.error, IndexError and more on damaged files.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"truncated or damaged: {reason}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips these at 255 when it converts; a viewer shows the high byte.
        high_byte = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(rgb: Image.Image, image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112)
    # A damaged EXIF block says nothing about the pixels: viewers show such a picture as it is stored.
    except Exception:
        return rgb
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)
