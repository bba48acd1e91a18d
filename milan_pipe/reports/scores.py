"""Scores of all students side by side, each with the command that made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from milan_pipe.config.subjects import BOUNDS, TEACHER, UNTRAINED
from milan_pipe.evaluation.results import Evaluation
from milan_pipe.reports.runs import PRETRAIN, RunRecord

# The columns: title, task, and the score of it.
_COLUMNS = (
    ("k-NN", "knn", "best"),
    ("linear probe, quick", "linear-probe --quick", "accuracy"),
    ("linear probe", "linear-probe", "top1"),
    ("fine-tuned", "finetune", "top1"),
    ("mIoU, linear head", "segment-probe", "linear_miou"),
    ("mIoU, k-NN", "segment-probe", "knn_miou"),
    ("mIoU", "segment", "miou"),
)
_TITLES = [title for title, _, _ in _COLUMNS]


class Score(NamedTuple):
    """One number of the table: a share between 0 and 1."""

    value: float
    command: str
    all_scores: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is printed in one cell; `best` among the students."""

    text: str
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a page.

    Attributes:
        text: whether cells are words rather than numbers.
        shares: of a table of scores: by column, the best score of each row that has one, 0 to 1.
        commands: of a table of scores: (student, column, command, all scores).
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text: bool = False
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    commands: Sequence[tuple[str, str, str, str]] = ()


def _gather(
    runs: Sequence[RunRecord], evaluations: Iterable[Evaluation]
) -> tuple[dict[str, dict[tuple[str, str], list[Score]]], dict[str, str]]:
    """Scores by student and (title, data), students in the order of the table, and their names."""
    names: dict[str, str] = {}
    for run in runs:
        if run.task == PRETRAIN:
            names[run.identity] = f"{names[run.identity]}, {run.name}" if run.identity in names else run.name
    found: dict[str, dict[tuple[str, str], list[Score]]] = {identity: {} for identity in names}

    def add(identity: str, subject: str, task: str, data: str, scores: Mapping[str, Any], command: str) -> None:
        names.setdefault(identity, BOUNDS.get(subject, subject))
        shown = (f"{name} {value:.4g}" for name, value in scores.items() if isinstance(value, int | float))
        all_scores = ", ".join(shown)
        for title, of, score in _COLUMNS:
            if of == task and score in scores:
                same = found.setdefault(identity, {}).setdefault((title, data), [])
                if (one := Score(float(scores[score]), command, all_scores)) not in same:
                    same.append(one)

    for one in [*evaluations, *(one for run in runs for one in run.evaluations)]:
        task = "linear-probe --quick" if one.task == "linear-probe" else one.task
        add(one.identity, one.subject, task, one.data, one.scores, one.command)
    for run in runs:
        scores, record = run.report.get("scores"), run.record
        if run.task != PRETRAIN and isinstance(scores, dict):
            scores = {name: value for name, value in scores.items() if isinstance(value, float)}
            data, command = (str(record.get(name, "")) for name in ("data", "command"))
            add(run.identity, str(record.get("backbone", run.name)), run.task, data, scores, command)
    return found, names


def transfer_table(runs: Sequence[RunRecord], evaluations: Iterable[Evaluation] = ()) -> Table | None:
    """The table of all scores, or None where there is none.

    A student is known by its weights, so that results find their run wherever they were kept. Lower bounds stand above
    the students, the teacher below them.
    """
    found, names = _gather(runs, evaluations)
    keys = sorted({key for row in found.values() for key in row}, key=lambda key: (_TITLES.index(key[0]), key[1]))
    if not keys:
        return None
    several = {title for title, count in Counter(title for title, _ in keys).items() if count > 1}
    titles = {key: key[0] + (f", {key[1]}" if key[0] in several else "") for key in keys}
    order = sorted(found, key=lambda identity: {UNTRAINED: 0, BOUNDS[TEACHER]: 2}.get(names[identity], 1))
    students = [identity for identity in order if names[identity] != BOUNDS[TEACHER]]
    # Untrained students of other seeds, or teachers, have one name.
    for name, count in Counter(names[identity] for identity in order).items():
        alike = [identity for identity in order if names[identity] == name]
        names |= {identity: f"{name} {number}" for number, identity in enumerate(alike, 1) if count > 1}
    best = {
        key: max((score.value for identity in students for score in found[identity].get(key, ())), default=None)
        for key in keys
    }
    rows, commands = [], []
    for identity in order:
        cells = [Cell(text=names[identity])]
        for key in keys:
            scores = found[identity].get(key, [])
            text = " / ".join(f"{100 * score.value:.1f} %" for score in scores)
            top = len(students) > 1 and identity in students and any(score.value == best[key] for score in scores)
            cells.append(Cell(text=text or "-", best=top))
            commands += [(names[identity], titles[key], score.command, score.all_scores) for score in scores]
        rows.append(cells)
    shares = {
        titles[key]: {names[one]: max(score.value for score in found[one][key]) for one in order if found[one].get(key)}
        for key in keys
    }
    return Table(columns=["student", *titles.values()], rows=rows, commands=commands, shares=shares)
