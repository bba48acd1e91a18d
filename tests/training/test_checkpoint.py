"""Checkpoints: what was saved is what is opened, and half a checkpoint is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.training import checkpoint as module
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint, save_checkpoint


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"a.weight": torch.full((2, 3), value), "b": torch.arange(4, dtype=torch.int64)}


def save(run: Path, step: int = 7, value: float = 1.0) -> Path:
    return save_checkpoint(run, step, {"student": weights(value)}, {"student": {"depth": 2}})


@pytest.mark.parametrize("by", ["run", "checkpoints", "folder"])
def test_what_is_saved_is_opened(tmp_path: Path, by: str) -> None:
    folder = save(tmp_path)
    named = {"run": tmp_path, "checkpoints": tmp_path / "checkpoints", "folder": folder}[by]
    opened = open_checkpoint(named)
    assert opened.path == folder
    assert dict(opened.record) == {"version": 1, "step": 7, "student": {"depth": 2}}
    found = opened.weights("student")
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "student.safetensors"]


def test_tensors_that_are_not_contiguous_or_need_gradients_are_saved(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    folder = save_checkpoint(tmp_path, 1, {"student": {"w": turned}}, {})
    assert torch.equal(open_checkpoint(folder).weights("student")["w"], turned.detach())


def test_a_run_opens_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save(tmp_path, step)
    assert open_checkpoint(tmp_path).record["step"] == 100
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000009", "step-00000020", "step-00000100"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, value=1.0)
    folder = save(tmp_path, value=2.0)
    assert open_checkpoint(folder).weights("student")["a.weight"][0, 0] == 2.0


def test_what_an_interrupted_write_left_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.json, "dumps", cut)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert any(path.name.startswith(".partial") for path in (tmp_path / "checkpoints").iterdir())
    assert open_checkpoint(tmp_path).record["step"] == 1
    save(tmp_path, 2, value=3.0)
    assert open_checkpoint(tmp_path).weights("student")["a.weight"][0, 0] == 3.0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise module.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(StoreError, match=r"step-00000007 cannot be written: .*No space left"):
        save(tmp_path)
    assert checkpoints_of(tmp_path) == []


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        save(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\xff"], ids=["empty", "cut", "list", "no version", "bytes"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path)
    (folder / "checkpoint.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"checkpoint\.json cannot be read"):
        open_checkpoint(tmp_path)


def test_a_run_whose_last_checkpoint_lost_its_record_does_not_fall_back_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "checkpoint.json").unlink()
    with pytest.raises(DataError, match="step-00000002"):
        open_checkpoint(tmp_path)


def test_another_version_is_refused_with_both(tmp_path: Path) -> None:
    folder = save(tmp_path)
    record = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**record, "version": 99}))
    with pytest.raises(MismatchError, match=r"version 99.* 1"):
        open_checkpoint(folder)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path))
    with pytest.raises(MissingError, match=r"decoder\.safetensors"):
        opened.weights("decoder")


@pytest.mark.parametrize("keep", [0, 4, -5])
def test_a_cut_file_is_named(tmp_path: Path, keep: int) -> None:
    folder = save(tmp_path)
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"student\.safetensors cannot be read"):
        open_checkpoint(folder).weights("student")


def test_nothing_there_is_told_apart_from_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not there"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="has no checkpoint"):
        open_checkpoint(tmp_path)
    assert checkpoints_of(tmp_path / "nowhere") == []
