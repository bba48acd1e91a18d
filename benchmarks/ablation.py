"""The method's parts, one by one, on the built-in scenes: same data, same budget, several seeds.

    python -m benchmarks.ablation WORK [--seeds 0 1 2] [--rows mae milan ...] [--set section.key=value ...]

WORK gets the scenes, one target store, one run and one file of results per row and seed; what is there already is not
done again, so that several processes may share the rows and seeds. The table of all results is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from milan_pipe import api
from milan_pipe.config.evaluation import Pool
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.subjects import BOUNDS, RANDOM, TEACHER
from milan_pipe.evaluation.backbone import pooled
from milan_pipe.evaluation.features import LabelledFeatures, embed_shards
from milan_pipe.evaluation.frozen import subject_of
from milan_pipe.evaluation.knn import knn_accuracy
from milan_pipe.evaluation.linear_probe import linear_probe_accuracy

# A recipe by its name, or settings. Targets without a teacher have a learning rate of their own: docs/results.md.
ROWS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "hog": ("HOG + plain + random (MaskFeat's target)", "maskfeat", ()),
    "mae": ("pixels + plain + random (MAE)", "mae", ()),
    "clip-plain": ("CLIP + plain + random", None, ("decoder.kind=plain", "masking.kind=random")),
    "clip-prompting": ("CLIP + prompting + random", None, ("masking.kind=random",)),
    "milan": ("CLIP + prompting + semantic (MILAN)", None, ()),
    "unmasked-teacher": ("CLIP of what is seen, no decoder (unmasked teacher)", "unmasked-teacher", ()),
    "mr-mae": ("CLIP of what is seen, pixels of the rest (MR-MAE)", "mr-mae", ()),
    "maskdistill": ("normalised CLIP of 40 % in blocks (MaskDistill)", "maskdistill", ()),
    "dense": ("CLIP of all tokens, nothing masked (dense)", "dense", ()),
}
POOLS: tuple[Pool, ...] = ("cls", "mean")


def evaluate(checkpoint: str, images: Path, params: Params) -> dict[str, float]:
    """k-NN (best k) and linear probe in per cent, by pooled token."""
    subject = subject_of(checkpoint, params)

    def embed(pixels_BHWC: Tensor) -> Tensor:
        tokens_BSD = subject.tokens(pixels_BHWC)
        return torch.cat([pooled(tokens_BSD, pool, subject.layout) for pool in POOLS], dim=1)

    shards = [str(images / f"{split}-*.tar") for split in ("train", "test")]
    sets = [embed_shards(each, embed, subject.size, params.embed) for each in shards]
    results = {}
    for position, pool in enumerate(POOLS):
        train, test = (
            LabelledFeatures(features_NF=s.features_NF.chunk(2, dim=1)[position].contiguous(), label_N=s.label_N)
            for s in sets
        )
        results[f"knn_{pool}"] = 100 * max(knn_accuracy(train, test, params.knn).values())
        results[f"probe_{pool}"] = 100 * linear_probe_accuracy(train, test, params.linear_probe).accuracy
    return results


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in words."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def do_row(
    work: Path, row: str, seed: int, overrides: list[str], judge: Callable[[str, int, Params], dict[str, float]]
) -> None:
    """Train one row with one seed, and keep what `judge` finds of its checkpoint, unless that is there."""
    result = work / "results" / f"{row}-{seed}.json"
    if result.is_file():
        return
    _, recipe, settings = ROWS.get(row, ("", None, ()))
    params = load_params(recipe, [*overrides, f"pretrain.seed={seed}", f"masking.seed={seed}", *settings])
    values: dict[str, float] = {}
    checkpoint = row
    if row in ROWS:
        checkpoint = str(work / "runs" / f"{row}-{seed}")
        report = api.pretrain(work / "targets", checkpoint, params)
        values = {"loss": report.loss, "seconds": report.seconds}
    values |= judge(checkpoint, seed, params)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(values, indent=2) + "\n")
    print(row, seed, values, flush=True)


def _table(work: Path) -> str:
    keys = [f"{kind}_{pool}" for kind in ("knn", "probe") for pool in POOLS]
    lines = [
        "| | seeds | k-NN, CLS | k-NN, patches | linear probe, CLS | linear probe, patches |",
        "|---|---|---|---|---|---|",
    ]
    titles = {RANDOM: BOUNDS[RANDOM], **{row: title for row, (title, *_) in ROWS.items()}, TEACHER: BOUNDS[TEACHER]}
    for row, title in titles.items():
        found = [json.loads(path.read_text()) for path in sorted((work / "results").glob(f"{row}-[0-9]*.json"))]
        if found:
            cells = [spread([values[key] for values in found]) for key in keys]
            lines.append(f"| {title} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=[*BOUNDS, *ROWS], default=[*BOUNDS, *ROWS])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    work: Path = arguments.work
    base = load_params(None, arguments.overrides)
    if not (work / "images" / "index.json").is_file():
        api.prepare("demo", work / "images", base)
    api.extract_targets(str(work / "images" / "train-*.tar"), work / "targets", base)

    def judge(checkpoint: str, _: int, params: Params) -> dict[str, float]:
        return evaluate(checkpoint, work / "images", params)

    for seed in arguments.seeds:
        for row in arguments.rows:
            # The teacher has no seed.
            if row != TEACHER or seed == arguments.seeds[0]:
                do_row(work, row, seed, arguments.overrides, judge)
    print(_table(work))


if __name__ == "__main__":
    main()
