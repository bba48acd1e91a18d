"""Settings: every mistake is named, and --set means what it says."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import yaml

from milan_pipe.config.params import Params, load_params
from milan_pipe.errors import MissingError, SettingError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_defaults_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(Params().model_dump(mode="json")))
    assert load_params(file) == Params() == load_params()


@pytest.mark.parametrize("text", ["", "# nothing\n", "pretrain: {}\n"])
def test_an_empty_file_means_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    assert load_params(tmp_path / "empty.yaml") == Params()


def test_the_file_of_this_folder_is_taken_when_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("pretrain: {epochs: 7}\n")
    (tmp_path / "other.yaml").write_text("knn: {}\n")
    assert load_params().pretrain.epochs == 7
    assert load_params(overrides=["pretrain.epochs=8"]).pretrain.epochs == 8
    assert load_params("other.yaml").pretrain.epochs == Params().pretrain.epochs


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["pretrain.epochs=3"], "pretrain.epochs", 3),
        (["pretrain.epochs=3", "pretrain.epochs=4", "pretrain.seed=1"], "pretrain.epochs", 4),
        (["pretrain.lr=1e-3"], "pretrain.lr", 1e-3),
        (["pretrain.betas=[0.8, 0.9]"], "pretrain.betas", (0.8, 0.9)),
        (["student.patch_size=null"], "student.patch_size", None),
        (["masking=random"], "masking.kind", "random"),
        (["masking=random", "masking.ratio=0.6"], "masking.kind", "random"),
        (["masking=random", "masking.ratio=0.6"], "masking.ratio", 0.6),
        (["masking.ratio=0.6", "masking=random"], "masking.ratio", 0.6),
        (["masking={kind: random, ratio: 0.5}"], "masking.ratio", 0.5),
        (["decoder=plain"], "decoder.kind", "plain"),
        (["target=pixels"], "target", "pixels"),
        (["codec=float16"], "codec.name", "float16"),
        (["teacher=ViT-B-16", "teacher.pretrained=a=b"], "teacher.pretrained", "a=b"),
    ],
    ids=str,
)
def test_set(overrides: list[str], path: str, expected: object) -> None:
    value: object = load_params(None, overrides)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected


def test_a_word_keeps_what_the_file_says_of_the_section(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("decoder: {width: 512, depth: 8, heads: 16}\nmasking: random\n")
    params = load_params(None, ["decoder=plain", "masking.ratio=0.6"])
    assert (params.decoder.kind, params.decoder.width, params.decoder.depth) == ("plain", 512, 8)
    assert (params.masking.kind, params.masking.ratio) == ("random", 0.6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrian.epochs=3", r"'pretrian'.*did you mean 'pretrain'"),
        ("pretrain.epoch=3", r"'epoch'.*pretrain; did you mean 'epochs'"),
        ("pretrain.window=3", r"'window'.*pretrain: it is now 'shuffle_blocks'"),
        ("zzz=3", r"'zzz'.*known are .*pretrain"),
        ("pretrain.lr.x=3", r"'lr\.x'"),
        ("pretrain.epochs=0", r"pretrain\.epochs: .*greater than or equal to 1, found 0"),
        ("pretrain.epochs=many", r"pretrain\.epochs: .*found 'many'"),
        ("pretrain.epochs=1.5", r"pretrain\.epochs: .*found 1\.5"),
        ("pretrain.epochs=", r"pretrain\.epochs: .*found None"),
        ("pretrain.lr=.nan", r"pretrain\.lr"),
        ("masking=sematic", r"masking\.kind: .*'semantic' or 'random'.*'sematic'"),
        ("masking.ratio=1", r"masking\.ratio: .*less than 1"),
        ("target=hogs", r"target: .*'hogs'"),
        ("views.scale=[0.5, 0.1]", r"views.*least <= greatest"),
        ("pretrain=5", r"section 'pretrain' holds 5"),
        ("pretrain=fast", r"section 'pretrain' holds 'fast'"),
        ("pretrain={1: 2}", r"unknown key '1'"),
        ("pretrain.epochs", r"expected section\.key=value"),
        ("=3", r"expected section\.key=value"),
        ("pretrain.epochs=[1", r"not valid YAML"),
    ],
)
def test_a_mistake_in_set_is_named(override: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        load_params(None, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pretrain: [1", r"p\.yaml cannot be read"),
        (b"\xff\xfe\x00", r"p\.yaml cannot be read"),
        (b"- 1\n- 2\n", r"p\.yaml holds a list"),
        (b"just a word", r"p\.yaml holds a str"),
        (b"pretrain:\n", r"section 'pretrain' holds None"),
        (b"a: 1\n1: 2\n", r"unknown key"),
        (b"pretrain: {epoch: 1}", r"p\.yaml, pretrain; did you mean 'epochs'"),
        (b"x: !!python/object/apply:os.getcwd []", r"p\.yaml cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(SettingError, match=message) as caught:
        load_params(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_a_shells_pipe_is_read(tmp_path: Path) -> None:
    """`--params <(...)` of a shell names one."""
    os.mkfifo(tmp_path / "pipe.yaml")
    writer = threading.Thread(target=(tmp_path / "pipe.yaml").write_text, args=("masking: {seed: 5}",))
    writer.start()
    assert load_params(tmp_path / "pipe.yaml").masking.seed == 5
    writer.join()


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no\.yaml is not there"):
        load_params("no.yaml")
    with pytest.raises(SettingError, match="cannot be read"):
        load_params(tmp_path)
