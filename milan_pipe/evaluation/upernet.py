"""UperNet on a plain ViT: four of its blocks as a pyramid, pooled and fused, and an auxiliary head.

The decoder is segmentation-models-pytorch's; it has a layer norm before each level, MMSegmentation's has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.evaluation import SegmentSettings
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import SettingError
from milan_pipe.evaluation.backbone import Backbone, resized
from milan_pipe.evaluation.classifier import build_vit
from milan_pipe.extras import needs
from milan_pipe.student.encoder import ENCODER_LAYERS, Encoder

with needs("segment", "segmentation"):
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder


def default_blocks(depth: int) -> tuple[int, int, int, int]:
    """Blocks whose outputs make the pyramid, counted from 0: 3, 5, 7, 11 of 12, and 7, 11, 15, 23 of 24."""
    first, second, third = (max(1, round(depth * part)) - 1 for part in (1 / 3, 1 / 2, 2 / 3))
    return first, second, third, depth - 1


class _Pyramid(nn.Module):
    """Patch maps at the patch's stride p to strides p / 4, p / 2, p and 2 p.

    Source: arXiv 2106.08254 (BEiT), its published code for ADE20K.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.four_times = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2),
        )
        self.twice = nn.ConvTranspose2d(width, width, 2, 2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) to four of sizes 4h, 2h, h and ceil(h / 2)."""
        first, second, third, fourth = maps
        return [self.four_times(first), self.twice(second), third, F.max_pool2d(fourth, 2, ceil_mode=True)]


class UperNet(nn.Module):
    """A ViT, the pyramid of its blocks, UperNet's decoder, and on the third level an auxiliary FCN head.

    Source: arXiv 1807.10221; sizes of the auxiliary head (one convolution, 256 channels) and the dropout of 0.1 before
    both classifiers as MMSegmentation has them.
    """

    def __init__(self, encoder: Encoder, blocks: tuple[int, ...], channels: int, classes: int) -> None:
        super().__init__()
        width = encoder.embed_dim
        self.encoder = encoder
        self.blocks = blocks
        self.pyramid = _Pyramid(width)
        # The decoder leaves out the first two levels, which are those of strides 1 and 2 in other encoders.
        self.decoder = UPerNetDecoder([0, 0, width, width, width, width], encoder_depth=5, decoder_channels=channels)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))
        self.auxiliary = nn.Sequential(
            nn.Conv2d(width, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(256, classes, 1),
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's layers, for timm's layer decay; the heads, which match nothing, are the last one."""
        del coarse
        return ENCODER_LAYERS

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, G, H, W) at the input's size, and in training the auxiliary head's as well."""
        size = pixels_BCHW.shape[-2:]
        # A shallow encoder gives one block to several levels.
        distinct = sorted(set(self.blocks))
        found: Any = self.encoder.forward_intermediates(
            pixels_BCHW, indices=distinct, norm=False, output_fmt="NLC", intermediates_only=True
        )
        grid = self.encoder.patch_embed.dynamic_feat_size((size[0], size[1]))
        # Tokens are maps with channels innermost, as the convolutions' weights are.
        maps = [found[distinct.index(block)].unflatten(1, grid).permute(0, 3, 1, 2) for block in self.blocks]
        levels = self.pyramid(maps)
        unused = levels[0].new_zeros(())
        logits = self.classify(self.decoder([unused, unused, *levels]))
        if not self.training:
            return _enlarged(logits, size), None
        return _enlarged(logits, size), _enlarged(self.auxiliary(levels[2]), size)


def _enlarged(logits_BGhw: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(logits_BGhw.float(), size=size, mode="bilinear", align_corners=False)


def build_upernet(
    backbone: Backbone, settings: SegmentSettings, classes: int, seed: int
) -> tuple[StudentSettings, UperNet]:
    """Sizes, and UperNet on the backbone's weights; blocks after the last one that a head reads are left out.

    Args:
        seed: of the heads' weights.

    Raises:
        SettingError: the patch does not divide `segment.crop`, or there are no such blocks.
    """
    student, weights = resized(backbone, settings.crop)
    encoder = build_vit(student, 0, drop_path_rate=settings.drop_path)
    depth = len(encoder.blocks)
    chosen = default_blocks(depth) if settings.blocks is None else settings.blocks
    if len(chosen) != 4 or list(chosen) != sorted(chosen) or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise SettingError(
            f"segment.blocks is {list(chosen)}, expected four block numbers, not falling, from 0 to {depth - 1}, as "
            f"{list(default_blocks(depth))}"
        )
    encoder.load_state_dict(weights)
    # What no head reads would get no gradient.
    encoder.norm = nn.Identity()
    encoder.blocks = encoder.blocks[: chosen[-1] + 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UperNet(encoder, chosen, settings.channels, classes)
    return student, model.to(memory_format=torch.channels_last)
