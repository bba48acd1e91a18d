"""The samples of an image shard, a webdataset tar, by webdataset's rules for members and keys.

By hand, because webdataset's own reader ends silently at a damaged header or a cut between two members, reads the bytes
of every member, and loads torch.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from milan_pipe.errors import DataError, MilanError, MissingError, StoreError, system_reason
from milan_pipe.images.files import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    MAX_ENCODED_BYTES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    suffix_of,
)
from milan_pipe.images.shards import ShardFile, shard_file

_NUL_BLOCK = bytes(tarfile.BLOCKSIZE)
_MAX_HEADER_BYTES = 2**20
_MOST_GLOBAL_RECORDS = 100
_DIGITS = re.compile(rb"[0-9]{512}")

OnBad = Callable[[str, str], None]
"""Takes the key and a one-line reason of a sample that is skipped."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a shard, still encoded.

    Attributes:
        key: webdataset key: the member's path up to the first dot of its last part.
        data: the encoded image; empty where it was only located.
        label: class index, -1 where there is none.
        caption: None where there is none.
        image: bytes of the shard's file that are the encoded image; empty where it is a file of its own.
        mask: those of the member with one of `MASK_SUFFIXES`; None where there is none.
    """

    key: str
    data: bytes
    label: int
    caption: str | None
    image: range = range(0)
    mask: range | None = None


@dataclass(kw_only=True)
class _Group:
    """Members of one key.

    Attributes:
        parts: label and caption by suffix, as they are stored.
        dotted: names as `a.v2.jpg`: one more file of the sample, or an image with a dot in its name.
        fault: first reason to skip the sample.
        text_fault: the same, where it has an image.
    """

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)
    image: range | None = None
    data: bytes = b""
    mask: range | None = None
    fault: str | None = None
    text_fault: str | None = None

    def skip(self, reason: str) -> None:
        self.fault = self.fault or reason


def read_shard(
    shard: ShardFile | str | Path, on_bad: OnBad, copy: IO[bytes] | None = None, *, locate: bool = False
) -> Iterator[Sample]:
    """Read a shard's samples in their order, one at a time; nothing is unpickled or written to disk.

    Neighbouring members of one key are one sample: an image (`IMAGE_SUFFIXES`), and optionally `cls` (a whole number),
    `txt` (caption) and `json` (label under "label" or "cls", caption under "caption" or "txt"; `cls` and `txt` win).
    Other members are skipped unread.

    Args:
        shard: a plain tar file, or its path or URL.
        on_bad: called for each sample that is not yielded: also for a key that comes again, whose first sample stays,
            and for `a.v2.jpg`, which is file `v2.jpg` of sample `a`, where `a` has no image. Other keys without an
            image are passed over.
        copy: the shard's bytes, where they have been fetched; a seekable file, left open.
        locate: find images by the headers, and leave them unread.

    Raises:
        MissingError: the shard is not there.
        DataError: the shard cannot be read, is no plain tar, holds no image at all, or is cut or damaged; in the last
            case after the samples before the damage.
        StoreError: the object store cannot be read.
    """
    shard = shard if isinstance(shard, ShardFile) else shard_file(shard)
    seen: set[str] = set()
    images = 0
    for group in _groups(shard, copy, locate=locate):
        if group.key in seen:
            on_bad(group.key, "duplicate key: the shard holds it twice, or its members do not stand side by side")
            continue
        seen.add(group.key)
        if group.image is None and group.fault is None:
            # One by one, as each may be an image of its own and counts as lost.
            for name in group.dotted:
                on_bad(name, _DOTTED)
            images += len(group.dotted)
            continue
        images += 1
        try:
            sample = _sample_of(group)
        except DataError as error:
            on_bad(group.key, str(error))
        else:
            yield sample
    if not images:
        raise no_images(shard)


def no_images(shard: ShardFile) -> DataError:
    """The error of a shard without an image."""
    return DataError(f"{shard} holds no images; expected members that end in {', '.join(IMAGE_SUFFIXES)}")


def _groups(shard: ShardFile, copy: IO[bytes] | None, *, locate: bool) -> Iterator[_Group]:
    """Neighbouring members of one key; with `locate`, images are not read."""
    group: _Group | None = None
    with opened(shard, copy) as file:
        for info in walk(shard, file, file.seek(0, io.SEEK_END)):
            prefix, suffix = split_member_name(info.name)
            if not prefix or info.isdir():
                continue
            key = _utf8(prefix)
            if group is None or group.key != key:
                if group is not None:
                    yield group
                group = _Group(key=key)
            data = None
            if suffix in _WANTED and _is_plain(info) and info.size <= _most_bytes(suffix):
                data = b""
                if not (locate and suffix in IMAGE_SUFFIXES):
                    file.seek(info.offset_data)
                    data = file.read(info.size)
                    if len(data) != info.size:
                        raise _damaged(shard, info.offset)
            _add(group, prefix, suffix, info, data)
    if group is not None:
        yield group


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _most_bytes(suffix: str) -> int:
    return MAX_ENCODED_BYTES if suffix in _IMAGES else MAX_TEXT_BYTES


def _is_plain(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not info.issparse()


def _add(group: _Group, prefix: str, suffix: str, info: tarfile.TarInfo, data: bytes | None) -> None:
    span = range(info.offset_data, info.offset_data + info.size)
    if suffix in MASK_SUFFIXES and _is_plain(info) and info.size <= MAX_ENCODED_BYTES:
        group.mask = span
    if suffix in OTHER_IMAGE_SUFFIXES:
        group.skip(f"images of type .{suffix} are not read; convert to {', '.join(IMAGE_SUFFIXES)}")
    elif suffix not in _WANTED:
        # With no name before the first dot it is a hidden file.
        if "." in suffix and suffix_of(suffix) in _IMAGES and not prefix.endswith("/"):
            group.dotted.append(_utf8(info.name))
    elif suffix not in IMAGE_SUFFIXES:
        if data is not None and suffix not in group.parts:
            group.parts[suffix] = data
        # Of a caption that is a link the image is whole, and has none.
        elif data is not None or suffix != "txt" or _is_plain(info):
            reason = _no_member(suffix, info) if data is None else f"two .{suffix} members of one key"
            group.text_fault = group.text_fault or reason
    elif data is None:
        group.skip(_no_member(suffix, info))
    elif group.image is not None:
        group.skip("two images of one key")
    else:
        group.image, group.data = span, data
        # Names are never used as paths here, but keys become member names in what is written later.
        if prefix.startswith("/") or ".." in prefix.split("/"):
            group.skip("member name is absolute or has '..'")
        if group.key != prefix:
            group.skip("member name is not UTF-8")


def _no_member(suffix: str, info: tarfile.TarInfo) -> str:
    large = f"larger than {_most_bytes(suffix) >> 20} MiB"
    return f"the .{suffix} member is {large if _is_plain(info) else 'a link or special file, no plain file'}"


_IMAGES = frozenset((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
_DOTTED = "its sample has no image: a key ends at the first dot of a name; rename, or use `milan-pipe prepare`"
_WANTED = frozenset((*IMAGE_SUFFIXES, "cls", "txt", "json"))


def split_member_name(name: str) -> tuple[str, str]:
    """Key and lower-case suffix by webdataset's rule: cut at the first dot of the last part; ("", "") if none."""
    # Not by webdataset's expression, which takes the square of a name's slashes.
    last = name.rfind("/") + 1
    dot = name.find(".", last)
    # A last part that begins with the dot is a suffix where the part before it has none.
    if dot < 1 or (dot == last and "." in name[name.rfind("/", 0, last - 1) + 1 : last]):
        return "", ""
    if re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return name[:dot], name[dot + 1 :].lower()


