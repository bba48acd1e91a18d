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


def _student_config(encoder: Any, where: Path) -> StudentSettings:
    height, width = encoder.patch_embed.patch_size
    image_height, image_width = encoder.patch_embed.img_size
    if height != width or image_height != image_width:
        raise MismatchError(
            f"the encoder reads {image_height} x {image_width} pixels in patches of {height} x {width}; a student of "
            "this package is square in both"
        )
    sizes = (encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads)
    config = StudentSettings(
        model=_NAMES.get(sizes, "vit_base_patch16_224"),
        image_size=image_height,
        patch_size=height,
        width=sizes[0],
        depth=sizes[1],
        heads=sizes[2],
    )
    if problems := mismatch(encoder.state_dict(), build_encoder(config).state_dict()):
        raise MismatchError(
            f"{where} is no ViT that timm's {config.model!r} can be: {problems}; an MLP 4 times the width and a "
            "query-key-value bias are expected"
        )
    return config


def _decoder_config(decoder: Any) -> DecoderSettings:
    attention = decoder.decoder_blocks[0].attn
    prompting = isinstance(decoder, PromptingDecoder)
    return DecoderSettings(
        kind="prompting" if prompting else "plain",
        width=decoder.decoder_embed.out_features,
        depth=len(decoder.decoder_blocks),
        heads=attention.heads if prompting else attention.num_heads,
    )


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
    student = student_from_published(
        read_weights(path), encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix=prefix
    )
    encoder_config, decoder_config = _student_config(student.encoder, path), _decoder_config(student.decoder)
    written = save_checkpoint(
        folder,
        0,
        {"student": student.encoder.state_dict(), "decoder": student.decoder.state_dict()},
        {
            "package_version": __version__,
            "epochs": None,
            "student": encoder_config.model_dump(mode="json"),
            "teacher": None,
            "settings": {"decoder": decoder_config.model_dump(mode="json")},
            "source": {"file": path.name, "sha256": sha256_of_file(path)},
        },
    )
    return ImportReport(
        checkpoint=str(written),
        student=encoder_config,
        decoder=decoder_config,
        output_width=student.decoder.decoder_pred.out_features,
        parameters=sum(parameter.numel() for parameter in student.parameters()),
    )
