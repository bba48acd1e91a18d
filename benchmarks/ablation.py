"""The method's parts, one by one, on the built-in scenes: same data, same budget, several seeds.

    python -m benchmarks.ablation WORK [--seeds 0 1 2] [--set section.key=value ...]

WORK gets the scenes, one target store and one run per row and seed; what is there already is not done again. The
rows are printed as a Markdown table and written to WORK/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from milan_pipe import commands
from milan_pipe.config import Params, load_params
from milan_pipe.evaluate import RANDOM, TEACHER, Subject, subject_of
from milan_pipe.transfer.features import LabelledFeatures, embed_shards
from milan_pipe.transfer.knn import knn_accuracy
from milan_pipe.transfer.linear_probe import linear_probe_accuracy

ROWS = {
    "pixels + plain + random (MAE)": ("target=pixels", "decoder.kind=plain", "masking.kind=random"),
    "CLIP + plain + random": ("target=clip", "decoder.kind=plain", "masking.kind=random"),
    "CLIP + prompting + random": ("target=clip", "decoder.kind=prompting", "masking.kind=random"),
    "CLIP + prompting + semantic (MILAN)": ("target=clip", "decoder.kind=prompting", "masking.kind=semantic"),
}
POOLS = ("cls", "mean")


def _subject(checkpoint: str, params: Params, pool: str) -> Subject:
    return subject_of(
        checkpoint,
        student=params.student,
        teacher=params.teacher,
        embed=params.embed.model_copy(update={"pool": pool}),
        device=params.pretrain.device,
        seed=params.pretrain.seed,
    )


def evaluate(checkpoint: str, images: Path, params: Params) -> dict[str, float]:
    """k-NN (best k) and linear probe in per cent, by pooled token."""
    subjects = [_subject(checkpoint, params, pool) for pool in POOLS]

    def embed(pixels_BHWC: Tensor) -> Tensor:
        return torch.cat([subject.embed(pixels_BHWC) for subject in subjects], dim=1)

    size = subjects[0].size
    sets = [embed_shards(str(images / f"{split}-*.tar"), embed, size, params.embed) for split in ("train", "test")]
    results = {}
    for position, pool in enumerate(POOLS):
        train, test = (
            LabelledFeatures(features_NF=s.features_NF.chunk(2, dim=1)[position].contiguous(), label_N=s.label_N)
            for s in sets
        )
        results[f"knn_{pool}"] = 100 * max(knn_accuracy(train, test, params.knn).values())
        results[f"probe_{pool}"] = 100 * linear_probe_accuracy(train, test, params.linear_probe).accuracy
    return results


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run all rows that are not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    work: Path = arguments.work
    base = load_params(None, arguments.overrides)
    images, targets, record = work / "images", work / "targets", work / "ablation.json"
    if not (images / "index.json").is_file():
        commands.prepare("demo", images, base)
    commands.extract_targets(str(images / "train-*.tar"), targets, base)

    results: dict[str, dict[str, dict[str, float]]] = json.loads(record.read_text()) if record.is_file() else {}
    if TEACHER not in results:
        results[TEACHER] = {"0": evaluate(TEACHER, images, base)}
    for seed in arguments.seeds:
        fixed = [f"pretrain.seed={seed}", f"masking.seed={seed}"]
        untrained = load_params(None, [*arguments.overrides, *fixed])
        if str(seed) not in results.setdefault(RANDOM, {}):
            results[RANDOM][str(seed)] = evaluate(RANDOM, images, untrained)
        for name, settings in ROWS.items():
            if str(seed) in results.setdefault(name, {}):
                continue
            params = load_params(None, [*arguments.overrides, *fixed, *settings])
            run = work / "runs" / f"{len(name)}-{seed}"
            report = commands.pretrain(targets, run, params)
            row = evaluate(str(run), images, params)
            results[name][str(seed)] = {**row, "seconds": report.seconds}
            record.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{name}, seed {seed}: {row}", flush=True)
    record.write_text(json.dumps(results, indent=2) + "\n")

    keys = [f"{kind}_{pool}" for kind in ("knn", "probe") for pool in POOLS]
    print("| | k-NN, CLS | k-NN, patches | linear probe, CLS | linear probe, patches |")
    print("|---|---|---|---|---|")
    for name in [RANDOM, *ROWS, TEACHER]:
        cells = [_spread([seed[key] for seed in results[name].values()]) for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
