"""Features of a sample of the data, for codecs that are fitted to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milan_pipe.config.images import ViewSettings
from milan_pipe.errors import DataError
from milan_pipe.extraction.render import Clock, render_sample
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.tar import read_shard
from milan_pipe.teacher.clip import Teacher, require_sound

_MOST_SHARDS = 16


def sample_features(
    teacher: Teacher, shards: Sequence[ShardFile], views: ViewSettings, size: int, batch_size: int, count: int
) -> Tensor:
    """Features (count, S, T), on the CPU, of the first view of images from up to 16 shards, spread evenly.

    Raises:
        DataError: no image can be read, or the teacher's output for one is not fit to be stored.
    """
    used = [shards[i * len(shards) // min(_MOST_SHARDS, len(shards))] for i in range(min(_MOST_SHARDS, len(shards)))]
    one = views.model_copy(update={"count": 1})
    clock = Clock()
    names, pixels = [], []
    for position, shard in enumerate(used):
        wanted = count * (position + 1) // len(used) - count * position // len(used)
        for key, view in islice(_rendered(shard, one, size, clock), wanted):
            names.append(f"{shard}: {key}")
            pixels.append(torch.from_numpy(view))
    if not pixels:
        raise DataError(f"{shards[0]} and {len(used) - 1} other shards have no readable image to fit the codec on")
    features, faults = [], []
    for batch in torch.split(torch.stack(pixels), batch_size):
        output = teacher(batch)
        features.append(output.features_BST.cpu())
        faults.append(output.faults_BF().cpu())
    require_sound(torch.cat(faults), names)
    return torch.cat(features)


def _rendered(
    shard: ShardFile, views: ViewSettings, size: int, clock: Clock
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for sample in read_shard(shard, lambda *_: None):
        try:
            yield sample.key, render_sample(sample, views, size, clock).pixels_KHWC[0]
        # Reported when the shard is extracted.
        except DataError:
            continue
