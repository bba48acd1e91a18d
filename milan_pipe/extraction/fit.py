"""A few images of the data, rendered to be measured with, or to fit a codec to the teacher's features of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from milan_pipe.config.images import ImageSettings, ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.errors import DataError
from milan_pipe.extraction.render import Clock, RenderedSample, decode_stored, render_sample, stored_samples
from milan_pipe.extraction.stored import Images, StoredShard
from milan_pipe.images.count import spread_evenly
from milan_pipe.images.tar import OnBad, read_shard
from milan_pipe.teacher.clip import Teacher, require_sound

MOST_SHARDS = 16


def draw_images(
    shards: Sequence[Images],
    views: ViewSettings,
    size: int,
    limits: ImageSettings,
    count: int,
    clock: Clock,
    on_bad: OnBad = lambda *_: None,
    most_shards: int = MOST_SHARDS,
) -> Iterator[tuple[Images, RenderedSample]]:
    """Up to `count` images with one view each, the first of shards that are spread evenly.

    Args:
        size: rendered side in pixels.
        on_bad: called with key and reason of each image that cannot be read.

    Raises:
        DataError, MissingError, StoreError: a shard cannot be read.
    """
    used, drawn = spread_evenly(shards, most_shards), 0
    for position, shard in enumerate(used):
        samples = _first_views(shard, views, size, limits, clock, on_bad)
        # A shard with few images leaves its share to the next.
        while drawn < count * (position + 1) // len(used) and (rendered := next(samples, None)):
            drawn += 1
            yield shard, rendered


def _first_views(
    shard: Images, views: ViewSettings, size: int, limits: ImageSettings, clock: Clock, on_bad: OnBad
) -> Iterator[RenderedSample]:
    if isinstance(shard, StoredShard):
        for stored in stored_samples(shard, clock, most=1):
            yield decode_stored(stored, size, clock)
        return
    for sample in read_shard(shard, on_bad):
        try:
            rendered = render_sample(sample, views, size, limits, clock, most=1)
        except DataError as error:
            on_bad(sample.key, str(error))
        else:
            yield rendered


def sample_features(teacher: Teacher, shards: Sequence[Images], params: Params) -> Tensor:
    """Features (`codec.fit_samples`, S, T), on the CPU, of images from up to 16 shards.

    Raises:
        DataError: no image can be read, or the teacher's output for one cannot be stored.
    """
    names, pixels = [], []
    size, count = params.student.image_size, params.codec.fit_samples
    for shard, rendered in draw_images(shards, params.views, size, params.images, count, Clock()):
        names.append(f"{shard}: {rendered.key}")
        pixels.append(torch.from_numpy(rendered.pixels_KHWC[0]))
    if not pixels:
        others = min(MOST_SHARDS, len(shards)) - 1
        looked_at = f"{shards[0]} and {others} more of {len(shards)} shards have" if others else f"{shards[0]} has"
        raise DataError(
            f"{looked_at} no readable image to fit codec {params.codec.name} to; repair the images, or use codec int8"
        )
    features, faults = [], []
    for batch in torch.split(torch.stack(pixels), params.extract.batch_size):
        output = teacher(batch)
        features.append(output.features_BST.cpu())
        faults.append(output.faults_BF().cpu())
    require_sound(torch.cat(faults), names)
    return torch.cat(features)
