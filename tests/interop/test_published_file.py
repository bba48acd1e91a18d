"""Published checkpoints, read without trust, and usable wherever a checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import StoreError
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
    settings, encoder = student_of(opened)
    model = build_student(settings, DecoderSettings(**opened.record["settings"]["decoder"]), output_width)
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
    sizes = StudentSettings(model="vit_tiny_patch16_224", image_size=224, patch_size=16, width=192, depth=12, heads=3)
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


def test_a_run_with_checkpoints_is_left_as_it_is(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "c.safetensors")
    import_published(tmp_path / "c.safetensors", tmp_path / "run", decoder_heads=4)
    weights = tmp_path / "run" / "checkpoints" / "step-00000000" / "student.safetensors"
    before = load_file(weights)
    with pytest.raises(StoreError, match="checkpoints"):
        import_published(tmp_path / "c.safetensors", tmp_path / "run", decoder_heads=4)
    after = load_file(weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
