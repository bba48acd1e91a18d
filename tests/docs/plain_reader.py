"""Read a target store from its description alone: standard library, numpy and zstd, no zarr and no webdataset.

Everything is checked before it is used. A shard's files are read once, compared with the shard's record, and decoded
from those same bytes, so nothing that the record does not name can reach a sample. Whatever does not verify is a
ValueError that names the file.
"""

import base64
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd  # type: ignore[import-untyped]
from numpy.typing import NDArray

Json = dict[str, Any]
Array = NDArray[Any]
Floats = NDArray[np.float32]
Shape = tuple[int, ...]
Files = dict[str, bytes]

EMPTY = 2**64 - 1
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, RuntimeError, StopIteration, tarfile.TarError)


@dataclass(frozen=True)
class Sample:
    """One view of one image, with its targets decoded."""

    shard: str
    view: int
    key: str
    label: int
    crop: tuple[int, int, int, int]
    flip: bool
    jpeg: bytes
    attention: Floats
    features: Floats


@dataclass(frozen=True)
class Store:
    """A verified store; the samples are in order of shard, view and image."""

    header: Json
    samples: list[Sample]


# Digests


def digest(data: bytes) -> str:
    """SHA-256 as the store writes it."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Read a file; one that is missing is as much a failed check as one that is damaged."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def parse_json(data: bytes, name: object) -> Json:
    """Parse a JSON object; `name` is there for the message only."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name}: not a JSON object")
    return values


def check_digest(values: Json, name: object) -> Json:
    """Compare the digest with the other values, in the one spelling of JSON over which it was taken."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if values.get("sha256") != digest(text.encode()):
        raise ValueError(f"{name}: its digest (sha256) does not match its values")
    return values


def read_header(folder: Path) -> tuple[Json, str]:
    """Find the header by the file that each format keeps it in; with it goes that file's digest, for the summary."""
    path, form = folder / "header.json", "webdataset"
    if not path.exists():
        path, form = folder / "shards" / "zarr.json", "zarr"
    data = read_bytes(path)
    values = parse_json(data, path)
    header = check_digest((values.get("attributes", {}) if form == "zarr" else values).get("milan_pipe", {}), path)
    if (header.get("schema_version"), header.get("format")) != (3, form):
        raise ValueError(f"{path}: not schema version 3 of format {form}")
    return header, digest(data)


def read_records(folder: Path, header_digest: str) -> dict[str, Json]:
    """Read the records by the name of their shard; those in the folder must be those that the summary lists."""
    path = folder / "manifest.json"
    summary = check_digest(parse_json(read_bytes(path), path), path)
    for name in {p.stem for p in (folder / "manifest").glob("*.json")} - summary["shards"].keys():
        raise ValueError(f"{folder / 'manifest' / name}.json: is not in the summary")
    if summary["header_sha256"] != header_digest:
        raise ValueError(f"{path}: names another header than the one beside it")
    if summary["bad_samples_sha256"] != digest(read_bytes(folder / "bad_samples.jsonl")):
        raise ValueError(f"{folder / 'bad_samples.jsonl'}: is not the file that the summary names")
    records = {}
    for name, entry in sorted(summary["shards"].items()):
        record = folder / "manifest" / f"{name}.json"
        data = read_bytes(record)
        if digest(data) != entry["record_sha256"]:
            raise ValueError(f"{record}: is not the record that the summary names")
        records[name] = check_digest(parse_json(data, record), record)
    return records


def read_files(folder: Path, record: Json) -> Files:
    """Read every file of a shard's folder, refusing any that is not the one that its record describes."""
    files = {}
    for name, entry in record["files"].items():
        data = read_bytes(folder / name)
        if (len(data), digest(data)) != (entry["bytes"], entry["sha256"]):
            raise ValueError(f"{folder / name}: its size or SHA-256 is not the recorded one")
        files[name] = data
    return files


# Zarr v3


def crc32c_entry(value: int) -> int:
    """One entry of the table of the reflected Castagnoli polynomial."""
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


