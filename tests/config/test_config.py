"""Settings: every mistake is named, and --set means what it says."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path

import pytest
import yaml

from milan_pipe.config.params import Params, load_params, load_yaml
from milan_pipe.errors import SettingError


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


@pytest.mark.timeout(60)
def test_a_shells_pipe_is_read(tmp_path: Path) -> None:
    """`--params <(...)` of a shell names one."""
    os.mkfifo(tmp_path / "pipe.yaml")
    writer = threading.Thread(target=(tmp_path / "pipe.yaml").write_text, args=("masking: {seed: 5}",))
    writer.start()
    assert load_params(tmp_path / "pipe.yaml").masking.seed == 5
    writer.join()


BOMB = (
    "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
    "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nviews: [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]\n"
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "views: &v [*v]",
        f"views: {{seed: {'9' * 5000}}}",
        f"views: {'[' * 600}",
        "views: {seed: !!float x}",
        "views: {seed: !!bool maybe}",
        "views: {seed: 2001-99-99}",
        "views: {seed: !!timestamp x}",
        f"views: {{seed: {'1:' * 200}1.5}}",
        'teacher: {model: "\\ud800"}',
    ],
    ids=[
        *("aliases of aliases", "a list in itself", "digits", "depth", "float", "bool", "date", "no date", "sixties"),
        "half a pair",
    ],
)
def test_yaml_that_is_no_settings_is_one_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(SettingError, match=r"params\.yaml cannot be read"):
        load_params(file)


def test_aliases_are_counted_before_they_are_held(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(f"views: &v [{'*v, ' * 200}]")
    tracemalloc.start()
    with pytest.raises(SettingError, match="more than 100,000 values"):
        load_params(file)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_what_is_merged_may_be_overridden() -> None:
    """`c` is built before `inner`, which it merges."""
    text = "a: &base {key: 1}\nb:\n  inner: &one {<<: *base, key: 2}\nc: {<<: *one}\n"
    assert load_yaml(text) == {"a": {"key": 1}, "b": {"inner": {"key": 2}}, "c": {"key": 2}}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("merge", ["- {<<: *a}", "- {<<: [*a, *a]}"])
def test_what_is_merged_is_counted_as_it_is(merge: str) -> None:
    keys = ", ".join(f"k{number}: 1" for number in range(20_000))
    with pytest.raises(ValueError, match="more than 100,000 values"):
        load_yaml(f"a: &a {{{keys}}}\nb:\n" + f"{merge}\n" * 20_000)


@pytest.mark.parametrize("value", ["2001-99-99", "!!bool maybe", "!!timestamp x", "9" * 5000, "[" * 600])
def test_a_value_of_set_that_is_none_is_one_error(value: str) -> None:
    with pytest.raises(SettingError, match="not valid YAML"):
        load_params(None, [f"views.seed={value}"])
