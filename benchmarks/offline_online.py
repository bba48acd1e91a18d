"""Stored targets against a teacher in every step, on the built-in scenes: same student, same number of steps.

    python -m benchmarks.offline_online WORK [--rows 1 4 online ...] [--seeds 0 1 2] [--set section.key=value ...]

Rows are numbers of stored views, and `online`: a teacher in every step on crops of which none is seen twice. For that
row a store with as many views as epochs serves as the source of crops; its features are not read. WORK gets scenes,
stores, runs and one file of results per row and seed; what is there is not done again, so that several processes may
share rows and seeds. At the end the table of all results is printed, and drawn as WORK/offline-online.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.ablation import evaluate, spread
from milan_pipe import api
from milan_pipe.config.params import Params, load_params

SCENES, EPOCHS = 2000, 24
VIEWS = ("1", "2", "4", "8", "16")
ONLINE = "online"
BASE = (f"prepare.train_scenes={SCENES}", f"pretrain.epochs={EPOCHS}", "pretrain.warmup_epochs=3")


def _settings(row: str, overrides: list[str]) -> list[str]:
    own = [f"views.count={EPOCHS}", "pretrain.targets=online"] if row == ONLINE else [f"views.count={row}"]
    return [*BASE, *own, *overrides]


def _extract(work: Path, row: str, params: Params) -> Path:
    """The row's store; the time that it took is kept the first time."""
    targets = work / f"targets-{row}"
    told = work / "results" / f"extraction-{row}.json"
    if not told.is_file():
        report = api.extract_targets(str(work / "images" / "train-*.tar"), targets, params)
        told.parent.mkdir(parents=True, exist_ok=True)
        values = {"seconds": report.seconds, "bytes": report.bytes, "mean_cosine": report.mean_cosine}
        told.write_text(json.dumps(values, indent=2) + "\n")
    return targets


def _run(work: Path, row: str, seed: int, overrides: list[str]) -> None:
    result = work / "results" / f"{row}-{seed}.json"
    if result.is_file():
        return
    params = load_params(None, [*_settings(row, overrides), f"pretrain.seed={seed}", f"masking.seed={seed}"])
    targets = _extract(work, row, params)
    run = work / "runs" / f"{row}-{seed}"
    report = api.pretrain(targets, run, params)
    values = {"loss": report.loss, "seconds": report.seconds, **evaluate(str(run), work / "images", params)}
    result.write_text(json.dumps(values, indent=2) + "\n")
    print(row, seed, values, flush=True)


def _table(work: Path) -> str:
    lines = [
        "| targets | seeds | linear probe, CLS | linear probe, patches | k-NN, CLS | loss | store, MB | extraction, s "
        "| pretraining, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    titles = {
        **{row: f"{row} stored view{'s' if row != '1' else ''}" for row in VIEWS},
        ONLINE: "teacher in every step, fresh crops",
    }
    for row, title in titles.items():
        found = [json.loads(path.read_text()) for path in sorted((work / "results").glob(f"{row}-[0-9]*.json"))]
        if not found:
            continue
        extraction = json.loads((work / "results" / f"extraction-{row}.json").read_text())
        scores = [spread([values[key] for values in found]) for key in ("probe_cls", "probe_mean", "knn_cls")]
        loss = f"{sum(values['loss'] for values in found) / len(found):.4f}"
        stored = ("-", "-") if row == ONLINE else (f"{extraction['bytes'] / 1e6:.0f}", f"{extraction['seconds']:.0f}")
        seconds = spread([values["seconds"] for values in found])
        lines.append(f"| {title} | {len(found)} | {' | '.join(scores)} | {loss} | {' | '.join(stored)} | {seconds} |")
    return "\n".join(lines)


def _draw(work: Path) -> None:
    """The linear probe over the number of stored views, and the online teacher's as a band."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, colour in (("probe_cls", "CLS token", "#0072B2"), ("probe_mean", "mean of patches", "#D55E00")):
        values = {
            row: [json.loads(path.read_text())[key] for path in sorted((work / "results").glob(f"{row}-[0-9]*.json"))]
            for row in (*VIEWS, ONLINE)
        }
        if any(len(found) < 2 for found in values.values()):
            continue
        means = {row: statistics.mean(found) for row, found in values.items()}
        errors = {row: statistics.stdev(found) for row, found in values.items()}
        axes.errorbar(
            [int(row) for row in VIEWS],
            [means[row] for row in VIEWS],
            [errors[row] for row in VIEWS],
            marker="o", capsize=3, color=colour, label=f"stored views, {label}",
        )  # fmt: skip
        low, high = means[ONLINE] - errors[ONLINE], means[ONLINE] + errors[ONLINE]
        axes.axhspan(low, high, color=colour, alpha=0.15, label=f"teacher in every step, {label}")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(row) for row in VIEWS], VIEWS)
    axes.set_xlabel("stored views of each image")
    axes.set_ylabel("linear probe, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "milan-pipe"}):
        figure.savefig(work / "offline-online.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rows = [*VIEWS, ONLINE]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    work: Path = arguments.work
    if not (work / "images" / "index.json").is_file():
        api.prepare("demo", work / "images", load_params(None, [*BASE, *arguments.overrides]))
    for row in arguments.rows:
        for seed in arguments.seeds:
            _run(work, row, seed, arguments.overrides)
    print(_table(work))
    _draw(work)


if __name__ == "__main__":
    main()