CRC32C = [crc32c_entry(value) for value in range(256)]


def crc32c(data: bytes) -> int:
    """Checksum of `data`, a byte at a time: slow, but with nothing to install."""
    table, value = CRC32C, 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def unpack(data: bytes, name: str) -> bytes:
    """Undo one codec from bytes to bytes."""
    if name == "zstd":
        return bytes(zstd.decompress(data))
    if name != "crc32c":
        raise ValueError(f"unknown codec {name}")
    if len(data) < 4 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("crc32c does not match")
    return data[:-4]


def decode_strings(data: bytes, shape: Shape) -> Array:
    """Undo vlen-utf8: a count, then each string after its length, all of them 32-bit and little-endian."""
    values, at = [], 4
    for _ in range(int.from_bytes(data[:4], "little")):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        values.append(data[at + 4 : end].decode())
        at = end
    if at != len(data):
        raise ValueError("strings do not fill their chunk")
    return np.array(values, object).reshape(shape)


def decode_shard(data: bytes, settings: Json, shape: Shape, extent: Shape, dtype: np.dtype[Any]) -> Array:
    """Undo sharding_indexed. An inner chunk with an empty entry stands for zeros; the index itself is verified."""
    inner = tuple(settings["chunk_shape"])
    counts = tuple(outer // size for outer, size in zip(shape, inner, strict=True))
    checks = sum(codec["name"] == "crc32c" for codec in settings["index_codecs"])
    size = 16 * math.prod(counts) + 4 * checks
    packed = data[:size] if settings.get("index_location", "end") == "start" else data[-size:]
    index = decode_chunk(packed, settings["index_codecs"], (*counts, 2), (*counts, 2), np.dtype(np.uint64))
    values = np.zeros(shape, dtype)
    for at in np.ndindex(counts):
        low, room = place(at, inner, extent)
        start, length = (int(value) for value in index[at])
        if start == length == EMPTY:
            continue
        if start + length > len(data):
            raise ValueError(f"inner chunk {at} lies beyond the file")
        box = tuple(slice(first, first + step) for first, step in zip(low, inner, strict=True))
        values[box] = decode_chunk(data[start : start + length], settings["codecs"], inner, room, dtype)
    return values


def place(at: Shape, chunk: Shape, extent: Shape) -> tuple[Shape, Shape]:
    """Where a chunk of a regular grid begins, and how much of it lies inside of `extent`."""
    low = tuple(i * size for i, size in zip(at, chunk, strict=True))
    return low, tuple(max(0, min(s, e - first)) for s, e, first in zip(chunk, extent, low, strict=True))


def decode_chunk(data: bytes, codecs: list[Json], shape: Shape, extent: Shape, dtype: np.dtype[Any]) -> Array:
    """Undo a chain of codecs; `extent` is the part of the chunk inside of the array, beyond which may be nothing."""
    kinds = ("bytes", "vlen-utf8", "sharding_indexed")
    middle = next(i for i, codec in enumerate(codecs) if codec["name"] in kinds)
    for codec in reversed(codecs[middle + 1 :]):
        data = unpack(data, codec["name"])
    orders = []
    for codec in codecs[:middle]:
        if codec["name"] != "transpose":
            raise ValueError(f"unknown codec {codec['name']}")
        order = codec["configuration"]["order"]
        shape, extent = tuple(shape[axis] for axis in order), tuple(extent[axis] for axis in order)
        orders.append(order)
    name, settings = codecs[middle]["name"], codecs[middle].get("configuration", {})
    if name == "sharding_indexed":
        values = decode_shard(data, settings, shape, extent, dtype)
    elif name == "vlen-utf8":
        values = decode_strings(data, shape)
    else:
        stored = dtype.newbyteorder(">" if settings.get("endian") == "big" else "<")
        values = np.frombuffer(data, stored).astype(dtype).reshape(shape)
    for order in reversed(orders):
        values = values.transpose(np.argsort(order))
    return values


def chunk_name(encoding: Json, at: Shape) -> str:
    """Name of a chunk's file below its array."""
    default = encoding["name"] == "default"
    separator: str = encoding.get("configuration", {}).get("separator", "/" if default else ".")
    return separator.join(["c"] * default + [str(i) for i in at])


def read_array(files: Files, array: str, folder: Path) -> Array:
    """Read a whole array by its metadata. A file that the record does not name stands for zeros."""
    name = f"{array}/zarr.json"
    try:
        meta = parse_json(files[name], folder / name)
        if (meta["zarr_format"], meta["node_type"], meta["chunk_grid"]["name"]) != (3, "array", "regular"):
            raise ValueError("not a zarr v3 array with a regular grid")
        shape, chunk = tuple(meta["shape"]), tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
        dtype = np.dtype(object if meta["data_type"] == "string" else meta["data_type"])
        values = np.zeros(shape, dtype)
        for at in np.ndindex(tuple(-(-total // size) for total, size in zip(shape, chunk, strict=True))):
            name = f"{array}/{chunk_name(meta['chunk_key_encoding'], at)}"
            if name not in files:
                continue
            low, room = place(at, chunk, shape)
            part = decode_chunk(files[name], meta["codecs"], chunk, room, dtype)
            box = tuple(slice(first, first + size) for first, size in zip(low, room, strict=True))
            values[box] = part[tuple(slice(size) for size in room)]
    except UNREADABLE as error:
        raise ValueError(f"{folder / name}: {type(error).__name__}: {error}") from error
    return values


def zarr_samples(header: Json, files: Files, folder: Path) -> Iterator[Sample]:
    """Samples of a shard in format zarr."""
    decode = Decoder(header["codec"])
    names = ["features", "attention", "crop", "flip", "view_bytes", "view_offset", "view_length", "key", "label"]
    arrays = {name: read_array(files, name, folder) for name in names + ["scale"] * decode.scaled}
    for view, i in np.ndindex(arrays["flip"].shape):
        start, length = int(arrays["view_offset"][view, i]), int(arrays["view_length"][view, i])
        if not 0 <= start <= start + length <= len(arrays["view_bytes"]):
            raise ValueError(f"{folder / 'view_offset'}: view {view} of image {i} is outside of view_bytes")
        top, left, height, width = arrays["crop"][view, i].tolist()
        scale = arrays["scale"][view, i] if decode.scaled else None
        yield Sample(
            shard=folder.name,
            view=view,
            key=str(arrays["key"][i]),
            label=int(arrays["label"][i]),
            crop=(top, left, height, width),
            flip=bool(arrays["flip"][view, i]),
            jpeg=arrays["view_bytes"][start : start + length].tobytes(),
            attention=arrays["attention"][view, i].astype(np.float32),
            features=decode(arrays["features"][view, i], scale),
        )


# Webdataset


def tar_groups(data: bytes) -> Iterator[tuple[str, Files]]:
    """Members of a tar by sample, in the order of the tar; a key ends at the first dot of its last part."""
    groups: dict[str, Files] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = folder + slash + stem
            content = tar.extractfile(member)
            if content is None or extension in groups.setdefault(key, {}):
                raise ValueError(f"unexpected member {member.name}")
            groups[key][extension] = content.read()
    yield from groups.items()


def npy(data: bytes) -> Array:
    """An array of numpy's file format, which holds no Python objects."""
    values: Array = np.load(io.BytesIO(data), allow_pickle=False)
    return values


def tar_codes(codec: Json, members: Files, tokens: int) -> Array:
    """Codes (S, T) of a sample: unpacked, bytes put back together, turned."""
    if "features.npy" in members:
        return npy(members["features.npy"])
    data = members["features"]
    if codec["zstd_level"]:
        data = bytes(zstd.decompress(data))
    if codec["name"] == "float16":
        pairs = np.frombuffer(data, np.uint8).reshape(2, -1)
        return np.ascontiguousarray(pairs.T).view("<f2").reshape(tokens, -1)
    codes = np.frombuffer(data, np.int8)
    return codes.reshape(-1, tokens).T if codec["name"] == "klt" else codes.reshape(tokens, -1)


def tar_samples(header: Json, tar: bytes, view: int, shard: str) -> Iterator[Sample]:
    """Samples of one view of a shard in format webdataset."""
    codec, decode = header["codec"], Decoder(header["codec"])
    for key, members in tar_groups(tar):
        about = parse_json(members["json"], f"{key}.json")
        if (about["key"], about["view"]) != (key, view):
            raise ValueError(f"{key}.json is of view {about['view']} of {about['key']}")
        attention = npy(members["attention.npy"]).astype(np.float32)
        top, left, height, width = about["crop"]
        yield Sample(
            shard=shard,
            view=view,
            key=key,
            label=about["label"],
            crop=(top, left, height, width),
            flip=about["flip"],
            jpeg=members["jpg"],
            attention=attention,
            features=decode(
                tar_codes(codec, members, len(attention) + 1),
                npy(members["scale.npy"]) if decode.scaled else None,
            ),
        )


# From codes to features


class Decoder:
    """Turns the codes of one view into features; holds the basis, which is large, in float32."""

    def __init__(self, codec: Json) -> None:
        """Unpack what the header says of the codec."""
        self.name = codec["name"]
        self.scaled = self.name != "float16"
        if self.name not in ("float16", "int8", "klt"):
            raise ValueError(f"unknown codec {self.name}")
        if self.name == "klt":
            self.step = np.float32(codec["step"])
            self.mean = np.frombuffer(base64.b64decode(codec["mean"]), "<f4").astype(np.float32)
            basis = np.frombuffer(base64.b64decode(codec["basis"]), "<f2").astype(np.float32)
            self.basis = basis.reshape(len(self.mean), len(self.mean))

    def __call__(self, codes: Array, scale: Array | None) -> Floats:
        """Features (S, T) of codes (S, T) and, but for float16, scale (S)."""
        values: Array = codes.astype(np.float32, order="C")
        if self.name == "klt":
            values = (self.step * values) @ self.basis + self.mean
        return values if scale is None else values * scale.astype(np.float32)[:, None]


def shard_samples(header: Json, folder: Path, record: Json) -> Iterator[Sample]:
    """Samples of a shard of either format, in order of view and image."""
    files = read_files(folder, record)
    if header["format"] == "zarr":
        yield from zarr_samples(header, files, folder)
        return
    for view in range(header["views"]["count"]):
        name = f"view-{view}.tar"
        try:
            yield from tar_samples(header, files[name], view, folder.name)
        except UNREADABLE as error:
            raise ValueError(f"{folder / name}: {type(error).__name__}: {error}") from error


def views_digest(samples: list[Sample], views: int) -> str:
    """SHA-256 over what a shard shows, of its samples in order of view and image."""
    whole, count = hashlib.sha256(), len(samples) // views
    for start in range(0, count, 128):
        rows = [samples[view * count + start : view * count + min(start + 128, count)] for view in range(views)]
        keys = [sample.key.encode("utf-8", "surrogatepass") for sample in rows[0]]
        whole.update(len(keys).to_bytes(8, "little"))
        for key in keys:
            whole.update(len(key).to_bytes(8, "little") + key)
        block = [sample for row in rows for sample in row]
        whole.update(np.array([sample.crop for sample in block], "<i4").tobytes())
        whole.update(bytes(sample.flip for sample in block))
        for sample in block:
            whole.update(len(sample.jpeg).to_bytes(8, "little") + sample.jpeg)
    return whole.hexdigest()


def read_store(folder: str | Path) -> Store:
    """Read and verify a whole store into memory."""
    root = Path(folder)
    header, header_digest = read_header(root)
    found = []
    for name, record in read_records(root, header_digest).items():
        samples = list(shard_samples(header, root / "shards" / name, record))
        if "views_sha256" in record and record["views_sha256"] != views_digest(samples, header["views"]["count"]):
            raise ValueError(f"{root / 'manifest' / name}.json: views_sha256 is not that of the views")
        found += samples
    return Store(header, found)
