"""Students from and to the flat key names of the published checkpoints, whatever their sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan_pipe.errors import MismatchError, SettingError
from milan_pipe.student.decoder import NORM_EPS, PlainDecoder, PromptingDecoder
from milan_pipe.student.encoder import Grid, set_fixed_positions
from milan_pipe.student.model import MaskedStudent
from milan_pipe.units import some
from milan_pipe.weights_file import mismatch

_DECODER_KEYS = ("decoder_", "mask_token")


def student_from_published(
    state_dict: Mapping[str, Tensor],
    *,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    prefix: str = "",
) -> MaskedStudent:
    """Build the student that a published state dict describes, and load it.

    Channels, patch, grid, widths, depths, MLP widths, output width, presence of a query-key-value bias in the
    encoder, and the decoder's kind (attn.kv: prompting; attn.qkv: plain) are read from the tensors. Numbers of heads
    leave no trace in them. Both position embeddings come from the state dict and are not trained.

    Args:
        state_dict: tensors under the published names, any float type; loaded as float32.
        encoder_heads: None is one head per 64 channels, as in all ViTs of the usual sizes.
        decoder_heads: None is 16 for the usual width 512; any other width needs a number.
        image_size: input height and width in pixels, or one number for both; None is a square grid's.
        prefix: of every published name, as "module." or "student/"; keys without it are left out.

    Raises:
        MismatchError: keys are missing or unexpected, or shapes contradict each other; the first are named.
        SettingError: heads do not divide the width, or cannot be derived from it.
    """
    state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    kind = PlainDecoder if "decoder_blocks.0.attn.qkv.weight" in state else PromptingDecoder
    sizes = _Sizes(state, prefix)
    channels, patch_h, patch_w = sizes.shape("patch_embed.proj.weight", 4)[1:]
    width = sizes.shape("cls_token", 3)[2]
    decoder_width = sizes.shape("mask_token", 3)[2]
    grid = _grid(sizes.shape("pos_embed", 3)[1] - 1, (patch_h, patch_w), image_size)
    encoder = VisionTransformer(
        img_size=(grid[0] * patch_h, grid[1] * patch_w),
        patch_size=(patch_h, patch_w),
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=sizes.depth("blocks"),
        num_heads=_encoder_heads(width, encoder_heads),
        # timm rounds width * ratio down: the half keeps it from losing one.
        mlp_ratio=(sizes.shape("blocks.0.mlp.fc1.weight", 2)[0] + 0.5) / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
    )
    set_fixed_positions(encoder, grid)  # overwritten below; this also stops its training
    if decoder_heads is None and decoder_width != 512:
        raise SettingError(f"decoder width {decoder_width} is not the usual 512 (16 heads); give decoder_heads")
    decoder = kind(
        encoder_width=width,
        width=decoder_width,
        depth=sizes.depth("decoder_blocks"),
        heads=16 if decoder_heads is None else decoder_heads,
        grid=grid,
        output_width=sizes.shape("decoder_pred.weight", 2)[0],
        mlp_width=sizes.shape("decoder_blocks.0.mlp.fc1.weight", 2)[0],
    )
    student = MaskedStudent(encoder, decoder)
    both = state, published_state_dict(student)
    found, expected = ({prefix + key: value for key, value in tensors.items()} for tensors in both)
    if problems := mismatch(found, expected):
        raise MismatchError(f"state dict does not fit a student of the sizes it has: {problems}")
    encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith(_DECODER_KEYS)})
    decoder.load_state_dict({key: value for key, value in state.items() if key.startswith(_DECODER_KEYS)})
    return student


def published_state_dict(student: MaskedStudent) -> dict[str, Tensor]:
    """Encoder and decoder weights under the published flat names; the tensors are the student's own, not copies."""
    return {**student.encoder.state_dict(), **student.decoder.state_dict()}


class _Sizes:
    """Sizes read from a state dict, with errors that name the key."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        self._state, self._prefix = state, prefix
        # Some of the keys show a wrong file or prefix at once.
        self._found = f"found {some(sorted(state), 4) or 'no key'}"

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        if key not in self._state:
            missing = f"{self._prefix + key!r} is missing, one of the keys that give the model's sizes"
            todo = "if all names share a prefix, name it in `prefix`"
            raise MismatchError(f"state dict: {missing}; {self._found}; {todo}")
        shape = tuple(self._state[key].shape)
        if len(shape) != dimensions:
            found = f"state dict: {self._prefix + key!r} has shape {shape}"
            raise MismatchError(f"{found}, expected {dimensions} dimensions")
        return shape

    def depth(self, blocks: str) -> int:
        """One more than the highest block number: gaps then show as missing keys."""
        pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
        numbers = [int(match[1]) for match in map(pattern.match, self._state) if match]
        if not numbers:
            raise MismatchError(f"state dict: no key {self._prefix}{blocks}.0.*; {self._found}")
        return max(numbers) + 1


def _grid(patches: int, patch: Grid, image_size: int | tuple[int, int] | None) -> Grid:
    if image_size is None:
        side = math.isqrt(max(patches, 0))
        if side * side != patches or side == 0:
            raise MismatchError(f"pos_embed has {patches} patches, not a square's; give image_size=(height, width)")
        return side, side
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch[0] or width % patch[1] or (height // patch[0]) * (width // patch[1]) != patches:
        raise MismatchError(
            f"image_size {height} x {width} at patch {patch[0]} x {patch[1]} is not the {patches} patches of pos_embed"
        )
    return height // patch[0], width // patch[1]


def _encoder_heads(width: int, given: int | None) -> int:
    if given is None and width % 64:
        raise SettingError(f"encoder width {width} is no multiple of 64, so heads are unknown; give encoder_heads")
    heads = width // 64 if given is None else given
    if heads < 1 or width % heads:
        raise SettingError(f"encoder_heads {heads} does not divide the encoder's width {width}")
    return heads
