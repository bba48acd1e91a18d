"""Commands that train: progress while they run, and rows of their report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from milan_pipe.cli.console import console, plain, progress, show


def run_training(
    command: Callable[..., Any],
    *arguments: object,
    title: str,
    rows: Callable[[Any], dict[str, str]],
    as_json: bool,
    known: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Run a function of the API that trains; the first rank shows its progress and a table of `rows`.

    Args:
        known: rows that are known before it begins, and are shown then as well.
    """
    from milan_pipe.training.distributed import rank_of_environment
    from milan_pipe.training.recorder import TrainProgress

    if rank_of_environment():
        return command(*arguments)
    for name, value in known.items():
        console.print(plain(f"{name} {value}"), soft_wrap=True)
    with progress("epoch", "loss", "lr", "images_per_second", "data_wait", "memory", "score") as update:

        def on_progress(now: TrainProgress) -> None:
            update(
                now.step,
                now.steps,
                epoch=now.epoch + 1,
                loss=now.loss,
                lr=now.lr,
                images_per_second=now.images_per_second,
                data_wait=now.data_wait,
                memory=now.memory,
                score=now.score,
            )

        report = command(*arguments, on_progress=on_progress)
    return show(title, {**rows(report), **known}, report, as_json)


def training_rows(report: Any) -> dict[str, str]:
    """Rows of a `RunReport` that every command that trains has."""
    return {
        "steps": f"{report.steps} in {report.epochs} epochs"
        + (f", {report.seconds:.0f} s" if report.steps_now else ": finished before, nothing was done")
        + (f", gone on from step {report.resumed_from}" if report.resumed_from and report.steps_now else ""),
        "loss": f"{report.loss:.4f}, mean of the last epoch",
        "speed": f"{report.images_per_second:.0f} images a second, {100 * report.data_wait:.1f} % waiting for data",
        "checkpoint": report.checkpoint,
    }


def scored_rows(report: Any, names: dict[str, str]) -> dict[str, str]:
    """Rows of a `RunReport` with scores; `names` are their titles."""
    last, best = report.scores, report.best
    return {
        **{title: f"{100 * last[name]:.2f} %, best {100 * best[name]:.2f} %" for name, title in names.items()},
        **training_rows(report),
        "skipped": f"{report.bad} images",
        "best": f"{report.best_checkpoint}, of step {report.best_step}",
    }
