"""One sample to its rendered views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milan_pipe.data.images import Sample, decode_image
from milan_pipe.data.views import View, ViewConfig, decode_jpeg, draw_view, encode_jpeg, render_view


@dataclass(frozen=True, kw_only=True)
class RenderedSample:
    """One sample and its K views.

    Attributes:
        jpegs: K stored views.
        pixels_KHWC: uint8, the stored views decoded again: what the teacher sees and the student will see.
        views: K crop boxes and flips.
    """

    key: str
    label: int
    jpegs: tuple[bytes, ...]
    pixels_KHWC: NDArray[np.uint8]
    views: tuple[View, ...]


def render_sample(sample: Sample, config: ViewConfig, size: int) -> RenderedSample:
    """Decode a picture once and render its K views at `size` pixels.

    Raises:
        DataError: the picture cannot be read.
    """
    image = decode_image(sample.data)
    views = tuple(draw_view(config, sample.key, index, image.height, image.width) for index in range(config.count))
    jpegs = tuple(encode_jpeg(render_view(image, view, size), config.jpeg_quality) for view in views)
    return RenderedSample(
        key=sample.key,
        label=sample.label,
        jpegs=jpegs,
        pixels_KHWC=np.stack([decode_jpeg(jpeg) for jpeg in jpegs]),
        views=views,
    )
