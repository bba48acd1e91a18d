"""CPU time of a rendered view: this package's renderer against Pillow's, on photographs.

    python -m benchmarks.rendering PHOTOS [--images 200] [--views 8] [--size 224] [--rounds 3]

PHOTOS is a folder of JPEGs. Milliseconds of CPU for a view, one thread: decoding the original (shared by its views),
crop and bicubic resize, JPEG of the view and back. Pillow does the same with its own decoder and resize, and with the
same JPEG library for the views, so that the difference is that of the two renderers. The ways take turns; the best of
some rounds counts. Also the difference of their pixels before JPEG, in grey levels.
"""

from __future__ import annotations

import argparse
import io
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from milan_pipe.config.images import ViewSettings
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.views import View, decode_jpeg, draw_view, encode_jpeg, render_view


def pillow_decode(data: bytes) -> Image.Image:
    """Decode as Pillow does."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def pillow_render(image: Image.Image, view: View, size: int) -> np.ndarray[Any, Any]:
    """Crop, resize and mirror as Pillow does."""
    crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def once(
    files: list[bytes], views: list[list[View]], size: int, decode: Callable[[bytes], Any], render: Callable[..., Any]
) -> dict[str, float]:
    """Seconds of CPU by phase."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for data, drawn in zip(files, views, strict=True):
        began = time.process_time()
        image = decode(data)
        decoded = time.process_time()
        rendered = [render(image, view, size) for view in drawn]
        scaled = time.process_time()
        for pixels in rendered:
            decode_jpeg(encode_jpeg(pixels, 95))
        seconds["decode"] += decoded - began
        seconds["crop and resize"] += scaled - decoded
        seconds["JPEG and back"] += time.process_time() - scaled
    return dict(seconds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    files = [paths[number % len(paths)].read_bytes() for number in range(options.images)]
    settings = ViewSettings(count=options.views, scale=(0.2, 1.0))
    sizes = [decode_pixels(data).shape[:2] for data in files]
    views = [[draw_view(settings, str(n), k, *size) for k in range(options.views)] for n, size in enumerate(sizes)]
    ways = {"Pillow": (pillow_decode, pillow_render), "ours": (decode_pixels, render_view)}
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            found = once(files, views, options.size, *way)
            if name not in best or sum(found.values()) < sum(best[name].values()):
                best[name] = found
    count, phases = options.images * options.views, list(next(iter(best.values())))
    print(f"| ms of CPU a view | {' | '.join(phases)} | in all |\n|{'---|' * (len(phases) + 2)}")
    for name, found in best.items():
        cells = [f"{1000 * found[phase] / count:.2f}" for phase in phases]
        print(f"| {name} | {' | '.join(cells)} | {1000 * sum(found.values()) / count:.2f} |")
    apart = [
        np.abs(
            pillow_render(pillow_decode(d), v[0], options.size).astype(int)
            - render_view(decode_pixels(d), v[0], options.size)
        )
        for d, v in zip(files, views, strict=True)
    ]
    print(f"\nPixels differ by {np.mean(apart):.3f} grey levels on average, by {np.max(apart)} at most.")


if __name__ == "__main__":
    main()
