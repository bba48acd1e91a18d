"""Published checkpoints, read without trust, and usable wherever a checkpoint is."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.evaluation.backbone import student_of
from milan_pipe.interop.published_file import import_published
from milan_pipe.interop.timm_layout import export_student
from milan_pipe.student.masking import MaskSplit
from milan_pipe.student.model import MaskedStudent, build_student
from milan_pipe.student.published import published_state_dict
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.weights_file import load_weights

ORACLE = Path(__file__).parents[3] / "shared" / "oracle" / "milan_oracle_a.safetensors"
STUDENT = StudentSettings(image_size=32, patch_size=8, width=64, depth=2, heads=1)


def published(kind: str = "prompting", student: StudentSettings = STUDENT) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    decoder = DecoderSettings(kind=kind, width=32, depth=2, heads=4)  # type: ignore[arg-type]
    return published_state_dict(build_student(student, decoder, 24))


def rebuilt(run: Path, output_width: int) -> MaskedStudent:
    opened = open_checkpoint(run)
    config, encoder = student_of(opened)
    model = build_student(config, DecoderSettings(**opened.record["settings"]["decoder"]), output_width)
    load_weights(model.encoder, encoder.state_dict(), "encoder")
    load_weights(model.decoder, opened.weights("decoder"), "decoder")
    return model.eval()


@pytest.mark.parametrize("kind", ["prompting", "plain"])
@pytest.mark.parametrize("wrap", ["alone", "model", "state_dict", "safetensors"])
def test_every_tensor_arrives(tmp_path: Path, kind: str, wrap: str) -> None:
    state = published(kind)
    file = tmp_path / ("c.safetensors" if wrap == "safetensors" else "c.pth")
    if wrap == "safetensors":
        save_file(state, file)
    else:
        torch.save(state if wrap == "alone" else {wrap: state, "epoch": 399}, file)
    report = import_published(file, tmp_path / "run", decoder_heads=4)
    assert (report.decoder.kind, report.decoder.heads, report.output_width) == (kind, 4, 24)
    assert report.student == StudentSettings(
        model="vit_base_patch16_224", image_size=32, patch_size=8, width=64, depth=2, heads=1
    )
    found = published_state_dict(rebuilt(tmp_path / "run", 24))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert export_student(tmp_path / "run", tmp_path / "out").parameters > 0


def test_usual_sizes_get_timms_name(tmp_path: Path) -> None:
    sizes = StudentSettings(model="vit_small_patch16_224", image_size=224, patch_size=16, width=384, depth=12, heads=6)
    save_file(published(student=sizes), tmp_path / "s.safetensors")
    assert import_published(tmp_path / "s.safetensors", tmp_path / "run", decoder_heads=4).student == sizes


@pytest.mark.skipif(not ORACLE.is_file(), reason=f"{ORACLE} is not there")
def test_the_references_numbers_come_out_of_the_checkpoint(tmp_path: Path) -> None:
    with safe_open(ORACLE, "pt") as file:
        sizes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    heads = {name: int(value) for name, value in sizes.items() if "heads" in name}
    encoder_heads = next(value for name, value in heads.items() if "dec" not in name and "teacher" not in name)
    decoder_heads = next(value for name, value in heads.items() if "dec" in name)
    report = import_published(
        ORACLE, tmp_path / "run", encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix="student/"
    )
    model = rebuilt(tmp_path / "run", report.output_width)
    order = tensors["io/ids_shuffle"]
    visible = tensors["io/latent"].shape[1] - 1
    with torch.no_grad():
        prediction = model(tensors["io/images"], MaskSplit(order[:, :visible], order[:, visible:]))
    assert (prediction - tensors["io/prediction"]).abs().max() < 1e-5


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


def files_of_others(folder: Path) -> dict[str, tuple[Path, type[MilanError], str]]:
    state = published()
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, folder / "args.pth")
    torch.save({"model": state, "trap": Trap()}, folder / "trap.pth")
    (folder / "bare.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"epoch": 3}, folder / "empty.pth")
    torch.save([1, 2], folder / "list.pth")
    (folder / "text.pth").write_text("not a checkpoint")
    whole = folder / "whole.pth"
    torch.save(state, whole)
    (folder / "cut.pth").write_bytes(whole.read_bytes()[:5000])
    save_file(state, folder / "w.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:-9])
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "program.pth"))
    lacking = {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.proj.bias"}
    torch.save(lacking, folder / "lacking.pth")
    found: dict[str, tuple[type[MilanError], str]] = {
        "args.pth": (DataError, r"argparse\.Namespace.*never unpickled.*state dict alone"),
        "trap.pth": (DataError, "never unpickled"),
        "bare.pth": (DataError, "cannot be read|never unpickled"),
        "empty.pth": (DataError, "no tensors"),
        "list.pth": (DataError, "holds a list"),
        "text.pth": (DataError, "cannot be read"),
        "cut.pth": (DataError, "cannot be read"),
        "cut.safetensors": (DataError, "cannot be read"),
        "program.pth": (DataError, "TorchScript"),
        "lacking.pth": (MismatchError, r"lacks blocks\.1\.attn\.proj\.bias"),
        "nowhere.pth": (MissingError, "not there"),
    }
    return {name: (folder / name, *what) for name, what in found.items()}


def test_what_is_no_student_is_one_error_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, kind, words in files_of_others(tmp_path).values():
        with pytest.raises(kind, match=words):
            import_published(path, tmp_path / "run", decoder_heads=4)
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "run").exists()


def test_heads_that_do_not_follow_and_a_run_with_checkpoints(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "c.safetensors")
    with pytest.raises(SettingError, match="decoder_heads"):
        import_published(tmp_path / "c.safetensors", tmp_path / "run")
    import_published(tmp_path / "c.safetensors", tmp_path / "run", decoder_heads=4)
    before = load_file(tmp_path / "run" / "checkpoints" / "step-00000000" / "student.safetensors")
    with pytest.raises(StoreError, match="holds checkpoints"):
        import_published(tmp_path / "c.safetensors", tmp_path / "run", decoder_heads=4)
    after = load_file(tmp_path / "run" / "checkpoints" / "step-00000000" / "student.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
