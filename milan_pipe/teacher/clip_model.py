"""A small CLIP and what it is trained by: captions, their words, and attention that lies on what captions speak of.

Shape suffixes: B images and captions, L patches that a step keeps, C ids of a caption, W words, T features.

Source: arXiv 2103.00020 (CLIP); arXiv 2212.00794 (patches are dropped while it trains).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from milan_pipe.config.teacher import ClipSettings
from milan_pipe.devices import autocast, resolve_precision
from milan_pipe.teacher.native import NativeFamily
from milan_pipe.weights_file import load_tensors, load_weights

WORDS_FILE = "words.txt"
"""One word a line, beside open_clip's files."""

_SHARPNESS = 10.0
"""Of the soft maximum over an image's patches."""


class Words:
    """Captions to ids of their words; 0 pads, the highest id ends each caption. Unknown words are dropped."""

    def __init__(self, words: Sequence[str], context: int) -> None:
        self.words = tuple(words)
        self._ids = {word: 1 + number for number, word in enumerate(words)}
        self._context = context

    @classmethod
    def of(cls, captions: Iterable[str], most: int, context: int) -> Words:
        """The `most` frequent words of captions, in alphabetical order."""
        counts = Counter(word for caption in captions for word in _words(caption))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[:most]
        return cls(sorted(frequent), context)

    def __len__(self) -> int:
        return 2 + len(self.words)

    def known(self, caption: str) -> list[int]:
        """Ids of the words that are known, from 1."""
        return [self._ids[word] for word in _words(caption) if word in self._ids]

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(N, context) int64; what is too long is cut."""
        # open_clip's text tower reads its output at the highest id of a row.
        end, ids = len(self) - 1, torch.zeros(len(captions), self._context, dtype=torch.int64)
        for row, caption in enumerate(captions):
            known = self.known(caption)[: self._context - 1]
            ids[row, : len(known) + 1] = torch.tensor([*known, end])
        return ids


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def contrastive_loss(image_BT: Tensor, text_BT: Tensor, scale: Tensor, match_BB: Tensor) -> Tensor:
    """Symmetric cross-entropy over cosines; the target is uniform over all matches of a row or column.

    Args:
        match_BB: bool, whether caption j is true of image i.
    """
    logits = scale * F.normalize(image_BT, dim=-1) @ F.normalize(text_BT, dim=-1).T
    target = match_BB.float()
    by_image = F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(dim=1, keepdim=True))
    return (by_image + by_text) / 2


def word_loss(patch_BLT: Tensor, word_WT: Tensor, scale: Tensor, bias: Tensor, has_BW: Tensor) -> Tensor:
    """Binary cross-entropy of whether an image has a word, by the soft maximum of its patches' cosines.

    Args:
        has_BW: bool, whether a caption of the image has the word.
    """
    cosine_BLW = F.normalize(patch_BLT, dim=-1) @ F.normalize(word_WT, dim=-1).T
    # A log of a mean: the same in a step that sees fewer patches.
    top_BW = (_SHARPNESS * cosine_BLW).logsumexp(dim=1) - torch.tensor(cosine_BLW.shape[1]).log()
    return F.binary_cross_entropy_with_logits(scale * top_BW / _SHARPNESS + bias, has_BW.float())


def peak_loss(share_BL: Tensor, allowed: float) -> Tensor:
    """Mean square of what each patch has above `allowed` times the mean of an image's attention."""
    return F.relu(share_BL * share_BL.shape[1] - allowed).square().mean()


def model_config(settings: ClipSettings, words: Words) -> dict[str, Any]:
    """open_clip's description of the model, without what matters in training alone."""
    vision = {
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "width": settings.width,
        "layers": settings.layers,
        "head_width": settings.head_width,
    }
    text = {
        "context_length": settings.context_length,
        "vocab_size": len(words),
        "width": settings.text_width,
        "heads": settings.text_width // settings.head_width,
        "layers": settings.text_layers,
    }
    return {"embed_dim": settings.embed_dim, "vision_cfg": vision, "text_cfg": text}


class ClipInTraining(nn.Module):
    """Both towers, and the parts that only training needs.

    Beside the CLS token, which is all that CLIP holds against a caption, there are

    - the patches, averaged by the CLS token's attention, against a caption: as features, and as the first block leaves
      them. There a patch knows little of its surroundings, so that the attention must lie on all that tells what the
      caption says;
    - each patch against the words of all captions, the best patch deciding: patches learn what they show;
    - `peak_loss`, which keeps the attention from gathering on a few patches.

    Attributes:
        clip: what is kept.
    """

    def __init__(self, settings: ClipSettings, words: Words) -> None:
        super().__init__()
        config = model_config(settings, words)
        vision = {**config["vision_cfg"], "patch_dropout": settings.patch_dropout}
        self.clip = CLIP(**{**config, "vision_cfg": vision})
        self.word_scale = nn.Parameter(torch.tensor(10.0).log())
        self.word_bias = nn.Parameter(torch.tensor(-5.0))
        hidden = 2 * settings.embed_dim
        self.local = nn.Sequential(
            nn.LayerNorm(settings.width),
            nn.Linear(settings.width, hidden),
            nn.GELU(),
            nn.Linear(hidden, settings.embed_dim),
        )
        self._settings, self._family = settings, NativeFamily()
        self._early: Tensor | None = None
        blocks: Any = self.clip.visual.transformer.resblocks
        blocks[min(1, len(blocks) - 1)].ln_1.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, given: tuple[Tensor]) -> None:
        (self._early,) = given

    def loss(
        self, pixels_BCHW: Tensor, caption_BC: Tensor, match_BB: Tensor, word_WC: Tensor, has_BW: Tensor
    ) -> Tensor:
        """The whole loss of a batch, a float32 scalar."""
        settings, device = self._settings, pixels_BCHW.device
        precision = resolve_precision(settings.precision, device)
        # The text tower's, which does not go by `attend`: on a CPU the fused kernel is slow backwards in bfloat16.
        with sdpa_kernel(SDPBackend.MATH), autocast(precision, device):
            features_BST, row_BL = self._family.outputs(self.clip.visual, pixels_BCHW)
            assert self._early is not None
            local_BLT = self.local(self._early[:, 1:])
            text_BT, word_WT = (self.clip.encode_text(ids).float() for ids in (caption_BC, word_WC))
        features_BST, share_BL = features_BST.float(), row_BL.float() / row_BL.float().sum(dim=1, keepdim=True)
        scale = self.clip.logit_scale.exp()
        loss = contrastive_loss(features_BST[:, 0], text_BT, scale, match_BB)
        for patch_BLT, weight in ((features_BST[:, 1:], settings.attended), (local_BLT.float(), settings.local)):
            attended_BT = (share_BL[:, :, None] * patch_BLT).sum(dim=1)
            loss = loss + weight * contrastive_loss(attended_BT, text_BT, scale, match_BB)
        words = word_loss(features_BST[:, 1:], word_WT, self.word_scale.exp(), self.word_bias, has_BW)
        return loss + settings.words * words + settings.peak * peak_loss(share_BL, settings.peak_from)


def read_clip(folder: Path) -> tuple[CLIP, Words]:
    """Both towers and the words of a folder that `train-clip` wrote, ready to encode."""
    described = json.loads((folder / HF_CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
    clip = CLIP(**described)
    load_weights(clip, load_tensors(folder / HF_SAFE_WEIGHTS_NAME), str(folder))
    words = (folder / WORDS_FILE).read_text(encoding="utf-8").split()
    return clip.eval(), Words(words, described["text_cfg"]["context_length"])
