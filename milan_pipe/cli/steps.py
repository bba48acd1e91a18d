"""What all commands that train say while they do, and after it."""

from __future__ import annotations

from typing import Any

from milan_pipe.units import size


def show_training(update: Any) -> Any:
    """A listener of `TrainProgress` that shows it with `update`, which is what `console.progress` gives."""
    from milan_pipe.training.recorder import TrainProgress

    def on_progress(now: TrainProgress) -> None:
        update(
            now.step,
            now.steps,
            epoch=f"ep {now.epoch + 1}",
            loss=f"loss {now.loss:.3f}",
            lr=f"lr {now.lr:.0e}".replace("e-0", "e-"),
            rate=f"{now.images_per_second:.0f}/s",
            wait=f"wait {100 * now.data_wait:.0f} %",
            memory=size(now.memory),
        )

    return on_progress


def training_rows(report: Any) -> dict[str, str]:
    """What a `RunReport` says beside its scores, line by line."""
    return {
        "steps": str(report.steps)
        + (f" in {report.seconds:.0f} s" if report.steps_now else ": finished before, nothing was done")
        + (f", gone on from step {report.resumed_from}" if report.resumed_from and report.steps_now else ""),
        "loss": f"{report.loss:.4f}, mean of the last epoch",
        "speed": f"{report.images_per_second:.0f} images a second, {100 * report.data_wait:.1f} % waiting for data",
        "skipped": f"{report.bad} images",
        "checkpoint": report.checkpoint,
        "best": f"{report.best_checkpoint}, of step {report.best_step}",
    }
