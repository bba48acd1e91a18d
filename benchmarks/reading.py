"""Samples read a second: a store in either format against np.memmap over the same bytes, in one run.

    python -m benchmarks.reading WORK [--samples 4096] [--passes 3] [--only files loader]

A sample is what training reads of a ViT-B/16 view: codes of 197 x 512 int8, their scales, attention, and a JPEG of
24 KB; values are drawn so that they shrink like real codes (7 bits a dimension). Three readers stand beside the stores:

- np.memmap over the zarr store's own files of codes and JPEGs (zstd_level=0), copied 64 samples at a time;
- np.memmap over one flat file of records with the same bytes, copied 64 at a time. The kernel maps one long file by
  larger pages than many short ones, which is worth as much as all that a reader does;
- the same, and the crc32c of each record, as the stores take it of all that they hand out.

All files are put out of the page cache and read again before the first pass, so that none is in the state in which it
was written. Every pass opens its store anew; the best pass counts. In order, all let go of what they read before the
next. `shuffled` reads blocks of 128 in random order over shards and copies the samples of 16 blocks out in random
order, as the loader does; the memmap of the flat file copies records in the same random order, the two others go
through theirs in order.

`loader` compares the reader with zarr and its zarrs pipeline alone (rendered views apart), which leave the crc32c of
uncompressed chunks unchecked, and with reading all files of the store whole: blocks in the loader's order, then the
loader, JPEGs decoded. Memory that is freed is kept, as by the command line, for all readers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from zarr.storage import LocalStore, StorePath

from milan_pipe import __version__
from milan_pipe.cli.console import keep_freed_memory
from milan_pipe.config.targets import CodecSettings
from milan_pipe.images.views import encode_jpeg
from milan_pipe.loader.order import BatchPlan, EpochOrder
from milan_pipe.loader.stream import Loader
from milan_pipe.targets.checksum import crc32c
from milan_pipe.targets.codec import build_codec
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreFormat,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
)
from milan_pipe.targets.store import TargetStoreWriter, open_targets
from milan_pipe.targets.zarr_store import ZarrShard, use_fast_pipeline

GRID, WIDTH, JPEG_BYTES, SHARD_SAMPLES, BATCH, SHUFFLE_BLOCKS = 14, 512, 24_000, 1024, 64, 16
RECORD = np.dtype(
    [
        ("code", np.int8, (1 + GRID**2, WIDTH)),
        ("scale", np.float16, (1 + GRID**2,)),
        ("attention", np.float16, (GRID**2,)),
        ("jpeg", np.uint8, (JPEG_BYTES,)),
    ]
)
CHECKED = "np.memmap, one flat file, crc32c"
OWN = "np.memmap, the zarr store's files"
FLAT = "np.memmap, one flat file"
STORES: dict[str, tuple[StoreFormat, int]] = {
    "zarr, zstd_level=0": ("zarr", 0),
    "zarr, zstd_level=1": ("zarr", 1),
    "webdataset, zstd_level=0": ("webdataset", 0),
    "webdataset, zstd_level=1": ("webdataset", 1),
}
LOADED = {"int8, zstd_level=0": "zarr, zstd_level=0", "int8, zstd_level=1": "zarr, zstd_level=1", "klt": "zarr, klt"}
# Codes of coefficients that are sorted by strength.
_KLT_DECAY = np.exp(-np.arange(WIDTH, dtype=np.float32) / 90)


def _records(samples: int, start: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(start)
    records = np.zeros(samples, RECORD)
    codes = rng.standard_normal((samples, 1 + GRID**2, WIDTH), np.float32) * 30
    records["code"] = np.clip(codes.round(), -127, 127)
    records["scale"] = rng.random(records["scale"].shape)
    records["attention"] = rng.random(records["attention"].shape)
    pixels = np.kron(rng.integers(64, 192, (14, 14, 3)), np.ones((16, 16, 1), int)) + rng.integers(
        -9, 10, (224, 224, 3)
    )
    jpeg = encode_jpeg(pixels.astype(np.uint8), 95)
    if len(jpeg) > JPEG_BYTES:
        raise RuntimeError(f"a JPEG of {len(jpeg)} bytes")
    # Decoders ignore what follows the end of an image.
    records["jpeg"] = np.frombuffer(jpeg.ljust(JPEG_BYTES, b"\0"), np.uint8)
    return records


def _header(store_format: StoreFormat, zstd_level: int, shards: int, codec: CodecInfo | None = None) -> StoreHeader:
    return StoreHeader(
        package_version=__version__,
        format=store_format,
        teacher=TeacherInfo(
            model="drawn",
            pretrained=None,
            weights_sha256="",
            normalization="clip",
            precision="float32",
            image_size=16 * GRID,
            grid=(GRID, GRID),
            width=WIDTH,
        ),
        views=ViewInfo(count=1, size=16 * GRID, scale=(0.2, 1), ratio=(1, 1), flip=0, seed=0, jpeg_quality=95),
        codec=codec or build_codec(CodecSettings(name="int8", zstd_level=zstd_level)).info,
        source=SourceInfo(shards=shards, fingerprint=""),
    )


def _block(records: np.ndarray[Any, Any], start: int) -> TargetBlock:
    count = len(records)
    return TargetBlock(
        keys=[f"{start + row:08d}" for row in range(count)],
        label_N=np.zeros(count, np.int64),
        code_KNST=records["code"][None],
        scale_KNS=records["scale"][None],
        attention_KNL=records["attention"][None],
        crop_KN4=np.ones((1, count, 4), np.int32),
        flip_KN=np.zeros((1, count), np.bool_),
        jpegs=[[row.tobytes() for row in records["jpeg"]]],
    )


def make(work: Path, samples: int) -> None:
    """Write the memmap and all stores, unless they are there."""
    flat = work / f"records-{samples}.bin"
    if flat.is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    shards = -(-samples // SHARD_SAMPLES)
    stores = {
        name: TargetStoreWriter(work / f"{name.replace(', ', '-')}-{samples}", _header(*kind, shards))
        for name, kind in STORES.items()
    }
    features = torch.randn(64, 1 + GRID**2, WIDTH, generator=torch.Generator().manual_seed(0))
    klt = build_codec(CodecSettings(name="klt"), features).info
    stores["zarr, klt"] = TargetStoreWriter(work / f"zarr-klt-{samples}", _header("zarr", 1, shards, klt))
    with flat.open("wb") as file:
        for shard in range(shards):
            count = min(SHARD_SAMPLES, samples - shard * SHARD_SAMPLES)
            writers = [store.open_shard(f"{shard:06d}") for store in stores.values()]
            for start in range(0, count, BLOCK_SAMPLES):
                first = shard * SHARD_SAMPLES + start
                records = _records(min(BLOCK_SAMPLES, count - start), first)
                file.write(records.tobytes())
                for name, writer in zip(stores, writers, strict=True):
                    if name == "zarr, klt":
                        records["code"] = records["code"] * _KLT_DECAY
                    writer.append(_block(records, first))
            for writer in writers:
                writer.commit(SourceShard(name=f"{shard:06d}.tar", bytes=0, sha256="", samples=count, bad=()))
    for store in stores.values():
        store.finish()


def _order(samples: int) -> EpochOrder:
    sizes = [min(SHARD_SAMPLES, samples - start) for start in range(0, samples, SHARD_SAMPLES)]
    return EpochOrder(samples=tuple(sizes), views=1, block=BLOCK_SAMPLES, shuffle_blocks=SHUFFLE_BLOCKS, seed=0)


def memmap_sequential(path: Path, samples: int) -> None:
    records = np.memmap(path, mode="r", dtype=RECORD, shape=(samples,))
    for start in range(0, samples, BATCH):
        np.array(records[start : start + BATCH])


def memmap_checked(path: Path, samples: int) -> None:
    """What a memmap costs that finds a flipped byte as the stores do."""
    records = np.memmap(path, mode="r", dtype=np.uint8, shape=(samples, RECORD.itemsize))
    for start in range(0, samples, BATCH):
        for record in np.array(records[start : start + BATCH]):
            crc32c(record)


def memmap_own(store: Path) -> None:
    """What a memmap costs over the very files of the zarr store."""
    for path in _large_files(store):
        data = np.memmap(path, mode="r", dtype=np.uint8)
        step = BATCH * RECORD["code"].itemsize
        for start in range(0, len(data), step):
            np.array(data[start : start + step])


def _large_files(store: Path) -> list[Path]:
    files = [*store.glob("shards/*/features/c/**/*"), *store.glob("shards/*/view_bytes/c/*")]
    return sorted(path for path in files if path.is_file())


def _read_anew(paths: Iterable[Path]) -> None:
    """Leave files in the page cache as reading them from disk does."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path.read_bytes()


