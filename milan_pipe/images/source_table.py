"""Tables as a source: parquet files with the bytes of images, and lists of paths or URLs."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any
from urllib.parse import quote

from milan_pipe.config.images import ImageSettings, PrepareSettings
from milan_pipe.errors import DataError, LabelError, SettingError, without_secrets
from milan_pipe.images.ahead import decoded_ahead
from milan_pipe.images.decode import decode_pixels, stored_suffix
from milan_pipe.images.download import download, stored
from milan_pipe.images.files import (
    MAX_ENCODED_BYTES,
    MAX_TEXT_BYTES,
    files_under,
    printable_name,
    read_file,
    suffix_of,
)
from milan_pipe.images.shards import ShardFile, expand_shards, shard_file
from milan_pipe.images.source import Bad, Job, Members, Source, free_key, label_and_caption
from milan_pipe.images.table import TABLE_SUFFIXES, Header, Rows, read_header, read_rows, rows_and_labels
from milan_pipe.storage import Location, is_url, location_of
from milan_pipe.units import some

LIST_SUFFIXES = (".csv", ".tsv")

# In the order in which they are looked for; capitals make no difference.
_IMAGE_NAMES = ("image", "img", "url", "path", "image_path", "file_name")
_LABEL_NAMES = ("label", "labels")
_CAPTION_NAMES = ("caption", "text", "captions")

_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev"),
}
_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
_NUMBER, _WHOLE_FLOAT = re.compile(r"-?[0-9]+(\.[0-9]*)?"), re.compile(r"-?[0-9]{1,18}\.0+")
_NO_LABEL = ("", "-1")

_NUMBERED = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}\b.*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """A table, and the parts of its path below what all tables of a source have in common."""

    file: ShardFile
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Columns:
    image: str
    holds_bytes: bool
    label: str | None
    caption: str | None


@dataclass(frozen=True, kw_only=True)
class _Row:
    key: str
    image: Any
    members: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Rows to pack. `labels` has the index of each class that is told by name."""

    rows: Rows
    prefix: str
    columns: _Columns
    labels: Mapping[str, int]
    settings: PrepareSettings
    limits: ImageSettings

    def __len__(self) -> int:
        return self.rows.count

    def members(self, bad: list[Bad]) -> Iterator[Members]:
        """The samples in their order; what cannot be read goes into `bad`.

        Memory holds at most twice `downloads` encoded images, each of up to `MAX_DOWNLOADED_BYTES` where it is fetched,
        and the pixels of one.
        """
        decoding = Lock()
        shown: dict[str, str] = {}

        def rows() -> Iterator[_Row]:
            for row in self._rows():
                shown[row.key] = _shown(row.image, self.rows.file)
                yield row

        def skip(key: str, reason: str) -> None:
            bad.append({"key": key, "file": shown.pop(key), "reason": reason})

        def read(row: _Row) -> Members:
            data = self._encoded(row.image)
            # There is a process for each core.
            with decoding:
                decode_pixels(data, limits=self.limits)
            return row.key, {stored_suffix(data, self.limits): data} | row.members

        threads = 1 if self.columns.holds_bytes else self.settings.downloads
        for key, members in decoded_ahead(rows(), read, threads, 2 * threads, skip):
            del shown[key]
            yield key, members

    def _rows(self) -> Iterator[_Row]:
        columns = self.columns
        wanted = [name for name in (columns.image, columns.label, columns.caption) if name is not None]
        most = {columns.image: MAX_ENCODED_BYTES if columns.holds_bytes else MAX_TEXT_BYTES}
        if columns.caption is not None:
            most[columns.caption] = MAX_TEXT_BYTES
        for number, values in enumerate(read_rows(self.rows, wanted, most), self.rows.first):
            label = _label_index(values.get(columns.label), self.labels) if columns.label else -1
            image, caption = values.get(columns.image), values.get(columns.caption or "")
            large = isinstance(caption, DataError)
            yield _Row(
                key=f"{self.prefix}-{number:07d}",
                image=caption if large else image,
                members=label_and_caption(label, "" if large else _caption(caption)),
            )

    def _encoded(self, image: Any) -> bytes:
        if isinstance(image, DataError):
            raise image
        held = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(held, bytes):
            return held
        if isinstance(image, dict):
            raise DataError("the row has a path and no bytes; write the table again with its images embedded")
        if not image:
            raise DataError("the row names no image")
        if is_url(image):
            return download(image, self.settings.download_seconds)
        folder = self.rows.file.location
        if folder.local is not None:
            return read_file(folder.local / image)
        # A list from elsewhere has no say about the files of this machine.
        if image.startswith("/") or ".." in PurePosixPath(image).parts:
            raise DataError("the path leads out of its list's folder, which is not on this machine")
        if folder.listable:
            # Not by its address, which may lead to a later commit of a hub.
            return stored(folder, image)
        return download(f"{folder.address}/{image}", self.settings.download_seconds)


