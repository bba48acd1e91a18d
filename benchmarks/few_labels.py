"""How many labels each student needs: fine-tuning on 1 %, 10 % and 100 % of the scenes' labels, several seeds.

    python -m benchmarks.few_labels WORK [--seeds 0 1 2] [--rows random mae milan hog] [--fractions 0.01 0.1 1]

WORK is the folder of `benchmarks.ablation`, with a run of each row and seed; a seed also chooses which labels are used
and their order. What is there already is not done again. The table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.ablation import ROWS, spread
from milan_pipe import api
from milan_pipe.config.params import load_params
from milan_pipe.config.subjects import RANDOM, UNTRAINED

EPOCHS = {0.01: 100, 0.1: 20, 1.0: 2}
"""100, 240 and 250 steps of 64 images: few labels are learnt by heart sooner."""

TITLES = {RANDOM: UNTRAINED, **{name: row.title for name, row in ROWS.items()}}


def _run(work: Path, row: str, fraction: float, seed: int, overrides: list[str]) -> None:
    result = work / "few" / f"{row}-{fraction:g}-{seed}.json"
    if result.is_file():
        return
    epochs = EPOCHS[fraction]
    recipe = {"epochs": epochs, "eval_every": epochs, "warmup_epochs": epochs / 10, "train_fraction": fraction}
    settings = [f"finetune.{name}={value}" for name, value in {**recipe, "seed": seed}.items()]
    params = load_params(None, [*settings, *overrides])
    checkpoint = row if row == RANDOM else str(work / "runs" / f"{row}-{seed}")
    images = work / "images"
    report = api.finetune(
        checkpoint, str(images / "train-*.tar"), str(images / "test-*.tar"), result.with_suffix(""), params
    )
    result.write_text(json.dumps({"top1": 100 * report.scores["top1"], "seconds": report.seconds}) + "\n")
    print(row, fraction, seed, report.scores, round(report.seconds), flush=True)


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(TITLES), default=[RANDOM, "mae", "milan"])
    parser.add_argument("--fractions", type=float, nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    for fraction in arguments.fractions:
        for seed in arguments.seeds:
            for row in arguments.rows:
                _run(arguments.work, row, fraction, seed, arguments.overrides)
    print("| | " + " | ".join(f"{100 * fraction:g} %" for fraction in EPOCHS) + " |")
    print("|---" * (len(EPOCHS) + 1) + "|")
    for row, title in TITLES.items():
        cells = []
        for fraction in EPOCHS:
            files = sorted((arguments.work / "few").glob(f"{row}-{fraction:g}-[0-9]*.json"))
            cells.append(spread([json.loads(file.read_text())["top1"] for file in files]) if files else "")
        if any(cells):
            print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