@contextmanager
def opened(shard: ShardFile, copy: IO[bytes] | None = None) -> Iterator[IO[bytes]]:
    """A shard's file, or its copy, which stays open; errors of reading, also within, name the shard."""
    try:
        if copy is not None:
            yield copy
        else:
            with shard.open() as file:
                yield file
    except MissingError as error:
        raise MissingError(f"shard {error}") from None
    except StoreError as error:
        if shard.location.local is None:
            raise
        raise DataError(f"shard {error}") from error
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {system_reason(error)}") from error


class _Headers:
    """A tar as `tarfile` reads its headers: one member's may be so long only, whatever they say of themselves."""

    def __init__(self, shard: ShardFile, file: IO[bytes]) -> None:
        self._shard, self._file, self.seek, self.tell = shard, file, file.seek, file.tell
        self.left = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise DataError(
                f"shard {self._shard}: the header of a member at byte {self._file.tell()} is damaged, or longer than "
                f"{_MAX_HEADER_BYTES >> 20} MiB; copy or prepare it again"
            )
        self.left -= size
        data = self._file.read(size)
        # No name and no number is as long, and Python before 3.11.10 takes the square of it (CVE-2024-6232).
        if _DIGITS.search(data):
            raise DataError(f"shard {self._shard}: the header of a member at byte {self._file.tell()} is damaged")
        return data


