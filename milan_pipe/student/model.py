"""Encoder and decoder as the one module that is pretrained. Shape suffixes are explained in `milan_pipe.student`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import ShapeError
from milan_pipe.student.decoder import AnyDecoder, build_decoder
from milan_pipe.student.encoder import ENCODER_LAYERS, Encoder, build_encoder, encode_visible, grid_of
from milan_pipe.student.masking import MaskSplit


class MaskedStudent(nn.Module):
    """A ViT that sees few patches and a decoder that predicts a feature for every token; the encoder outlives it.

    Raises:
        ShapeError: the two differ in grid or in token width.
    """

    def __init__(self, encoder: Encoder, decoder: AnyDecoder):
        super().__init__()
        found = (tuple(decoder.grid), decoder.encoder_width)
        expected = (tuple(encoder.patch_embed.grid_size), encoder.embed_dim)
        if found != expected:
            raise ShapeError(f"decoder is for grid {found[0]} and width {found[1]}, the encoder has {expected}")
        self.encoder, self.decoder = encoder, decoder

    def checkpoint_activations(self, wanted: bool) -> None:
        """Compute the blocks' activations again in the backward pass, or keep them: memory against time."""
        self.encoder.set_grad_checkpointing(wanted)
        self.decoder.checkpoint_activations = wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """The encoder's layers, for timm's layer decay; the decoder, which matches nothing, is the last one."""
        return ENCODER_LAYERS

    def units(self) -> list[nn.Module]:
        """Blocks of encoder and decoder, each alike: what is sharded and compiled one at a time."""
        return [*self.encoder.blocks.children(), *self.decoder.decoder_blocks]

    def forward(self, images_BCHW: Tensor, split: MaskSplit) -> Tensor:
        """(B, L + 1, T): the target predicted at every position; see `encode_visible` and `PromptingDecoder.forward`.

        Raises:
            ShapeError: images or split do not fit the encoder.
        """
        prediction_BST: Tensor = self.decoder(encode_visible(self.encoder, images_BCHW, split), split)
        return prediction_BST


def build_student(
    student: StudentSettings, decoder: DecoderSettings, output_width: int, visible_width: int = 0
) -> MaskedStudent:
    """Build encoder and decoder with fresh weights from torch's global generator.

    Args:
        output_width: T of the decoder: the teacher's feature width, or the values of one patch's target.
        visible_width: T of the linear layer on the encoder's own output, before the decoder's in the prediction.

    Raises:
        SettingError: see `build_encoder` and `build_decoder`.
    """
    encoder = build_encoder(student)
    built = build_decoder(decoder, encoder.embed_dim, grid_of(student), output_width, visible_width)
    return MaskedStudent(encoder, built)
