"""Word tokenizer for scene captions: one token per word, a closed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from milan_pipe.errors import DataError
from milan_pipe.images.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES

CONTEXT_LENGTH = 12
_WORDS = ("a", "on", "background", *SIZES, *COLOURS, *BACKGROUNDS, *SHAPES)
_IDS = {word: 1 + position for position, word in enumerate(_WORDS)}
# The text tower reads its output at the largest id of a row, so the end token must be the last of the vocabulary.
END_TOKEN = 1 + len(_WORDS)
VOCABULARY_SIZE = END_TOKEN + 1


def tokenize(captions: Sequence[str]) -> Tensor:
    """Turn captions into ids.

    Returns:
        (len(captions), 12) int64; 0 pads, `END_TOKEN` closes each caption.

    Raises:
        DataError: a word is not in the vocabulary of scenes, or a caption is longer than 11 words.
    """
    ids = torch.zeros(len(captions), CONTEXT_LENGTH, dtype=torch.int64)
    for row, caption in enumerate(captions):
        words = caption.lower().split()
        unknown = [word for word in words if word not in _IDS]
        if unknown or len(words) >= CONTEXT_LENGTH:
            raise DataError(
                f"the scenes' text tower reads at most {CONTEXT_LENGTH - 1} of its {len(_WORDS)} words, "
                f"found {caption!r}" + (f" with unknown {', '.join(unknown)}" if unknown else "")
            )
        ids[row, : len(words) + 1] = torch.tensor([*(_IDS[word] for word in words), END_TOKEN])
    return ids
