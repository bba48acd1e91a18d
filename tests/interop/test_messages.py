"""What the errors of students from and to other tools say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import change_record
from support.messages import Case, require_message

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.evaluation.classifier import build_vit
from milan_pipe.interop.published_file import import_published
from milan_pipe.interop.push import push
from milan_pipe.interop.timm_layout import export_student, load_student
from milan_pipe.pretraining.start import start_from
from milan_pipe.student.encoder import build_encoder
from milan_pipe.student.model import build_student
from milan_pipe.student.published import published_state_dict
from milan_pipe.teacher.source import find_source
from milan_pipe.training.checkpoint import save_checkpoint

STUDENT = StudentSettings(image_size=32, patch_size=8, width=64, depth=2, heads=1)
STEP = "run/checkpoints/step-00000007"
EXPECTED = "expected safetensors, or tensors by name as torch.save writes them"


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


@cache
def published() -> dict[str, torch.Tensor]:
    return published_state_dict(build_student(STUDENT, DecoderSettings(width=32, depth=2, heads=4), 24))


def saved(change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """A run whose record was changed."""
    model = build_student(STUDENT, DecoderSettings(width=16, depth=1, heads=2), 8)
    save_checkpoint(
        Path("run"), 7, {"student": model.encoder.state_dict()}, {"student": STUDENT.model_dump(mode="json")}
    )
    change_record(Path(STEP), change)


def export(folder: str = "out", change: Callable[[dict[str, Any]], object] = lambda _: None) -> object:
    saved(change)
    return export_student("run", folder)


def export_beside(file: str, folder: str) -> object:
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).touch()
    return export(folder)


def spoilt_export() -> object:
    export()
    Path("out/model.safetensors").write_bytes(b"no")
    return load_student("out")


def read(name: str, write: Callable[[Path], object], heads: int | None = 4) -> object:
    """Import a file that is written so. Nothing in it has run, and nothing is left of it."""
    write(Path(name))
    try:
        return import_published(name, "o", decoder_heads=heads)
    finally:
        assert not Path("sprung").exists()
        assert not Path("o").exists()


def torch_file(content: object, name: str = "c.pth") -> object:
    return read(name, lambda file: torch.save(content, file))


def cut(file: Path, size: int) -> None:
    if file.suffix == ".safetensors":
        save_file(published(), file)
    else:
        torch.save(published(), file)
    file.write_bytes(file.read_bytes()[:size])


def second_import() -> None:
    save_file(published(), "c.safetensors")
    for _ in range(2):
        import_published("c.safetensors", "run", decoder_heads=4)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in published().items() if key != name}


def named_as_a_file(name: str) -> Case:
    stem, _, suffix = name.rpartition(".")
    message = (
        f"{name} has the name of a file, and a folder is written: name one without '.{suffix}', as {stem}; it will "
        "hold model.safetensors and config.json"
    )
    return lambda: export(name), SettingError, message


def damaged(name: str, write: Callable[[Path], object]) -> Case:
    message = f"checkpoint {name} cannot be read (...): it is damaged; {EXPECTED}"
    return lambda: read(name, write), DataError, message


def zipped(file: Path, compression: int, pickled: bytes) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in ("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little"):
            archive.writestr(f"archive/{name}", data)


def nones(count: int) -> bytes:
    return b"\x80\x02}(U\x01a](" + b"N" * count + b"eu."


CASES: dict[str, Case] = {
    "compressed": (
        lambda: read("c.pth", lambda file: zipped(file, zipfile.ZIP_DEFLATED, nones(9))),
        DataError,
        f"checkpoint c.pth is compressed, which torch.save never does; {EXPECTED}",
    ),
    "more objects than tensors have": (
        lambda: read("c.pth", lambda file: zipped(file, zipfile.ZIP_STORED, nones(2**25))),
        DataError,
        f"checkpoint c.pth has 32 MiB of objects beside the values of its tensors, at most 16 MiB are read; {EXPECTED}",
    ),
    "objects beside the tensors": (
        lambda: torch_file({"model": published(), "args": argparse.Namespace(lr=1)}),
        DataError,
        "checkpoint c.pth holds Python objects beside its tensors (argparse.Namespace), which are never unpickled "
        f"here; {EXPECTED}. If you trust its author, load it with torch.load yourself and save the state dict alone",
    ),
    "objects that run code": (
        lambda: torch_file({"model": published(), "trap": Trap()}),
        DataError,
        "checkpoint c.pth holds Python objects beside its tensors (...), which are never unpickled here; ...",
    ),
    "bare pickle": (
        lambda: read("c.pth", lambda file: file.write_bytes(pickle.dumps(Trap()))),
        DataError,
        "checkpoint c.pth ...",
    ),
    "no tensors": (lambda: torch_file({"epoch": 3}), DataError, f"checkpoint c.pth holds no tensors; {EXPECTED}"),
    "list": (lambda: torch_file([1, 2]), DataError, f"checkpoint c.pth holds a list, {EXPECTED}"),
    "text": damaged("c.pth", lambda file: file.write_text("not a checkpoint")),
    "cut short": damaged("c.pth", lambda file: cut(file, 5000)),
    "cut short safetensors": damaged("c.safetensors", lambda file: cut(file, -9)),
    "program": (
        lambda: read("c.pth", lambda file: torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))),
        DataError,
        f"checkpoint c.pth is a TorchScript program, {EXPECTED}",
    ),
    "tensor that is missing": (
        lambda: torch_file(without("blocks.1.attn.proj.bias")),
        MismatchError,
        "state dict does not fit a student of the sizes it has: it lacks blocks.1.attn.proj.bias",
    ),
    "no file": (
        lambda: read("c.pth", lambda _: None),
        MissingError,
        f"checkpoint c.pth is not there; {EXPECTED}",
    ),
    "heads that do not follow": (
        lambda: read("c.safetensors", lambda file: save_file(published(), file), None),
        SettingError,
        "decoder width 32 is not the usual 512 (16 heads); give decoder_heads",
    ),
    "run with checkpoints": (
        second_import,
        StoreError,
        "run holds checkpoints (step-00000000); name another folder",
    ),
    "no run": (lambda: export_student("none", "out"), MissingError, "... is not there..."),
    "folder that is not empty": (
        lambda: export_beside("taken/file", "taken"),
        StoreError,
        "...taken exists and is not empty; name another folder, or remove this one first",
    ),
    "folder below a file": (
        lambda: export_beside("flat", "flat/out"),
        StoreError,
        "... cannot be made: ...",
    ),
    "student of another depth": (
        lambda: export(change=lambda record: record["student"].update(depth=3)),
        MismatchError,
        f"{STEP} does not fit the model: it lacks blocks.2.norm1.weight, ...",
    ),
    "unknown student": (
        lambda: export(change=lambda record: record.pop("student")),
        DataError,
        f"{STEP} does not say which student it holds; name one that `milan-pipe pretrain` wrote",
    ),
    "run of segmentation": (
        lambda: (saved(lambda record: record.update(task="segment")), load_student("run")),
        DataError,
        f"{STEP} holds what `milan-pipe segment` trained; name one that `milan-pipe pretrain` wrote",
    ),
    "damaged export": (
        spoilt_export,
        DataError,
        "out is no model that timm can load (...); export it again",
    ),
    "name of a file": named_as_a_file("student.safetensors"),
    "name of a file, large": named_as_a_file("student.PTH"),
    "name of a bin": named_as_a_file("a.bin"),
    "name of a pt": named_as_a_file("a.pt"),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])


def exported(folder: Path) -> Path:
    settings = StudentSettings(image_size=16, patch_size=8, width=8, depth=1, heads=2)
    student = build_encoder(settings).state_dict()
    save_checkpoint(folder / "run", 1, {"student": student}, {"student": settings.model_dump(mode="json")})
    export_student(folder / "run", folder / "out")
    return folder / "out"


def test_a_card_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (folder / "README.md").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"README\.md is no UTF-8"):
        push(folder, "org/name", dry_run=True)


@pytest.mark.parametrize(
    "change",
    [{"pretrained_cfg": 5}, {"model_args": {"global_pool": "x"}}, {"model_args": 5}, {"model_args": {"depth": -1}}],
)
def test_a_description_that_builds_nothing_is_one_error(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = exported(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=r"is no model that timm can load"):
        load_student(folder)


def test_a_classifier_of_sizes_that_nobody_has_is_one_error(tmp_path: Path) -> None:
    settings = StudentSettings(image_size=16, patch_size=8, width=2**34, depth=1, heads=2)
    record = {"task": "finetune", "student": settings.model_dump(mode="json"), "classes": 2}
    save_checkpoint(tmp_path, 1, {"model": {"cls_token": torch.zeros(1)}}, record)
    with pytest.raises(StoreError, match="its classifier cannot be built: out of memory"):
        load_student(tmp_path)


def test_a_classifier_that_does_not_say_its_crop_is_one_error(tmp_path: Path) -> None:
    settings = StudentSettings(image_size=16, patch_size=8, width=8, depth=1, heads=2)
    record = {"task": "finetune", "student": settings.model_dump(mode="json"), "classes": 2}
    save_checkpoint(tmp_path, 1, {"model": build_vit(settings, 2).state_dict()}, record)
    with pytest.raises(DataError, match="does not say how much of an image"):
        load_student(tmp_path)


@pytest.mark.parametrize("shape", [(1, 5, 8, 1), (2, 5, 8), (1, 7, 8), (5, 8), ()])
def test_positions_of_another_form_are_one_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    settings = StudentSettings(image_size=16, patch_size=8, width=8, depth=1, heads=2)
    encoder = build_encoder(settings)
    save_file({**encoder.state_dict(), "pos_embed": torch.zeros(shape)}, tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match="pos_embed is"):
        start_from(str(tmp_path / "w.safetensors"), settings.model, encoder)


@pytest.mark.parametrize("depth", [10**9, 1e9])
def test_a_description_of_more_blocks_than_any_model_has_is_one_error(tmp_path: Path, depth: float) -> None:
    """They would be built one after another, for hours."""
    folder = exported(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["depth"] = depth
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="is more than 1000"):
        load_student(folder)
    with pytest.raises(DataError, match="is more than 1000"):
        find_source(f"timm:local-dir:{folder}", None)
