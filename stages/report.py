"""Stage `report`: the page of all results, and their table."""

import json

from rich.console import Console
from rich.table import Table

from milan_pipe import cli
from milan_pipe.cli.console import as_command
from stages.layout import EVALUATIONS, MAE_RUN, METRICS, REPORT, RUN, SEGMENTED, SUBJECTS, TUNED

_COLUMNS = {
    "k-NN": ("knn.json",),
    "linear probe": ("linear_probe.json",),
    "fine-tuned": ("finetune.json",),
    "mIoU, linear head": ("segment_probe.json", "linear"),
    "mIoU, k-NN": ("segment_probe.json", "knn"),
    "mIoU": ("segment.json",),
}


def _scores(file: str, *parts: str) -> dict[str, float]:
    values = json.loads((METRICS / file).read_text())
    for part in parts:
        values = values[part]
    return dict(values)


def _table() -> Table:
    table = Table(title="On unseen scenes", title_justify="left", title_style="bold")
    table.add_column("features")
    values = {title: _scores(*column) for title, column in _COLUMNS.items()}
    for title in values:
        table.add_column(title, justify="right")
    for name in SUBJECTS.values():
        # The teacher is neither fine-tuned nor segmented with.
        table.add_row(name, *(f"{100 * found[name]:.1f} %" if name in found else "-" for found in values.values()))
    return table


if __name__ == "__main__":
    with as_command():
        students = [str(folder) for folder in (RUN, MAE_RUN)]
        transferred = [str(folder) for root in (TUNED, SEGMENTED) for folder in sorted(root.iterdir())]
        extraction = METRICS / "extract_targets.json"
        did_something = json.loads(extraction.read_text())["phases"]
        cli.report(
            [*students, *transferred],
            REPORT,
            evaluations=[str(EVALUATIONS / name) for name in ("knn", "linear-probe", "segment-probe")],
            extraction=extraction if did_something else None,
        )
        Console().print(_table())
