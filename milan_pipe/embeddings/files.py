"""One shard's embeddings as a parquet file or a zarr group, written a few rows at a time.

Shape suffixes: N images, B of them at a time, L patches, D width.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from milan_pipe.errors import StoreError, system_reason
from milan_pipe.extras import needs
from milan_pipe.storage import Location
from milan_pipe.storage.local import make_folder, whole_file

_GROUP_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Key, label (-1 where there is none), embedding (B, D), and patches (B, L, D) where they are wanted."""

    keys: list[str]
    label_B: NDArray[np.int64]
    embedding_BD: NDArray[np.floating[Any]]
    patches_BLD: NDArray[np.floating[Any]] | None

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows."""
        patches = self.patches_BLD
        return Rows(
            keys=self.keys[start:stop],
            label_B=self.label_B[start:stop],
            embedding_BD=self.embedding_BD[start:stop],
            patches_BLD=None if patches is None else patches[start:stop],
        )

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """All rows of several."""
        patches = [part.patches_BLD for part in parts if part.patches_BLD is not None]
        return Rows(
            keys=[key for part in parts for key in part.keys],
            label_B=np.concatenate([part.label_B for part in parts]),
            embedding_BD=np.concatenate([part.embedding_BD for part in parts]),
            patches_BLD=np.concatenate(patches) if patches else None,
        )


class _Writer(ABC):
    """Gathers rows into groups of one size, so that what is written does not depend on the batches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[Rows] = []
        self._size = 0

    def append(self, rows: Rows) -> None:
        """Write the next rows."""
        if not self._size:
            patches = rows.patches_BLD
            row_bytes = rows.embedding_BD[0].nbytes + (0 if patches is None else patches[0].nbytes)
            self._size = max(1, _GROUP_BYTES // row_bytes)
            self._begin(rows)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= self._size:
            whole = Rows.joined(self._waiting)
            end = len(whole) // self._size * self._size
            for start in range(0, end, self._size):
                self._put(whole.part(start, start + self._size))
            self._waiting = [whole.part(end, len(whole))]

    def finish(self) -> None:
        """Write what waits."""
        if any(map(len, self._waiting)):
            self._put(Rows.joined(self._waiting))

    @abstractmethod
    def _begin(self, rows: Rows) -> None: ...

    @abstractmethod
    def _put(self, rows: Rows) -> None: ...


def _arrow() -> Any:
    with needs("hub", "writing parquet files"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


class _Parquet(_Writer):
    """Columns key, label, embedding and patches; a group of rows is a row group."""

    _file: Any = None

    def _begin(self, rows: Rows) -> None:
        pa = _arrow()
        value, width = pa.from_numpy_dtype(rows.embedding_BD.dtype), rows.embedding_BD.shape[1]
        columns = {"key": pa.string(), "label": pa.int64(), "embedding": pa.list_(value, width)}
        if rows.patches_BLD is not None:
            columns["patches"] = pa.list_(pa.list_(value, width), rows.patches_BLD.shape[1])
        self._schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
        # Numbers of features neither repeat nor shrink.
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": ["key", "label"]}
        self._file = pa.parquet.ParquetWriter(self._path, self._schema, **plain)

    def _put(self, rows: Rows) -> None:
        pa = _arrow()
        columns: list[Any] = [pa.array(rows.keys, pa.string()), pa.array(rows.label_B)]
        for values in (rows.embedding_BD, rows.patches_BLD):
            if values is not None:
                column = pa.array(values.reshape(-1))
                for size in reversed(values.shape[1:]):
                    column = pa.FixedSizeListArray.from_arrays(column, size)
                columns.append(column)
        columns = [column.cast(field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._file.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=len(rows))

    def finish(self) -> None:
        super().finish()
        self._file.close()


class _Zarr(_Writer):
    """Arrays key, label, embedding and patches; a group of rows is a chunk."""

    def _begin(self, rows: Rows) -> None:
        import zarr

        from milan_pipe.targets.zarr_store import own_folder

        self._group = zarr.create_group(own_folder(self._path), zarr_format=3)
        for name, values in self._arrays(rows).items():
            shape = values.shape[1:]
            kind: Any = str if name == "key" else values.dtype
            axes = ("image", *(("patch", "dimension") if name == "patches" else ("dimension",))[: len(shape)])
            layout: dict[str, Any] = {"chunks": (self._size, *shape), "dimension_names": axes}
            self._group.create_array(name, shape=(0, *shape), dtype=kind, **layout)

    @staticmethod
    def _arrays(rows: Rows) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"key": np.array(rows.keys, dtype=object), "label": rows.label_B}
        arrays["embedding"] = rows.embedding_BD
        return arrays if rows.patches_BLD is None else {**arrays, "patches": rows.patches_BLD}

    def _put(self, rows: Rows) -> None:
        for name, values in self._arrays(rows).items():
            array: Any = self._group[name]
            start = array.shape[0]
            array.resize((start + len(values), *values.shape[1:]))
            array[start:] = values


def require_packages(format: Literal["parquet", "zarr"]) -> None:
    """Raise MissingError where the packages of a format are not installed."""
    if format == "parquet":
        _arrow()


@contextmanager
def new_file(location: Location, name: str, format: Literal["parquet", "zarr"]) -> Iterator[_Writer]:
    """A writer of `name` in a folder, which is there as a whole at the end, and not at all after an error.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        if format == "parquet" and location.local is not None:
            make_folder(location.local)
            with whole_file(location.local / name) as partial:
                writer: _Writer = _Parquet(partial)
                yield writer
                writer.finish()
            return
        scratch = location.scratch(name)
        try:
            writer = _Zarr(scratch) if format == "zarr" else _Parquet(scratch / name)
            yield writer
            writer.finish()
            if format == "zarr":
                location.publish(scratch, name)
            else:
                location.write(name, (scratch / name).read_bytes())
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{location}/{name} cannot be written: {system_reason(error)}") from error
