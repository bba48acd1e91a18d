"""Cards of students and of target stores: what they are made of and worth, as the README.md of a repository."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import DatasetCardData, ModelCardData

from milan_pipe import __version__
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.teacher import portable_name
from milan_pipe.drawing.sheet import printable_line, printable_lines
from milan_pipe.errors import DataError, MilanError, MismatchError
from milan_pipe.evaluation.results import FOLDER, read_evaluations
from milan_pipe.reports.store_facts import store_facts
from milan_pipe.storage import is_url
from milan_pipe.student.objectives import is_taught
from milan_pipe.targets.store import TargetStore
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint

CARD = "README.md"
REPOSITORY = "ORG/NAME"
"""Stands in a card until it is pushed to a repository of another name."""

_METHOD = "[MILAN](https://arxiv.org/abs/2208.06049)"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip


class Score(NamedTuple):
    """Scores of one evaluation, shares between 0 and 1 by name, with its data and the command that gives them."""

    task: str
    scores: Mapping[str, Any]
    data: str
    command: str


def scores_of(run: Path, identity: str, others: Iterable[str | Path] = ()) -> list[Score]:
    """What is known of a student: results of probes in its run, and other runs that began with it.

    Args:
        identity: digest of its weights, as `Backbone.digest` gives it.
        others: runs of `finetune`, `linear-probe` or `segment`.

    Raises:
        MissingError, DataError, StoreError: a run or a result cannot be read.
        MismatchError: a run began with another student.
    """
    kept = [one for one in read_evaluations(run / FOLDER) if one.identity == identity]
    found = [Score(one.task, one.scores, one.data, one.command) for one in kept]
    for other in others:
        opened = open_checkpoint(other)
        began = opened.record.get("configuration", {}).get("student", {}).get("weights")
        if began != identity:
            raise MismatchError(f"{other} did not begin with this student; name runs that did, or push without it")
        found += own_scores(opened)
    return found


def own_scores(checkpoint: Checkpoint) -> list[Score]:
    """What a run of `finetune`, `linear-probe` or `segment` reached at its checkpoint; DataError before it has any."""
    record = checkpoint.record
    scores = record.get("scores")
    if not isinstance(scores, dict) or not scores:
        raise DataError(f"{checkpoint.path} has no scores yet; let its run come to its end")
    return [Score(str(record.get("task")), scores, str(record.get("data", "")), str(record.get("command", "")))]


def _front_matter(data: ModelCardData | DatasetCardData) -> str:
    # Not by `to_yaml`, which leaves letters as they are: PyYAML reads a line break of Unicode as a blank.
    return str(yaml.safe_dump(data.to_dict(), sort_keys=False))  # type: ignore[no-untyped-call]


def model_card(
    checkpoint: Checkpoint, student: StudentSettings, classes: int, scores: Sequence[Score], license: str | None
) -> str:
    """A student's card in Markdown: what it is, its teacher, data and recipe, and its scores with their commands.

    Args:
        classes: of its classifier; 0 without one.
        license: the hub's name of its licence.
    """
    record = checkpoint.record
    began = _pretrained(record)
    data = ModelCardData(
        library_name="timm",
        license=license,
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        tags=["milan-pipe", "timm", "vision-transformer", "self-supervised"],
    )
    headless = "" if classes else ", num_classes=0"
    written = f", written by milan-pipe {_span(version)}" if (version := record.get("package_version")) else ""
    return _card(
        _front_matter(data),
        f"# {REPOSITORY.partition('/')[2]}",
        f"A vision transformer, pretrained by {_METHOD} on stored features of a teacher"
        f"{f' and fine-tuned on {classes} classes' if classes else ''}{written}.",
        _code(
            "python",
            f'import timm\n\nmodel = timm.create_model("hf-hub:{REPOSITORY}", pretrained=True{headless})\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        ),
        _list(
            {
                "architecture": f"timm's {student.model}, {student.image_size} pixels"
                + "".join(
                    f", {name.replace('_', ' ')} {value}"
                    for name in ("patch_size", "width", "depth", "heads")
                    if (value := getattr(student, name)) is not None
                ),
                "step": f"{record.get('step')}, {record['epochs']} epochs"
                if "epochs" in record
                else record.get("step"),
            }
        ),
        *_taught(began or record),
        *_trained(began, "Pretraining: data and recipe"),
        *_trained(record, "Fine-tuning: data and recipe" if classes else "Data and recipe"),
        *_scored(scores),
    )


def dataset_card(store: TargetStore, license: str | None) -> str:
    """A store's card in Markdown: the teacher, what is stored, and how to read it; DataError where a record is damaged.

    Args:
        license: the hub's name of its licence.
    """
    header = store.header
    samples = sum(store.samples(shard) for shard in store.shards)
    data = DatasetCardData(
        license=license,
        task_categories=["image-feature-extraction"],
        size_categories=next((name for most, name in _SIZES if samples < most), "n>1T"),
        tags=["milan-pipe", header.format],
    )
    facts = {name: fact for name, fact in store_facts(store)[0].items() if name != "store"}
    return _card(
        _front_matter(data),
        f"# {REPOSITORY.partition('/')[2]}",
        f"Targets for {_METHOD}: patch features and attention of a teacher for each view of each image, with the views "
        "that it saw.",
        _code("bash", f"milan-pipe pretrain hf://datasets/{REPOSITORY} run"),
        _code("python", f'import milan_pipe\n\ntargets = milan_pipe.open_targets("hf://datasets/{REPOSITORY}")'),
        _list(facts),
        *_teacher(header.teacher.model_dump(mode="json")),
        "The views are parts of the source images, as JPEGs: what those are licensed for holds for them too.",
    )


def _card(front: str, *parts: str) -> str:
    made = f"Made with milan-pipe {__version__}."
    return f"---\n{front.strip()}\n---\n\n" + "\n\n".join([*parts, made]) + "\n"


def _fence(text: str, least: int) -> str:
    """Backticks that no run of backticks in the text closes."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _code(language: str, text: str) -> str:
    shown = printable_lines(text.strip())
    fence = _fence(shown, 3)
    return f"{fence}{language}\n{shown}\n{fence}"


