"""Checkpoints with the published key names become checkpoints of this package, decoder included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milan_pipe import __version__
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.digests import sha256_of_file
from milan_pipe.errors import MismatchError, StoreError
from milan_pipe.student.decoder import PromptingDecoder
from milan_pipe.student.encoder import build_encoder
from milan_pipe.student.published import student_from_published
from milan_pipe.training.checkpoint import checkpoints_of, save_checkpoint
from milan_pipe.weights_file import mismatch, read_weights, require_folder_name

# timm's names of the plain ViTs, by width, depth and heads.
_NAMES = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 16): "vit_huge_patch14_224",
}


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was read; `checkpoint` is what other commands take."""

    checkpoint: str
    student: StudentSettings
    decoder: DecoderSettings
    output_width: int
    parameters: int


def _student_settings(encoder: Any, where: Path) -> StudentSettings:
    patch, image = encoder.patch_embed.patch_size, encoder.patch_embed.img_size
    if patch[0] != patch[1] or image[0] != image[1]:
        raise MismatchError(
            f"the encoder reads {image[0]} x {image[1]} pixels in patches of {patch[0]} x {patch[1]}; a student of "
            "this package is square in both"
        )
    width, depth, heads = encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads
    model = _NAMES.get((width, depth, heads), "vit_base_patch16_224")
    settings = StudentSettings(
        model=model, image_size=image[0], patch_size=patch[0], width=width, depth=depth, heads=heads
    )
    if problems := mismatch(encoder.state_dict(), build_encoder(settings).state_dict()):
        raise MismatchError(
            f"{where} is no ViT that timm's {settings.model!r} can be: {problems}; an MLP 4 times the width and a "
            "query-key-value bias are expected"
        )
    return settings


def _decoder_settings(decoder: Any) -> DecoderSettings:
    width, depth = decoder.decoder_embed.out_features, len(decoder.decoder_blocks)
    attention = decoder.decoder_blocks[0].attn
    if isinstance(decoder, PromptingDecoder):
        return DecoderSettings(kind="prompting", width=width, depth=depth, heads=attention.heads)
    return DecoderSettings(kind="plain", width=width, depth=depth, heads=attention.num_heads)


def import_published(
    file: str | Path,
    run: str | Path,
    *,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    prefix: str = "",
) -> ImportReport:
    """Read FILE and write RUN/checkpoints/step-00000000, which every command takes as a checkpoint.

    Args:
        file: safetensors, or a file of `torch.save` with a state dict, alone or under `model` or `state_dict`.
        run: a folder without checkpoints.
        encoder_heads, decoder_heads, prefix: see `student_from_published`.

    Raises:
        MissingError, DataError: the file is not there, is damaged, or holds Python objects, which are refused.
        MismatchError: its tensors are not those of a student.
        SettingError: RUN has the name of a weights file; numbers of heads do not follow from the tensors, or do not
            divide the width.
        StoreError: RUN holds checkpoints, or cannot be written.
    """
    path, folder = Path(file), Path(run)
    require_folder_name(folder, "checkpoints")
    if present := checkpoints_of(folder):
        raise StoreError(f"{folder} holds checkpoints ({present[-1].name}); name another folder")
    weights = read_weights(path)
    student = student_from_published(weights, encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix=prefix)
    encoder_settings, decoder_settings = _student_settings(student.encoder, path), _decoder_settings(student.decoder)
    record = {
        "package_version": __version__,
        "epochs": None,
        "student": encoder_settings.model_dump(mode="json"),
        "teacher": None,
        "settings": {"decoder": decoder_settings.model_dump(mode="json")},
        "source": {"file": path.name, "sha256": sha256_of_file(path)},
    }
    parts = {"student": student.encoder.state_dict(), "decoder": student.decoder.state_dict()}
    written = save_checkpoint(folder, 0, parts, record)
    return ImportReport(
        checkpoint=str(written),
        student=encoder_settings,
        decoder=decoder_settings,
        output_width=student.decoder.state_dict()["decoder_pred.bias"].numel(),
        parameters=sum(parameter.numel() for parameter in student.parameters()),
    )