def memmap_shuffled(path: Path, samples: int) -> None:
    records = np.memmap(path, mode="r", dtype=RECORD, shape=(samples,))
    for blocks, order in _order(samples).groups(0):
        rows = np.concatenate([np.arange(b.start, b.stop) + b.shard * SHARD_SAMPLES for b in blocks])[order]
        for start in range(0, len(rows), BATCH):
            records[rows[start : start + BATCH]]


def store_sequential(path: Path, samples: int) -> None:
    store = open_targets(path)
    seen = 0
    for shard in store.shards:
        for start in range(0, store.samples(shard), BLOCK_SAMPLES):
            # Held by no name: the memory of one block is free for the next, as with the memmaps.
            seen += len(store.read(shard, 0, start, min(start + BLOCK_SAMPLES, store.samples(shard))).keys)
    if seen != samples:
        raise RuntimeError(f"{path}: {seen} samples read, expected {samples}")


def store_shuffled(path: Path, samples: int) -> None:
    store = open_targets(path)
    for blocks, order in _order(samples).groups(0):
        runs = [store.read(store.shards[b.shard], b.view, b.start, b.stop) for b in blocks]
        ends = np.cumsum([len(run.keys) for run in runs])
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            code = np.empty((len(rows), 1 + GRID**2, WIDTH), np.int8)
            for position, row in enumerate(rows):
                part = int(np.searchsorted(ends, row, side="right"))
                run = runs[part]
                code[position] = run.code_NST[row - ends[part]]


