"""What each codec takes, loses and costs: bytes, cosine, speed, and the student that learns from its store.

    python -m benchmarks.codecs WORK [--seeds 0 1 2] [--rows float16 int8 klt-0.999 ...] [--set section.key=value ...]

WORK gets the built-in scenes, one target store per row, and one run and one file of results per row and seed; what is
there already is not done again. Bits a dimension are those of the files of codes and scales of the whole store; the
cosine is that of every token of some thousand stored views with the teacher's own output for them, in float32; encode
and decode run on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation import POOLS, evaluate, spread
from milan_pipe import api
from milan_pipe.config.params import Params, load_params
from milan_pipe.images.views import decode_jpeg
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets.codec import Codec, codec_of
from milan_pipe.targets.store import TargetStore, open_targets
from milan_pipe.teacher.clip import load_teacher

ROWS = {
    "float16": ("codec.name=float16",),
    "int8": ("codec.name=int8",),
    "klt-0.9999": ("codec.name=klt", "codec.quality=0.9999"),
    "klt-0.999": ("codec.name=klt", "codec.quality=0.999"),
    "klt-0.99": ("codec.name=klt", "codec.quality=0.99"),
}
VIEWS, PASSES = 2000, 5


def _params(overrides: list[str], row: str, seed: int = 0) -> Params:
    return load_params(None, [*overrides, f"pretrain.seed={seed}", f"masking.seed={seed}", *ROWS[row]])


def _views_per_second(work: Callable[[], Any], views: int) -> float:
    best = float("inf")
    for _ in range(PASSES):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return views / best


def _stored(store: TargetStore) -> tuple[list[np.ndarray[Any, Any]], Tensor, Tensor | None]:
    """Images, codes and scales of the last shard, which klt was hardly fitted to."""
    name = store.shards[-1]
    runs = [store.read(name, view, 0, store.samples(name)) for view in range(store.header.views.count)]
    images = [decode_jpeg(jpeg) for run in runs for jpeg in run.jpegs][:VIEWS]
    code = torch.from_numpy(np.concatenate([run.code_NST for run in runs])[:VIEWS])
    scales = [run.scale_NS for run in runs if run.scale_NS is not None]
    return images, code, torch.from_numpy(np.concatenate(scales)[:VIEWS]) if scales else None


def _bits(store: TargetStore) -> float:
    arrays = ("features/c/", "scale/c/")
    sizes = store.location.sizes()
    size = sum(size for path, size in sizes.items() if path.partition("/")[2].startswith(arrays))
    tokens = sum(store.samples(name) for name in store.shards) * store.header.views.count * store.header.tokens
    return 8 * size / (tokens * store.header.teacher.width)


def fidelity(work: Path, row: str, params: Params) -> dict[str, float]:
    """Bits, cosines and speeds of a row."""
    store = open_targets(work / f"targets-{row}")
    images, code, scale = _stored(store)
    teacher = load_teacher(params.teacher, torch.device("cpu"), grid=grid_of(params.student))
    truth = torch.cat(
        [teacher(torch.from_numpy(np.stack(images[at : at + 64]))).features_BST for at in range(0, len(images), 64)]
    )
    codec: Codec = codec_of(store.header.codec)
    cosine = torch.nn.functional.cosine_similarity(truth.double(), codec.decode(code, scale).double(), dim=-1).ravel()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speeds = {
        "encode": _views_per_second(lambda: codec.encode(truth), len(truth)),
        "decode": _views_per_second(lambda: codec.decode(code, scale), len(truth)),
    }
    torch.set_num_threads(threads)
    views = sum(map(store.samples, store.shards)) * store.header.views.count
    return {
        "bits": _bits(store),
        "bytes_per_view": sum(store.location.sizes().values()) / views,
        "mean_cosine": float(cosine.mean()),
        "p1_cosine": float(cosine.kthvalue(max(1, len(cosine) // 100)).values),
        **speeds,
    }


def _once(result: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not result.is_file():
        values = make()
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(values, indent=2) + "\n")
        print(result.stem, values, flush=True)
    found: dict[str, float] = json.loads(result.read_text())
    return found


def _student(work: Path, row: str, seed: int, overrides: list[str]) -> dict[str, float]:
    params = _params(overrides, row, seed)
    run = str(work / "runs" / f"{row}-{seed}")
    report = api.pretrain(work / f"targets-{row}", run, params)
    return {"loss": report.loss, "seconds": report.seconds, **evaluate(run, work / "images", params)}


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    work: Path = arguments.work
    if not (work / "images" / "index.json").is_file():
        api.prepare("demo", work / "images", load_params(None, arguments.overrides))
    told, learnt = {}, {}
    for row in arguments.rows:
        params = _params(arguments.overrides, row)
        api.extract_targets(str(work / "images" / "train-*.tar"), work / f"targets-{row}", params)
        told[row] = _once(work / "results" / f"{row}.json", lambda row=row, params=params: fidelity(work, row, params))  # type: ignore[misc]
    for seed in arguments.seeds:
        for row in arguments.rows:
            result = work / "results" / f"{row}-{seed}.json"
            values = _once(result, lambda row=row, seed=seed: _student(work, row, seed, arguments.overrides))  # type: ignore[misc]
            learnt.setdefault(row, []).append(values)
    titles = ("codec", "bits a dimension", "bytes a view", "mean cosine", "1st percentile", "encode, views/s")
    print(f"| {' | '.join((*titles, 'decode, views/s', 'probe, CLS', 'probe, patches'))} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row, values in told.items():
        probes = [spread([one[f"probe_{pool}"] for one in learnt[row]]) if row in learnt else "" for pool in POOLS]
        cells = [f"{values['bits']:.2f}", f"{values['bytes_per_view']:,.0f}", f"{values['mean_cosine']:.7f}"]
        cells += [f"{values['p1_cosine']:.6f}", f"{values['encode']:,.0f}", f"{values['decode']:,.0f}", *probes]
        print(f"| {' | '.join([row, *cells])} |")


if __name__ == "__main__":
    main()
