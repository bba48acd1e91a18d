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


_COLUMNS = {
    "k-NN": "knn.json",
    "linear probe": "linear_probe.json",
    "fine-tuned": "finetune.json",
    "mIoU": "segment.json",
}


def _table() -> Table:
    table = Table(title="On unseen scenes", title_justify="left", title_style="bold")
    table.add_column("features")
    values = {title: json.loads((METRICS / file).read_text()) for title, file in _COLUMNS.items()}
    for title in values:
        table.add_column(title, justify="right")
    for name in SUBJECTS.values():
        # The teacher is neither fine-tuned nor segmented with.
        table.add_row(name, *(f"{100 * found[name]:.1f} %" if name in found else "-" for found in values.values()))
    return table


if __name__ == "__main__":
    Console().print(_table())
