"""What the errors of `embed` say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.images import TINY, labelled_shard, write_tar
from support.messages import Case, require_message
from support.timm_models import timm_folder

from milan_pipe import api
from milan_pipe.config.params import load_params
from milan_pipe.errors import DataError, MismatchError, SettingError, StoreError


def embed(*settings: str, checkpoint: str = "random", out: str = "out", **options: Any) -> object:
    params = load_params(None, ["embed.threads=1", *settings]).model_copy(update={"student": TINY})
    if not Path("images").exists():
        labelled_shard(Path("images/a.tar"), range(3))
    return api.embed(checkpoint, "images", out, params, **options)


def changed() -> object:
    embed()
    labelled_shard(Path("images/a.tar"), range(9))
    return embed()


def damaged(file: str) -> object:
    embed()
    Path(file).write_text("{")
    return embed()


def too_large() -> object:
    weights = timm_folder(Path("m")) / "model.safetensors"
    save_file({name: 1e6 * tensor for name, tensor in load_file(weights).items()}, weights)
    return embed("embed.dtype=float16", checkpoint="m")


def beside_a_file() -> object:
    Path("out").write_text("")
    return embed()


def nothing_readable() -> object:
    write_tar(Path("images/a.tar"), {"x.png": b"no image"})
    return embed("embed.max_bad_fraction=1")


CASES: dict[str, Case] = {
    "other settings": (
        lambda: (embed(), embed("embed.pool=mean", "embed.dtype=float16")),
        MismatchError,
        "out holds other embeddings: dtype: there 'float32', asked for 'float16'; pool: there 'cls', asked for 'mean'. "
        "Use the same model, images and settings to go on, or name another folder",
    ),
    "another model": (
        lambda: (embed(), embed("pretrain.seed=1")),
        MismatchError,
        "out holds other embeddings of 'random': identity: there ..., asked for .... Use the same ...",
    ),
    "patches as well": (
        lambda: (embed(), embed(patches=True)),
        MismatchError,
        "out holds other embeddings: patches: there none, asked for [4, 4]. Use the same ...",
    ),
    "images that have changed": (
        changed,
        MismatchError,
        "a.tar has changed since it was embedded: ... bytes then, ... bytes now; remove out/records/000000.json to "
        "embed it again",
    ),
    "damaged record of all": (
        lambda: damaged("out/embeddings.json"),
        DataError,
        "out/embeddings.json is damaged (Expecting ...); remove the folder, or name another one",
    ),
    "damaged record of a shard": (
        lambda: damaged("out/records/000000.json"),
        DataError,
        "out/records/000000.json is damaged; remove it, and its shard is embedded again",
    ),
    "name of a file": (
        lambda: embed(out="all.parquet"),
        SettingError,
        "all.parquet has the name of a file, and a folder of files is written: leave '.parquet' out",
    ),
    "no share": (
        lambda: embed(shards="8/8"),
        SettingError,
        "--shards '8/8' is not understood, expected i/n with i from 0 to n - 1, as 0/8",
    ),
    "no class token": (
        lambda: embed(checkpoint=f"timm:local-dir:{timm_folder(Path('m'), 'map')}"),
        SettingError,
        "model 'timm:local-dir:m' has no class token, which embed.pool=cls takes; set embed.pool=mean",
    ),
    "nothing readable": (
        nothing_readable,
        DataError,
        "1 of 1 shards failed: 000000: a.tar has no readable image (1 skipped; the first: x: ...). 0 are whole; repair "
        "these and run the same command again",
    ),
    "features too large": (
        too_large,
        SettingError,
        "features are too large for float16; set embed.dtype=float32",
    ),
    "a file in its place": (beside_a_file, StoreError, "out/embeddings.json cannot be written: ..."),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_messages(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(case)


def test_the_record_holds_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embed("embed.pool=mean", checkpoint=f"timm:local-dir:{timm_folder(tmp_path / 'deep' / 'm', 'map')}")
    assert json.loads(Path("out/embeddings.json").read_text())["subject"] == "timm:local-dir:m"
    assert str(tmp_path) not in Path("out/embeddings.json").read_text()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"source": "a", "state": "b", "images": 3, "bad": 5}', "[1]"])
@pytest.mark.parametrize("file", ["embeddings.json", "records/000000.json"])
def test_a_record_of_another_form_is_one_error(
    file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embed()
    Path("out", file).write_text(text)
    with pytest.raises((DataError, MismatchError), match=r"is damaged|holds other embeddings"):
        embed()


def test_a_record_of_more_images_than_there_can_be_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embed()
    record = json.loads(Path("out/records/000000.json").read_text())
    Path("out/records/000000.json").write_text(json.dumps(record | {"images": 10**400}))
    with pytest.raises(DataError, match="is damaged"):
        embed()