def _rates(readers: dict[str, Callable[[], None]], samples: int, passes: int) -> dict[str, float]:
    """Best of several passes; all readers take turns, so that what else the machine does meets them alike."""
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(passes + 1):
        for name, read in readers.items():
            began = time.perf_counter()
            read()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: samples / seconds for name, seconds in best.items()}


def _read_blocks(path: Path, samples: int) -> None:
    store = open_targets(path)
    for blocks, _ in _order(samples).groups(0):
        for block in blocks:
            store.read(store.shards[block.shard], block.view, block.start, block.stop)


def _read_files(path: Path, samples: int) -> None:
    del samples
    for file in sorted(path.glob("shards/**/*")):
        if file.is_file():
            file.read_bytes()


def _load(path: Path, samples: int) -> None:
    plan = BatchPlan(order=_order(samples), batch_size=BATCH)
    with Loader(open_targets(path), plan, threads=2, with_targets=True) as loader:
        for _ in loader.batches(0):
            pass


def _rows_by_zarr(self: ZarrShard, name: str, start: int, stop: int, view: int) -> np.ndarray[Any, Any]:
    arrays: dict[str, Any] = vars(self).setdefault("by_zarr", {})
    if name not in arrays:
        path = StorePath(LocalStore(self._location.local, read_only=True), name)
        arrays[name] = zarr.Array.from_dict(path, dict(self._arrays[name].metadata))
    return np.asarray(arrays[name][view : view + 1, start:stop][0])


