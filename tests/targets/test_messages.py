"""What the errors of stores and codecs say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.messages import Case, require_message
from support.targets import header, random_blocks, source, write_store

from milan_pipe.config.targets import CodecSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, ShapeError, StoreError
from milan_pipe.targets.codec import Float16Codec, Int8Codec, build_codec, codec_of
from milan_pipe.targets.convert import convert_targets
from milan_pipe.targets.klt import fit_klt
from milan_pipe.targets.schema import CodecInfo
from milan_pipe.targets.store import StoreShardWriter, TargetStoreWriter, open_targets


def file(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{}")


def features() -> torch.Tensor:
    return torch.randn(16, 17, 48, generator=torch.Generator().manual_seed(0))


def shard() -> StoreShardWriter:
    found = TargetStoreWriter("t", header()).open_shard("000000")
    found.append(random_blocks(header(), 5)[0])
    return found


def other_store() -> None:
    write_store("t", header(), [5])
    TargetStoreWriter("t", header(model="other", views=3))


def other_format() -> None:
    write_store("t", header(), [5])
    TargetStoreWriter("t", header(format="webdataset"))


def other_version() -> None:
    write_store("t", header(), [5])
    path = Path("t/shards/zarr.json")
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 99'))
    open_targets("t")


def half_a_source() -> None:
    write_store("t", header(shards=2), [5])
    convert_targets("t", "o", format="webdataset")


def convert(destination: str) -> None:
    write_store("t", header(), [5])
    convert_targets("t", destination, format="webdataset")


def lost_file() -> None:
    write_store("t", header(), [130])
    store = open_targets("t")
    Path("t/shards/000000/features/c/1/0/0/0").unlink()
    store.read("000000", 1, 0, 128)


def read(shard: str, view: int, start: int, stop: int) -> None:
    write_store("t", header(), [5])
    open_targets("t").read(shard, view, start, stop)


OTHER = "t holds targets of another configuration"
USE = "Use the same settings, or another folder for the new ones"
KLT = "the store's codec klt is damaged: quality, step, mean and basis must all be present"
CASES: dict[str, Case] = {
    "no store": (
        lambda: open_targets("t"),
        MissingError,
        "t is not there; write targets with `milan-pipe extract-targets IMAGES t`",
    ),
    "empty folder": (
        lambda: (Path("t").mkdir(), open_targets("t")),
        DataError,
        "t is not a target store: it has neither shards/zarr.json nor header.json; write targets with "
        "`milan-pipe extract-targets IMAGES t`",
    ),
    "other header": (
        lambda: (file("t/shards/zarr.json"), open_targets("t")),
        DataError,
        "t/shards/zarr.json is not the header of a target store; extract into another folder",
    ),
    "other folder": (
        lambda: (file("t/thesis.txt"), TargetStoreWriter("t", header())),
        DataError,
        "t is not a target store and not empty (it holds thesis.txt); name another folder",
    ),
    "no shard": (
        lambda: (TargetStoreWriter("t", header()), open_targets("t")),
        DataError,
        "t has no committed shard; run extract-targets again to finish it",
    ),
    "other configuration": (
        other_store,
        MismatchError,
        f"{OTHER}: teacher.model: store has 'demo', this run has 'other'; views.count: store has 2, this run has 3. "
        f"{USE}",
    ),
    "other format": (
        other_format,
        MismatchError,
        f"{OTHER}: format: store has 'zarr', this run has 'webdataset'. {USE}",
    ),
    "other version": (
        other_version,
        MismatchError,
        "t has schema version 99, this version of milan-pipe reads 2 and 3; extract the targets again, or use the "
        "version that wrote them (0.test)",
    ),
    "lost file": (
        lost_file,
        DataError,
        "t, shard 000000: features/c/1/0/0/0 is missing. Write it again with "
        "`milan-pipe extract-targets IMAGES t --redo 000000`",
    ),
    "no such view": (
        lambda: read("000000", 2, 0, 1),
        IndexError,
        "t: samples 0:1 of view 2 of shard '000000' were asked for; it has 5 samples, 2 views",
    ),
    "other count": (
        lambda: shard().commit(source(4)),
        StoreError,
        "t/000000: 5 samples written, 4 announced",
    ),
    "block after a short one": (
        lambda: shard().append(random_blocks(header(), 5)[0]),
        StoreError,
        "t/000000: a block of 5 samples cannot follow 5 samples",
    ),
    "convert an unfinished store": (
        half_a_source,
        DataError,
        "t has 1 of 2 shards; finish its extraction first with `milan-pipe extract-targets IMAGES t`",
    ),
    "convert into another folder": (
        lambda: (file("o/thesis.txt"), convert("o")),
        DataError,
        "o is not a target store and not empty (it holds thesis.txt); name another folder",
    ),
    "convert below a file": (
        lambda: (file("file"), convert("file/o")),
        StoreError,
        "file/o/shards/zarr.json cannot be read: Not a directory",
    ),
    "too large for float16": (
        lambda: Float16Codec().encode(torch.full((1, 1, 1), 70000.0)),
        DataError,
        "a feature of 70000 does not fit float16 (at most 65504); use codec int8",
    ),
    "unknown codec": (
        lambda: codec_of(CodecInfo(name="int3")),
        DataError,
        "the store's codec is 'int3', this version reads int8, float16 and klt; update milan-pipe",
    ),
    "no scale": (
        lambda: Int8Codec().decode(torch.zeros(1, 1, 1, dtype=torch.int8), None),
        ShapeError,
        "int8 codes need a scale per token, found none",
    ),
    "a scale too many": (
        lambda: Float16Codec().decode(torch.zeros(1, 1, 1), torch.ones(1, 1)),
        ShapeError,
        "float16 codes have no scale, found one",
    ),
    "klt without features": (
        lambda: build_codec(CodecSettings(name="klt")),
        DataError,
        "codec klt is fitted to features, found none; give some, or use codec int8 or float16",
    ),
    "klt of nothing but zeros": (
        lambda: fit_klt(torch.zeros(4, 5, 6), 0.99),
        DataError,
        "codec klt has no features but zeros to be fitted to; check the teacher, or use codec int8",
    ),
    "klt of another shape": (
        lambda: fit_klt(torch.ones(5, 6), 0.99),
        ShapeError,
        "codec klt is fitted to features (P, S, T), found shape (5, 6)",
    ),
    "klt of features that are not finite": (
        lambda: fit_klt(torch.full((4, 5, 6), torch.nan), 0.99),
        DataError,
        "the teacher gave features that are not finite; check its weights and precision",
    ),
    "klt of too long a feature": (
        lambda: fit_klt(features(), 0.99).encode(torch.full((1, 48), 1e30)),
        DataError,
        "a feature vector of length ... is too long for codec klt (at most about 65504); check the teacher, or use "
        "codec int8",
    ),
    "klt of a quality out of reach": (
        lambda: fit_klt(features(), 0.9999999),
        DataError,
        "codec klt reaches a mean cosine of 0.9999... on these features, asked for 0.9999999; lower codec.quality, "
        "or use codec int8 or float16",
    ),
    "klt of an impossible quality": (
        lambda: fit_klt(features(), 1.0),
        DataError,
        "codec klt reaches a mean cosine above 0 and below 1, asked for 1.0",
    ),
    "klt of another width": (
        lambda: fit_klt(features(), 0.99).encode(torch.ones(2, 3, 47)),
        ShapeError,
        "features of shape (2, 3, 47) do not fit codec klt, fitted to features 48 wide",
    ),
    "klt without a mean": (
        lambda: codec_of(fit_klt(features(), 0.99).info.model_copy(update={"mean": None})),
        DataError,
        f"{KLT}; restore the store's header, or extract again",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