def walk(shard: ShardFile, file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar's members, each checked to lie behind the last one and within the tar.

    Args:
        file: the tar, or its beginning.
        size: of the whole tar in bytes.

    Raises:
        DataError: it is empty, no plain tar, cut or damaged.
    """
    file.seek(0)
    if size == 0:
        raise DataError(f"shard {shard} is an empty file")
    end = -1
    try:
        headers: Any = _Headers(shard, file)
        tar = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (info := tar.next()) is not None:
            # A header may claim a size that leads backwards or past the end.
            if tar.offset <= end or info.size < 0 or info.offset_data + (0 if info.issparse() else info.size) > size:
                raise _damaged(shard, info.offset)
            end = tar.offset
            yield info
            headers.left = _MAX_HEADER_BYTES
            # The list would grow with the shard.
            tar.members = []  # type: ignore[attr-defined]
            if len(tar.pax_headers) > _MOST_GLOBAL_RECORDS:
                raise _damaged(shard, info.offset)
    # What cannot be read is not damaged.
    except (MilanError, OSError):
        raise
    # tarfile lets ValueError, OverflowError and others through when a header is damaged.
    except Exception as error:
        if end < 0 and isinstance(error, tarfile.TarError):
            raise DataError(f"{shard} is not a plain tar file (a compressed one must be unpacked first)") from None
        raise _damaged(shard, max(end, 0)) from error
    # tarfile takes a cut, or a damaged header, between two members for the end. The true end is a block of zeros.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != _NUL_BLOCK:
        raise _damaged(shard, tar.offset)


def _damaged(shard: ShardFile, offset: int) -> DataError:
    return DataError(f"shard {shard} is cut or damaged at byte {offset}; copy or prepare it again")


def _sample_of(group: _Group) -> Sample:
    """The sample of these members; raises where it is skipped."""
    if group.fault is not None:
        raise DataError(group.fault)
    if not group.image:
        raise DataError("empty file")
    if group.text_fault is not None:
        raise DataError(group.text_fault)
    label, caption = -1, None
    if "json" in group.parts:
        try:
            values = json.loads(group.parts["json"])
        except (ValueError, RecursionError):
            raise DataError("json cannot be parsed") from None
        if isinstance(values, dict):
            found = next((values[name] for name in ("label", "cls") if values.get(name) is not None), -1)
            label = _checked_label(found, "label in json")
            caption = next((values[name] for name in ("caption", "txt") if isinstance(values.get(name), str)), None)
    if "cls" in group.parts:
        text = group.parts["cls"].decode("utf-8", "replace").strip()
        if not re.fullmatch(r"-?\d{1,19}", text, re.ASCII):
            raise DataError(f"cls is not a whole number, found {text[:40]!r}")
        label = _checked_label(int(text), "cls")
    if "txt" in group.parts:
        try:
            caption = group.parts["txt"].decode() or caption
        except UnicodeDecodeError:
            raise DataError("txt is not UTF-8") from None
    return Sample(key=group.key, data=group.data, label=label, caption=caption, image=group.image, mask=group.mask)


def _checked_label(value: object, where: str) -> int:
    if type(value) is not int or not -1 <= value < 2**63:
        raise DataError(f"{where} must be a whole number from -1 to 2**63 - 1, found {str(value)[:40]!r}")
    return value
