"""The rows of parquet, CSV and TSV files, from any of them on, without holding a file in memory."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import IO, Any

from milan_pipe.errors import DataError, LabelError, MilanError, one_line
from milan_pipe.extras import needs
from milan_pipe.images.files import suffix_of
from milan_pipe.images.shards import ShardFile

TABLE_SUFFIXES = ("parquet", "csv", "tsv")

# A file says how large it is as it likes, and holds a value once that stands in millions of rows.
_ROWS_AT_ONCE = 1
_LABELS_AT_ONCE = 256
_MOST_LABEL_BYTES = 2**26
_MOST_ROWS = 10**9
_READ_AHEAD = 2**20
# No field of such a row is too long for the module csv.
_MAX_ROW_BYTES = 2**17


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a table says of its columns.

    Attributes:
        columns: what each holds, by name: `bytes` (an encoded image, plain or as the hub keeps it), `text`, `list of
            text`, `number`, or else the name of its type.
        class_names: of columns whose labels are numbers with names, as the hub keeps them.
    """

    columns: Mapping[str, str]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Neighbouring rows of a file.

    Attributes:
        first: number of the first one, from 0.
        offset: byte that it begins at in a file of lines.
    """

    file: ShardFile
    first: int
    count: int
    offset: int = 0


def read_header(file: ShardFile) -> Header:
    """The columns of a table; raises DataError where it cannot be read as what its suffix says."""
    if not _is_parquet(file):
        with _reading(file), file.open() as stream:
            return Header(columns=dict.fromkeys(_Lines(file, stream).names, "text"))
    with _parquet(file) as opened:
        schema = opened.schema_arrow
        columns = {column.name: _kind(column.type) for column in schema}
        return Header(columns=columns, class_names=_class_names(schema.metadata or {}))


def rows_and_labels(file: ShardFile, label: str | None, step: int) -> tuple[list[Rows], set[Any]]:
    """The rows of a file in parts of `step`, and the values of the column `label`.

    Raises as `read_header`, and LabelError where a column has more different values than classes can have.
    """
    labels = _Labels(file, label)
    if _is_parquet(file):
        with _parquet(file, [label] if label is not None else []) as opened:
            total = opened.metadata.num_rows
            groups = sum(opened.metadata.row_group(number).num_rows for number in range(opened.metadata.num_row_groups))
            if total != groups:
                raise DataError(f"{file} says that it has {total} rows, its parts have {groups}; copy it again")
            if not 0 <= total <= _MOST_ROWS:
                raise DataError(f"{file} says that it has {total} rows, expected at most {_MOST_ROWS}; copy it again")
            if label is not None:
                for batch in opened.iter_batches(_LABELS_AT_ONCE, columns=[label], use_threads=False):
                    labels.add(batch.column(0).unique().to_pylist())
        parts = [Rows(file=file, first=first, count=min(step, total - first)) for first in range(0, total, step)]
        return parts, labels.values
    parts = []
    with _reading(file), file.open() as stream:
        lines = _Lines(file, stream)
        first, offset, number = 0, lines.bytes, 0
        for number, row in enumerate(lines.rows(), 1):
            if label is not None:
                labels.add([row.get(label)])
            if number - first == step:
                parts.append(Rows(file=file, first=first, count=step, offset=offset))
                first, offset = number, lines.bytes
    if number > first:
        parts.append(Rows(file=file, first=first, count=number - first, offset=offset))
    return parts, labels.values


def read_rows(
    rows: Rows, columns: Sequence[str], most: Mapping[str, int] = MappingProxyType({})
) -> Iterator[dict[str, Any]]:
    """Values by column of each row.

    Args:
        most: of columns the bytes that a value may have; a DataError is in the place of a larger one, and says so.

    Raises:
        DataError: the file is damaged.
        StoreError: it is out of reach.
    """
    return _parquet_rows(rows, columns, most) if _is_parquet(rows.file) else _lines_rows(rows)


class _Labels:
    """The different values of a column, as many as classes can have."""

    def __init__(self, file: ShardFile, column: str | None) -> None:
        self._file, self._column, self._bytes = file, column, 0
        self.values: set[Any] = set()

    def add(self, values: Iterable[Any]) -> None:
        new = set(values) - self.values
        self._bytes += sum(map(sys.getsizeof, new))
        if self._bytes > _MOST_LABEL_BYTES:
            raise LabelError(
                f"{self._file}: column {self._column} has more than {_MOST_LABEL_BYTES >> 20} MiB of different values, "
                "expected names of classes: name another one with prepare.label_column=NAME, or none with "
                "prepare.label_column=false"
            )
        self.values |= new


def _is_parquet(file: ShardFile) -> bool:
    return suffix_of(file.name) == "parquet"


@contextmanager
def _reading(file: ShardFile) -> Iterator[None]:
    try:
        yield
    except MilanError:
        raise
    # pyarrow raises ValueError, OSError, NotImplementedError and its own kinds for files that are damaged.
    except Exception as error:
        raise DataError(f"{file} cannot be read as {suffix_of(file.name)}: {one_line(error)}; copy it again") from error


# --- parquet ------------------------------------------------------------------------------------------------------


@contextmanager
def _parquet(file: ShardFile, repeated: Sequence[str] = ()) -> Iterator[Any]:
    """A file, its columns `repeated` with each value held once."""
    with needs("hub", "reading parquet files"):
        from pyarrow.parquet import ParquetFile
    with (
        _reading(file),
        file.open() as stream,
        ParquetFile(stream, pre_buffer=False, buffer_size=_READ_AHEAD, read_dictionary=repeated) as opened,
    ):
        yield opened


def _kind(of: Any) -> str:
    with needs("hub", "reading parquet files"):
        from pyarrow import types

    if types.is_struct(of):
        names = {of.field(number).name: of.field(number).type for number in range(of.num_fields)}
        return "bytes" if "bytes" in names and _kind(names["bytes"]) == "bytes" else "struct"
    if types.is_dictionary(of):
        return _kind(of.value_type)
    if types.is_list(of) or types.is_large_list(of):
        return "list of text" if _kind(of.value_type) == "text" else "list"
    kinds = {
        "bytes": (types.is_binary, types.is_large_binary),
        "text": (types.is_string, types.is_large_string, types.is_null),
        "number": (types.is_integer, types.is_floating),
    }
    return next((kind for kind, tests in kinds.items() if any(test(of) for test in tests)), str(of).partition("<")[0])


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of classes by column, as the library `datasets` writes them beside a schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        found = {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
        # Half of a surrogate pair can be neither written nor shown.
        "".join(name for names in found.values() for name in names).encode()
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Rows of a row group.

    Attributes:
        first, stop: numbers in the file of the first row, and of the one behind the last.
        group_stop: the same of their row group.
    """

    rows: Any
    first: int
    stop: int
    group_stop: int


