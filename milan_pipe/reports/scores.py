"""Scores of all students side by side, each with the command that made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from milan_pipe.evaluation.results import Evaluation
from milan_pipe.reports.runs import PRETRAIN, RunRecord

_TITLES = {
    "knn": "k-NN",
    "linear-probe --quick": "linear probe, quick",
    "linear-probe": "linear probe",
    "finetune": "fine-tuned",
    "segment": "mIoU",
}
_FIRST = {
    "knn": "best",
    "linear-probe --quick": "accuracy",
    "linear-probe": "top1",
    "finetune": "top1",
    "segment": "miou",
}
_BOUNDS = {"random": "random initialisation", "teacher": "teacher"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of the table: a share between 0 and 1."""

    task: str
    data: str
    value: float
    command: str
    more: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is printed of a student's scores in one column; `best` among the students."""

    text: str
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class TransferTable:
    """`rows` begin with the student's name; `commands` are (student, column, command, all scores)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    commands: Sequence[tuple[str, str, str, str]]
    text: bool = field(default=False)


def _all(scores: object) -> str:
    values = scores.items() if isinstance(scores, dict) else ()
    return ", ".join(f"{name} {value:.4g}" for name, value in values if isinstance(value, int | float))


def _of_evaluation(evaluation: Evaluation) -> Score:
    task = "linear-probe --quick" if evaluation.task == "linear-probe" else evaluation.task
    return Score(
        task=task,
        data=evaluation.data,
        value=evaluation.scores[_FIRST[task]],
        command=evaluation.command,
        more=_all(dict(evaluation.scores)),
    )


def _of_run(run: RunRecord) -> Score | None:
    scores = run.report.get("scores")
    if run.task == PRETRAIN or not isinstance(scores, dict):
        return None
    return Score(
        task=run.task,
        data=str(run.record.get("data", "")),
        value=float(scores[_FIRST[run.task]]),
        command=str(run.record.get("command", "")),
        more=_all(scores),
    )


def _subject(name: str) -> str:
    return _BOUNDS.get(name, name)


def _gather(
    runs: Sequence[RunRecord], evaluations: Iterable[Evaluation]
) -> tuple[dict[str, dict[tuple[str, str], list[Score]]], dict[str, str]]:
    """Scores by student and (task, data), students in the order of the table, and their names."""
    names = {run.identity: run.name for run in runs if run.task == PRETRAIN}
    found: dict[str, dict[tuple[str, str], list[Score]]] = {identity: {} for identity in names}

    def add(identity: str, subject: str, score: Score) -> None:
        names.setdefault(identity, _subject(subject))
        places = found.setdefault(identity, {}).setdefault((score.task, score.data), [])
        if score not in places:
            places.append(score)

    for evaluation in [*evaluations, *(one for run in runs for one in run.evaluations)]:
        add(evaluation.identity, evaluation.subject, _of_evaluation(evaluation))
    for run in runs:
        score = _of_run(run)
        if score is not None:
            add(run.identity, str(run.record.get("backbone", run.name)), score)
    return found, names


def transfer_table(runs: Sequence[RunRecord], evaluations: Iterable[Evaluation] = ()) -> TransferTable | None:
    """The table of all scores, or None where there is none.

    A student is known by its weights, so that results find their run wherever they were kept. Lower bounds stand above
    the students, the teacher below them.
    """
    found, names = _gather(runs, evaluations)
    keys = sorted({key for row in found.values() for key in row}, key=lambda key: (list(_TITLES).index(key[0]), key[1]))
    if not keys:
        return None
    several = {task for task, _ in keys if sum(other == task for other, _ in keys) > 1}
    titles = {key: f"{_TITLES[key[0]]}, {key[1]}" if key[0] in several else _TITLES[key[0]] for key in keys}
    order = sorted(found, key=lambda identity: {_BOUNDS["random"]: 0, _BOUNDS["teacher"]: 2}.get(names[identity], 1))
    students = [identity for identity in order if names[identity] != _BOUNDS["teacher"]]
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
            commands += [(names[identity], titles[key], score.command, score.more) for score in scores]
        rows.append(cells)
    return TransferTable(columns=["student", *titles.values()], rows=rows, commands=commands)