def _span(value: object) -> str:
    """What a record says, as code on one line: it is text that anybody may have written, and no markup."""
    shown = printable_line(str(value).strip())
    fence = _fence(shown, 1)
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}" if shown else ""


def _cell(value: object) -> str:
    # Readers do not agree on what a backslash before a bar within code is.
    return _span(value).replace("|", "\\x7c")


def _list(facts: Mapping[str, object]) -> str:
    return "\n".join(f"- {name}: {_span(fact)}" for name, fact in facts.items())


def public(value: Any) -> Any:
    """A setting, or a word of a command, without the folders of this machine; lists and tables part by part.

    The last part stays of a path that is absolute, in a home or above the working folder, and of `local-dir:PATH`.
    Other relative paths, URLs and names of repositories stay whole.
    """
    if isinstance(value, dict):
        return {name: public(part) for name, part in value.items()}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str) or is_url(value):
        return value
    if (short := portable_name(value)) != value:
        return short
    value = re.sub(r"\{([^{}]*)\}", lambda found: f"{{{','.join(map(public, found[1].split(',')))}}}", value)
    parts = _parts(value.rstrip("/"))
    is_outside = parts[0] == "" or parts[0].startswith("~") or ".." in parts
    return parts[-1] or value if is_outside else value


def _parts(path: str) -> list[str]:
    """Parts of a path; a slash between braces is within one."""
    texts = re.split(r"([{}])", path)
    parts = [""]
    for text, brace in zip(texts[::2], [*texts[1::2], ""], strict=True):
        first, *others = [text] if brace == "}" else re.split("/+", text)
        parts[-1] += first
        parts += others
        parts[-1] += brace
    return parts


def public_command(command: str) -> str:
    """A command to paste, each of its words `public`; empty where it is none that a shell takes."""
    try:
        return shlex.join(map(_public_word, shlex.split(command)))
    except ValueError:
        return ""


def _public_word(word: str) -> str:
    option, value = re.fullmatch(r"([\w.-]+=|)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        # As the command was made: a setting that is no text is JSON.
        parts = json.loads(value)
        return option + (json.dumps(public(parts)) if isinstance(parts, dict | list) else value)
    except (ValueError, RecursionError):
        return f"{option}{public(value)}"


def _public_data(data: object) -> str:
    return " -> ".join(map(public, str(data).split(" -> ")))


def _teacher(teacher: Mapping[str, Any]) -> list[str]:
    facts = {
        "model": f"{teacher['model']}" + (f", weights {teacher['pretrained']}" if teacher.get("pretrained") else ""),
        "source": teacher.get("source"),
        "licence": teacher.get("license") or "not stated; look at its source",
        "sha256 of its weights": teacher.get("weights_sha256"),
    }
    return ["## Teacher", _list({name: fact for name, fact in facts.items() if fact})]


def _taught(record: Mapping[str, Any]) -> list[str]:
    """The teacher of a pretrained student."""
    teacher, target = record.get("teacher"), record.get("settings", {}).get("target", "clip")
    if not isinstance(teacher, dict):
        return []
    if not is_taught(target):
        return ["## Teacher", f"None: it learned to predict {_span(target)}."]
    return _teacher(teacher)


def _pretrained(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of the checkpoint that a run began with; empty where that is no longer there."""
    try:
        return open_checkpoint(str(record["backbone"])).record
    except (MilanError, LookupError):
        return {}


def _trained(record: Mapping[str, Any], title: str) -> list[str]:
    parts = [f"## {title}"]
    views = record.get("configuration", {}).get("targets", {}).get("views")
    facts = {
        "data": record.get("data") or record.get("targets"),
        "views": f"{views['count']} of each image, {views['size']} pixels" if views else None,
    }
    if shown := {name: _public_data(fact) for name, fact in facts.items() if fact}:
        parts.append(_list(shown))
    if command := public_command(str(record.get("command") or "")):
        parts.append(_code("bash", command))
    if record.get("settings"):
        try:
            # Through JSON: a record's values are plain.
            settings = yaml.safe_dump(public(json.loads(json.dumps(record["settings"]))), sort_keys=False)
        except RecursionError:
            raise DataError("the settings of a checkpoint are nested deeper than any are; train it again") from None
        parts.append(_code("yaml", settings))
    return parts if len(parts) > 1 else []


def _is_score(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _scored(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return ["## Scores", "None were kept with it."]
    rows = ["| task | data | scores |", "|---|---|---|"]
    for one in scores:
        values = ", ".join(f"{key} {value:.4g}" for key, value in one.scores.items() if _is_score(value))
        cells = (one.task, _public_data(one.data).replace(" -> ", " → "), values)
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    commands = "\n".join(dict.fromkeys(filter(None, (public_command(one.command) for one in scores))))
    return ["## Scores", "\n".join(rows), _code("bash", commands)]
