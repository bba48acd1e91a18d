"""The method's parts and other objectives, row by row, on the built-in scenes: same data, same budget, several seeds.

    python -m benchmarks.ablation WORK [--seeds 0 1 2] [--rows mae milan ...] [--second TEACHER] [--set key=value ...]

WORK gets the scenes, one target store (and, of the teacher --second, a folder that `train-clip` wrote, one of the same
views), one run and one file of results per row and seed; what is there already is not done again, so that several
processes may share the rows and seeds. The table of all results is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """A student: its title, a recipe by name, settings, whether it learns from both stores, the row it begins with."""

    title: str
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    two: bool = False
    begins_with: str | None = None


# Targets without a teacher have a learning rate of their own: docs/results.md.
ROWS = {
    "hog": Row(title="HOG + plain + random (MaskFeat's target)", recipe="maskfeat"),
    "mae": Row(title="pixels + plain + random (MAE)", recipe="mae"),
    "clip-plain": Row(title="CLIP + plain + random", settings=("decoder.kind=plain", "masking.kind=random")),
    "clip-prompting": Row(title="CLIP + prompting + random", settings=("masking.kind=random",)),
    "milan": Row(title="CLIP + prompting + semantic (MILAN)"),
    "unmasked-teacher": Row(title="CLIP of what is seen, no decoder (unmasked teacher)", recipe="unmasked-teacher"),
    "mr-mae": Row(title="CLIP of what is seen, pixels of the rest (MR-MAE)", recipe="mr-mae"),
    "maskdistill": Row(title="normalised CLIP of 40 % in blocks (MaskDistill)", recipe="maskdistill"),
    "dense": Row(title="CLIP of all tokens, nothing masked (dense)", recipe="dense"),
    "two-teachers": Row(title="MILAN of two teachers", two=True),
    "phi-s": Row(title="the same, by PHI-S", settings=("teachers.standardise=phi-s",), two=True),
    "twice": Row(title="MILAN, 12 epochs", settings=("pretrain.epochs=12",)),
    "continued": Row(title="MILAN, 6 epochs more of the 6-epoch student", begins_with="milan"),
}
POOLS: tuple[Pool, ...] = ("cls", "mean")
SECOND = "targets-second"


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
    chosen = ROWS.get(row, Row(title=row))
    seeds = (f"pretrain.seed={seed}", f"masking.seed={seed}")
    init = () if chosen.begins_with is None else (f"student.init={work / 'runs' / f'{chosen.begins_with}-{seed}'}",)
    params = load_params(chosen.recipe, [*overrides, *seeds, *chosen.settings, *init])
    values: dict[str, float] = {}
    checkpoint = row
    if row in ROWS:
        checkpoint = str(work / "runs" / f"{row}-{seed}")
        stores = [work / "targets", *([work / SECOND] if chosen.two else [])]
        report = api.pretrain(stores, checkpoint, params)
        values = {"loss": report.loss, "seconds": report.seconds}
    values |= judge(checkpoint, seed, params)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(values, indent=2) + "\n")
    print(row, seed, values, flush=True)


def _table(work: Path) -> str:
    columns = {
        "knn_cls": "k-NN, CLS",
        "knn_mean": "k-NN, patches",
        "probe_cls": "linear probe, CLS",
        "probe_mean": "linear probe, patches",
        "miou_linear": "mIoU, linear head",
        "miou_knn": "mIoU, k-NN",
    }
    lines = [f"| | seeds | {' | '.join(columns.values())} |", "|---" * (2 + len(columns)) + "|"]
    titles = {RANDOM: BOUNDS[RANDOM], **{name: row.title for name, row in ROWS.items()}, TEACHER: BOUNDS[TEACHER]}
    for row, title in titles.items():
        found = [json.loads(path.read_text()) for path in sorted((work / "results").glob(f"{row}-[0-9]*.json"))]
        if found:
            cells = [spread([values[key] for values in found if key in values] or [math.nan]) for key in columns]
            lines.append(f"| {title} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=[*BOUNDS, *ROWS], default=[*BOUNDS, *ROWS])
    parser.add_argument("--second", type=Path, help="a folder of `train-clip`; for the rows of two teachers")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    work: Path = arguments.work
    base = load_params(None, arguments.overrides)
    if not (work / "images" / "index.json").is_file():
        api.prepare("demo", work / "images", base)
    api.extract_targets(str(work / "images" / "train-*.tar"), work / "targets", base)

    if arguments.second is not None:
        folder = f"teacher.model=local-dir:{arguments.second.absolute()}"
        second = load_params(None, [*arguments.overrides, folder])
        api.extract_targets(None, work / SECOND, second, views_from=work / "targets")

    def judge(checkpoint: str, _: int, params: Params) -> dict[str, float]:
        images = work / "images"
        found = api.segment_probe(checkpoint, str(images / "train-*.tar"), str(images / "test-*.tar"), params)
        heads = {f"miou_{name}": 100 * scores.miou for name, scores in found.heads.items()}
        return {**evaluate(checkpoint, images, params), **heads}

    for seed in arguments.seeds:
        for row in arguments.rows:
            if row in ROWS and ROWS[row].two and not (work / SECOND).is_dir():
                print(f"{row}: no second store; name its teacher with --second", flush=True)
                continue
            # The teacher has no seed.
            if row != TEACHER or seed == arguments.seeds[0]:
                do_row(work, row, seed, arguments.overrides, judge)
    print(_table(work))


if __name__ == "__main__":
    main()
