"""What the errors of settings say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.messages import Case, require_message

from milan_pipe.config.extraction import parse_share
from milan_pipe.config.params import load_params
from milan_pipe.errors import MissingError, SettingError


def setting(override: str, message: str) -> Case:
    """An override that is wrong."""
    return lambda: load_params(None, [override]), SettingError, message


def file(content: bytes, message: str) -> Case:
    """A params file that is wrong."""
    return lambda: (Path("p.yaml").write_bytes(content), load_params("p.yaml")), SettingError, message


def share(text: str) -> Case:
    """Shards that cannot be this process's."""
    message = f"--shards {text!r} is not understood, expected i/n with i from 0 to n - 1, as 0/8"
    return lambda: parse_share(text), SettingError, message


SECTIONS = "known are about, augment, clip, codec, ... target, teacher, teachers, views"
CASES: dict[str, Case] = {
    "section like another": setting(
        "pretrian.epochs=3", "unknown key 'pretrian' in the settings; did you mean 'pretrain'?"
    ),
    "key without its section": setting(
        "epochs=3",
        "unknown key 'epochs' in the settings; did you mean pretrain.epochs or finetune.epochs or lars_probe.epochs?",
    ),
    "section like no other": setting("zzz=3", f"unknown key 'zzz' in the settings; {SECTIONS}"),
    "key like another": setting(
        "pretrain.epoch=3", "unknown key 'epoch' in the settings, pretrain; did you mean 'epochs'?"
    ),
    "key of a key": setting("pretrain.lr.x=3", "unknown key 'lr.x' in the settings, pretrain; did you mean 'lr'?"),
    "key that is no text": setting(
        "pretrain={1: 2}", "unknown key '1' in the settings, pretrain; known are accumulate, batch_size, ..."
    ),
    "former name": setting(
        "pretrain.window=3", "unknown key 'window' in the settings, pretrain: it is now 'shuffle_blocks'"
    ),
    "too small": setting(
        "pretrain.epochs=0", "the settings, pretrain.epochs: should be greater than or equal to 1, found 0"
    ),
    "too large": setting("masking.ratio=1", "the settings, masking.ratio: should be less than 1, found 1"),
    "not a number": setting("pretrain.lr=.nan", "the settings, pretrain.lr: should be a finite number, found nan"),
    "word for a number": setting("pretrain.epochs=many", "the settings, pretrain.epochs: should be a valid integer..."),
    "fraction": setting(
        "pretrain.epochs=1.5",
        "the settings, pretrain.epochs: should be a valid integer, got a number with a fractional part, found 1.5",
    ),
    "no value": setting("pretrain.epochs=", "the settings, pretrain.epochs: should be a valid integer, found null"),
    "no such choice": setting(
        "masking=sematic", "the settings, masking.kind: should be 'semantic', 'random' or 'block', found 'sematic'"
    ),
    "no such target": setting("target=3", "the settings, target: should be a valid string, found 3"),
    "scale upside down": setting(
        "views.scale=[0.5, 0.1]",
        "the settings, views: scale is the least and the greatest share of the area, above 0 and at most 1, "
        "found (0.5, 0.1)",
    ),
    "ratio upside down": setting(
        "views.ratio=[2, 1]",
        "the settings, views: ratio is the least and the greatest width / height, above 0, found (2.0, 1.0)",
    ),
    "number for a section": setting("pretrain=5", "the settings: section 'pretrain' holds 5, expected keys and values"),
    "word for a section": setting(
        "pretrain=fast", "the settings: section 'pretrain' holds 'fast', expected keys and values"
    ),
    "no equals sign": setting(
        "pretrain.epochs", "--set 'pretrain.epochs' is not understood, expected section.key=value"
    ),
    "no name": setting("=3", "--set '=3' is not understood, expected section.key=value"),
    "no YAML": setting("pretrain.epochs=[1", "--set 'pretrain.epochs=[1': the value is not valid YAML"),
    "file that is no YAML": file(
        b"pretrain: [1", "params file p.yaml is not valid YAML: line 1: expected ',' or ']', but got 'stream end'"
    ),
    "key that stands twice": file(
        b"pretrain:\n  lr: 1\n  epochs: 2\n  lr: 2\n",
        "params file p.yaml is not valid YAML: line 4: key 'lr' stands twice",
    ),
    "section that stands twice": file(
        b"student: {}\nstudent: {}\n", "params file p.yaml is not valid YAML: line 2: key 'student' stands twice"
    ),
    "number for a list": setting("knn.neighbours=5", "the settings, knn.neighbours: should be a list, found 5"),
    "empty list": setting(
        "knn.neighbours=[]", "the settings, knn.neighbours: should have at least 1 item, not 0, found []"
    ),
    "short list": setting("views.ratio=[1]", "the settings, views.ratio.1: is missing, found [1]"),
    "neither word nor list": setting(
        "teachers.weights=x", "the settings, teachers.weights: should be 'equal' or 'balanced', found 'x'"
    ),
    "infinite": setting("pretrain.lr=.inf", "the settings, pretrain.lr: should be a finite number, found inf"),
    "endless": setting(
        f"pretrain.batch_size={2**63}",
        f"the settings, pretrain: batch_size should be between -{2**53} and {2**53}, found {2**63}",
    ),
    "endless to the other side": setting(
        f"masking.seed=-{2**63}",
        f"the settings, masking: seed should be between -{2**53} and {2**53}, found -{2**63}",
    ),
    "file that is no text": file(b"\xff\xfe\x00", "params file p.yaml cannot be read: 'utf-8' codec can't decode..."),
    "file of a list": file(b"- 1\n- 2\n", "params file p.yaml holds a list, expected sections with keys"),
    "file of a word": file(b"just a word", "params file p.yaml holds a str, expected sections with keys"),
    "file with an empty section": file(
        b"pretrain:\n", "p.yaml: section 'pretrain' holds null, expected keys and values"
    ),
    "file with a section that is no text": file(b"1: 2\n", f"unknown key '1' in p.yaml; {SECTIONS}"),
    "file with an unknown key": file(
        b"pretrain: {epoch: 1}", "unknown key 'epoch' in p.yaml, pretrain; did you mean 'epochs'?"
    ),
    "file with a wrong value": file(
        b"pretrain: {epochs: 0}", "p.yaml, pretrain.epochs: should be greater than or equal to 1, found 0"
    ),
    "file that would run code": file(
        b"x: !!python/object/apply:os.getcwd []",
        "params file p.yaml is not valid YAML: line 1: could not determine a constructor for the tag ...",
    ),
    "no file": (lambda: load_params("no.yaml"), MissingError, "params file no.yaml is not there"),
    "no file in a folder": (lambda: load_params("other/scenes"), MissingError, "params file other/scenes is not there"),
    "folder": (
        lambda: load_params(Path.cwd()),
        SettingError,
        "params file ... is a folder, expected a file or the name of a recipe",
    ),
    "like a recipe": (
        lambda: load_params("mea"),
        MissingError,
        "params file mea is not there, and no recipe has that name; did you mean 'mae'?",
    ),
    "no recipe": (
        lambda: load_params("imagenet"),
        MissingError,
        "params file imagenet is not there, and no recipe has that name; recipes are demo, ..., unmasked-teacher",
    ),
    "share beyond the last": share("8/8"),
    "share of nothing": share("0/0"),
    "share that is no fraction": share("1"),
    "share below the first": share("-1/8"),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