def _batches(file: ShardFile, columns: Sequence[str], first: int) -> Iterator[_Batch]:
    """Those of the row group that row `first` is in, from its beginning, and of all behind it."""
    with _parquet(file) as opened:
        at = 0
        for number in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(number)
            stop = at + group.num_rows
            if stop <= first:
                at = stop
                continue
            for rows in opened.iter_batches(
                _ROWS_AT_ONCE, row_groups=[number], columns=list(columns), use_threads=False
            ):
                yield _Batch(rows=rows, first=at, stop=at + rows.num_rows, group_stop=stop)
                at += rows.num_rows


# Where the last rows ended in the middle of a row group, which cannot be entered there: the file and its columns, the
# batch that they ended in, and those behind it. Whoever goes on takes it out.
_left_open: list[tuple[tuple[Any, ...], _Batch, Iterator[_Batch]]] = []


def _parquet_rows(rows: Rows, columns: Sequence[str], most: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    source, at, stop = (rows.file, *columns), rows.first, rows.first + rows.count
    behind, last = _batches(rows.file, columns, at), []
    with suppress(IndexError):
        left, batch, on = _left_open.pop()
        if left == source and batch.first <= at < batch.group_stop:
            behind, last = on, [batch]
        # Of a file that is read from another row its page is let go before the next one is there.
        del on
    for batch in chain(last, behind):
        first, at = max(at, batch.first), max(at, min(stop, batch.stop))
        # Text that is no UTF-8 shows here.
        with _reading(rows.file):
            values = [_values(batch.rows.slice(number - batch.first, 1), most) for number in range(first, at)]
        yield from values
        if at == stop:
            if stop < batch.group_stop:
                _left_open.append((source, batch, behind))
            return
    raise DataError(f"{rows.file} ends at row {at}, expected {stop}; copy it again")


def _values(row: Any, most: Mapping[str, int]) -> dict[str, Any]:
    large = {
        name: DataError(f"the value of column {name} is larger than {bound >> 20} MiB")
        for name, bound in most.items()
        if _bytes_in(row.column(name)) > bound
    }
    return {name: large.get(name) or row.column(name)[0].as_py() for name in row.schema.names}


def _bytes_in(values: Any) -> int:
    """Bytes of an array's values, and one for each of a list's."""
    with needs("hub", "reading parquet files"):
        from pyarrow import compute, types

    if types.is_struct(values.type):
        return sum(map(_bytes_in, values.flatten()))
    if types.is_list(values.type) or types.is_large_list(values.type):
        return len(values.flatten()) + _bytes_in(values.flatten())
    if types.is_dictionary(values.type):
        return _bytes_in(values.dictionary_decode())
    if _kind(values.type) in ("bytes", "text") and not types.is_null(values.type):
        return compute.sum(compute.binary_length(values)).as_py() or 0
    return int(values.nbytes)


# --- lines --------------------------------------------------------------------------------------------------------


class _Lines:
    """The rows of a CSV or TSV file, whose first line names its columns.

    Attributes:
        bytes: that the rows so far have taken.
    """

    def __init__(self, file: ShardFile, stream: IO[bytes], names: Sequence[str] = (), offset: int = 0) -> None:
        self._stream, self.bytes = stream, offset
        stream.seek(offset)
        self._file, self._row, self._line = file, offset, 1
        separator = "\t" if suffix_of(file.name) == "tsv" else ","
        self._reader = csv.reader(self._texts(), delimiter=separator, strict=True)
        self.names = names or next(self._values(), [])

    def _texts(self) -> Iterator[str]:
        while line := self._stream.readline(_MAX_ROW_BYTES + 1):
            if self.bytes + len(line) - self._row > _MAX_ROW_BYTES:
                raise DataError(
                    f"{self._file}: the row that begins in line {self._line} is longer than the {_MAX_ROW_BYTES} bytes "
                    "that are read; look for a quote that is not closed, or shorten it"
                )
            # Some programs begin a file with a mark of its encoding.
            text = line.decode("utf-8" if self.bytes else "utf-8-sig")
            self.bytes += len(line)
            yield text

    def _values(self) -> Iterator[list[str]]:
        for values in self._reader:
            self._row, self._line = self.bytes, self._reader.line_num + 1
            yield values

    def rows(self) -> Iterator[dict[str, str]]:
        for values in self._values():
            if values:
                yield dict(zip(self.names, values, strict=False))


def _lines_rows(rows: Rows) -> Iterator[dict[str, Any]]:
    with _reading(rows.file), rows.file.open() as stream:
        names = _Lines(rows.file, stream).names
        lines = _Lines(rows.file, stream, names, rows.offset).rows()
        for _, row in zip(range(rows.count), lines, strict=False):
            yield row