def compare_loader(folders: dict[str, Path], samples: int, passes: int) -> None:
    """Print the reader, zarr alone and plain files; medians, all of them taking turns."""
    use_fast_pipeline()
    own = ZarrShard._rows
    readers = {"own": own, "zarr alone, unchecked": _rows_by_zarr, "files read whole": None}
    print("| codec | read by | read, samples/s | CPU, µs a sample | loader, samples/s | CPU, µs a sample |")
    print("|---|---|---|---|---|---|")
    for codec, folder in folders.items():
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(passes + 1):
            for name, rows in readers.items():
                ZarrShard._rows = rows or own  # type: ignore[method-assign]
                for column, work in enumerate([_read_blocks, _load] if rows else [_read_files]):
                    wall, cpu = time.perf_counter(), time.process_time()
                    work(folder, samples)
                    spent = time.perf_counter() - wall, time.process_time() - cpu
                    found.setdefault((name, column), []).append(spent)
        ZarrShard._rows = own  # type: ignore[method-assign]
        for name in readers:
            row = [codec, name]
            for column in (0, 1):
                # The first pass warms up.
                pairs = found.get((name, column), [])[1:]
                if pairs:
                    wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
                row += [f"{samples / wall:,.0f}", f"{1e6 * cpu / samples:,.0f}"] if pairs else ["", ""]
            print(f"| {' | '.join(row)} |")


def main() -> None:
    """Write what is not there, measure, print tables and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("files", "loader"), default=("files", "loader"))
    arguments = parser.parse_args()
    keep_freed_memory()
    work, samples = arguments.work, arguments.samples
    make(work, samples)
    flat = work / f"records-{samples}.bin"
    folders = {name: work / f"{name.replace(', ', '-')}-{samples}" for name in STORES}
    _read_anew(path for path in sorted(work.rglob("*")) if path.is_file())
    if "loader" in arguments.only:
        compare_loader(
            {codec: work / f"{name.replace(', ', '-')}-{samples}" for codec, name in LOADED.items()},
            samples,
            arguments.passes,
        )
    if "files" not in arguments.only:
        return
    results = {}
    for kind, memmap, store in (
        ("sequential", memmap_sequential, store_sequential),
        ("shuffled", memmap_shuffled, store_shuffled),
    ):
        readers: dict[str, Callable[[], None]] = {
            OWN: lambda: memmap_own(folders["zarr, zstd_level=0"]),
            FLAT: lambda memmap=memmap: memmap(flat, samples),  # type: ignore[misc]
            CHECKED: lambda: memmap_checked(flat, samples),
        }
        for name, folder in folders.items():
            readers[name] = lambda store=store, folder=folder: store(folder, samples)  # type: ignore[misc]
        results[kind] = _rates(readers, samples, arguments.passes)
    sizes = {name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for name, folder in folders.items()}
    sizes |= dict.fromkeys((FLAT, CHECKED), flat.stat().st_size)
    sizes[OWN] = sum(path.stat().st_size for path in _large_files(folders["zarr, zstd_level=0"]))
    print(
        "| | bytes a sample | sequential, samples/s | ÷ own files | ÷ flat file | shuffled, samples/s | ÷ flat file |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in (OWN, FLAT, CHECKED, *STORES):
        row = [f"{name}", f"{sizes[name] / samples:,.0f}"]
        ordered, shuffled = results["sequential"], results["shuffled"]
        row += [f"{ordered[name]:,.0f}", f"{ordered[name] / ordered[OWN]:.2f}", f"{ordered[name] / ordered[FLAT]:.2f}"]
        row += [f"{shuffled[name]:,.0f}", f"{shuffled[name] / shuffled[FLAT]:.2f}"]
        print(f"| {' | '.join(row)} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