def _shown(image: Any, file: ShardFile) -> str:
    if isinstance(image, str) and is_url(image):
        # In a text a URL ends at these.
        return without_secrets(re.sub(r"[\s'\"]", lambda found: quote(found[0]), image))
    if isinstance(image, str):
        return printable_name(image)
    name = image.get("path") if isinstance(image, dict) else None
    return printable_name(str(name or file.name))


def _caption(value: Any) -> str:
    """A line for each caption."""
    captions = value if isinstance(value, list) else [value]
    return "\n".join(filter(None, (" ".join(str(caption or "").split()) for caption in captions)))


def find_tables(source: str | Path) -> list[TableFile]:
    """The tables that a file, pattern, folder or URL names; none where it is something else.

    Raises:
        MissingError, SettingError, StoreError: as `expand_shards`.
        DataError: a folder cannot be listed, or a table's web address has a query.
    """
    text = str(source)
    suffix = suffix_of(text)
    if not is_url(text) and Path(text).is_dir():
        root = Path(text)
        return _below(
            location_of(root), (path.relative_to(root).as_posix() for path in files_under(root, ("parquet",)))
        )
    if suffix_of(text.partition("?")[0]) in TABLE_SUFFIXES and re.match(r"https?://[^?]*\?", text, re.IGNORECASE):
        raise DataError(
            f"source {text} is a web address with a query, as signed ones have; tables are read from addresses without "
            "one: download it, and name the file"
        )
    if suffix in TABLE_SUFFIXES:
        one = not (glob.has_magic(text) or "{" in text)
        if one and not is_url(text) and not Path(text).exists():
            return []
        found = [shard_file(text)] if one else expand_shards(text)
        paths = [str(file).split("/") for file in found]
        shared = _shared_parts([path[:-1] for path in paths])
        return [TableFile(file=file, parts=tuple(path[shared:])) for file, path in zip(found, paths, strict=True)]
    if is_url(text) and suffix != "tar":
        location = location_of(text)
        names = location.sizes() if location.listable else ()
        return _below(location, (name for name in names if suffix_of(name) == "parquet"))
    return []


def _below(location: Location, names: Iterable[str]) -> list[TableFile]:
    return [TableFile(file=ShardFile(location, name), parts=tuple(name.split("/"))) for name in names]


