"""Metrics files of the stages, and the table at the end."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stages.layout import METRICS, SUBJECTS


def write_metrics(path: Path, values: dict[str, Any]) -> None:
    """Write a metrics file for DVC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _table() -> Table:
    knn = json.loads((METRICS / "knn.json").read_text())
    probe = json.loads((METRICS / "linear_probe.json").read_text())
    table = Table(title="Accuracy on unseen scenes", title_justify="left", title_style="bold")
    table.add_column("features")
    table.add_column("k-NN", justify="right")
    table.add_column("linear probe", justify="right")
    for name in SUBJECTS.values():
        table.add_row(name, f"{100 * knn[name]:.1f} %", f"{100 * probe[name]:.1f} %")
    return table


if __name__ == "__main__":
    Console().print(_table())