def _shared_parts(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths begin with."""
    return next((n for n, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))


def table_source(
    source: str | Path, tables: Sequence[TableFile], settings: PrepareSettings, limits: ImageSettings
) -> Source:
    """The images of these tables.

    Raises:
        DataError: a table cannot be read, has no column of images or no rows, or other classes than the first one.
        LabelError: a label is none.
        SettingError: it has no column of a name that the settings have.
        MissingError: pyarrow is not installed, and a table is a parquet file.
        StoreError: an object store cannot be read.
    """
    keys: set[str] = set()
    parts: list[tuple[TableFile, str, _Columns, list[Rows]]] = []
    values: set[Any] = set()
    names: tuple[str, ...] | None = None
    for table in tables:
        header = read_header(table.file)
        columns = _columns(table.file, header, settings)
        named = header.class_names.get(columns.label or "")
        if parts and named != names:
            raise DataError(
                f"{table.file} has other classes than {tables[0].file}; prepare them one by one, or correct one"
            )
        names = named
        rows, found = rows_and_labels(table.file, columns.label, settings.samples_per_shard)
        _require_labels(table.file, columns.label, found)
        values |= found
        prefix = free_key(table.parts, keys)
        keys.add(prefix)
        parts.append((table, prefix, columns, rows))
    if not any(rows for *_, rows in parts):
        raise DataError(f"source {source} has no rows; expected one for each image")
    classes, labels = _classes(source, values, names)
    jobs = [
        Job(
            split=split_of(table.parts, settings.split),
            part=_Table(
                rows=some_rows, prefix=prefix, columns=columns, labels=labels, settings=settings, limits=limits
            ),
        )
        for table, prefix, columns, rows in parts
        for some_rows in rows
    ]
    where = without_secrets(str(source)) if is_url(source) else printable_name(Path(source).as_posix())
    return Source(described={"kind": "table", "path": where}, jobs=jobs, classes=classes)


def split_of(parts: Sequence[str], otherwise: str) -> str:
    """The split that a file's path names, by the hub's rules: `train-00000-of-00005.parquet`, `test/1.parquet`."""
    if found := _NUMBERED.fullmatch(parts[-1]):
        return next((split for split, words in _SPLITS.items() if found["split"].lower() in words), found["split"])
    for part in reversed(parts):
        words = re.split(r"[^a-z0-9]+", part.lower())
        for split, known in _SPLITS.items():
            if any(word in known for word in words):
                return split
    return otherwise


# --- columns ------------------------------------------------------------------------------------------------------


def _columns(file: ShardFile, header: Header, settings: PrepareSettings) -> _Columns:
    kinds = header.columns
    for setting in ("image_column", "label_column", "caption_column"):
        name = getattr(settings, setting)
        if name and name not in kinds:
            raise SettingError(f"prepare.{setting} is {name!r}, {file} has the columns {some(list(kinds), 12)}")
    with_bytes = [name for name, kind in kinds.items() if kind == "bytes"]
    with_text = [name for name, kind in kinds.items() if kind == "text"]
    image = settings.image_column or _named(with_bytes, _IMAGE_NAMES) or _only(file, "image", with_bytes)
    image = image or _named(with_text, _IMAGE_NAMES)
    if image is None or kinds[image] not in ("bytes", "text"):
        raise DataError(
            f"{file} has no column of images among {some(list(kinds), 12) or 'none at all'}; expected bytes of images, "
            "as in `image`, or their paths or URLs, as in `path` or `url`: name it with prepare.image_column"
        )
    others = [name for name in kinds if name != image]
    label, caption = settings.label_column, settings.caption_column
    if label is None:
        label = _named(others, _LABEL_NAMES) or _only(
            file, "label", [name for name in header.class_names if name in others]
        )
    if label and kinds[label] not in ("text", "number"):
        raise LabelError(
            f"{file}: column {label} has values of type {kinds[label]}, no labels; expected whole numbers from 0, or "
            "names: name another one with prepare.label_column=NAME, or none with prepare.label_column=false"
        )
    if caption is None:
        caption = _named([name for name in others if kinds[name] in ("text", "list of text")], _CAPTION_NAMES)
    return _Columns(image=image, holds_bytes=kinds[image] == "bytes", label=label or None, caption=caption or None)


def _named(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for word in known for name in names if name.lower() == word), None)


def _only(file: ShardFile, what: str, names: Sequence[str]) -> str | None:
    if len(names) > 1:
        raise DataError(f"{file} has several columns of {what}s, {some(names, 12)}; choose with prepare.{what}_column")
    return names[0] if names else None


# --- labels -------------------------------------------------------------------------------------------------------


def _require_labels(file: ShardFile, column: str | None, values: set[Any]) -> None:
    wrong = [value for value in values if not _is_label(value)]
    if wrong:
        raise LabelError(
            f"{file}: {str(wrong[0])[:40]!r} in column {column} is no label; expected whole numbers from 0, names, or "
            "nothing (-1) where there is none"
        )


def _is_label(value: Any) -> bool:
    if isinstance(value, float):
        # pandas makes floats of whole numbers where some are missing.
        return math.isnan(value) or (value.is_integer() and value >= -1)
    return value is None or isinstance(value, str) or (type(value) is int and -1 <= value < 2**63)


def _classes(
    source: str | Path, values: set[Any], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Names of the classes, if they have some, and the index of each that is told by its name."""
    told = {_label_text(value) for value in values} - set(_NO_LABEL)
    if told and not all(map(_WHOLE_NUMBER.fullmatch, told)):
        # Sorted as names, they would be other classes than their numbers.
        if numbers := sorted(filter(_NUMBER.fullmatch, told)):
            raise LabelError(
                f"{source} has labels that are numbers, as {numbers[0]!r}, and some that are no whole numbers from 0; "
                "expected one kind alone, and nothing (-1) where there is none"
            )
        classes = tuple(sorted(told))
        return classes, {name: label for label, name in enumerate(classes)}
    highest = max(map(int, told), default=-1)
    if names is not None and highest >= len(names):
        raise LabelError(f"{source} has label {highest}, and names of {len(names)} classes; correct the labels")
    return names, {}


def _label_index(value: Any, labels: Mapping[str, int]) -> int:
    """The class index of a label of any kind, -1 for none."""
    text = _label_text(value)
    if text in _NO_LABEL:
        return -1
    return labels[text] if labels else int(text)


def _label_text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value))
    text = "" if value is None else str(value).strip()
    # In lists too pandas makes floats of whole numbers where some are missing.
    return text.partition(".")[0] if _WHOLE_FLOAT.fullmatch(text) else text
