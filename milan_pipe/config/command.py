"""The command line that does what a function did with its settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from milan_pipe.config.params import Params
from milan_pipe.config.subjects import RANDOM, TEACHER
from milan_pipe.errors import without_secrets


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def settings_of(params: Params, sections: Sequence[str]) -> list[str]:
    """`section.key=value` for each setting that is not at its default; a section may be `section.key`."""
    given = []
    values, defaults = params.model_dump(mode="json"), Params().model_dump(mode="json")
    for name in sections:
        section, _, only = name.partition(".")
        found, default = values[section], defaults[section]
        if isinstance(found, dict):
            changed = {key: value for key, value in found.items() if value != default[key] and only in ("", key)}
            given += [f"{section}.{key}={_word(value)}" for key, value in changed.items()]
        elif found != default:
            given.append(f"{section}={_word(found)}")
    return given


def command_of(name: str, arguments: Sequence[object], params: Params, sections: Sequence[str]) -> str:
    """`milan-pipe NAME ARGUMENTS --set ...`: the same work from any folder where the arguments mean the same."""
    settings = [word for setting in settings_of(params, sections) for word in ("--set", setting)]
    words = ["milan-pipe", name, *map(str, arguments), *settings]
    # Commands are kept in checkpoints and reports, which are passed on.
    return shlex.join(map(without_secrets, words))


def student_sections(checkpoint: object, *sections: str) -> tuple[str, ...]:
    """Settings that a command depends on: a checkpoint has its own student, `random` and `teacher` do not."""
    of = {RANDOM: ("student",), TEACHER: ("student.image_size", "student.patch_size", "teacher")}
    return (*of.get(str(checkpoint), ()), *sections)


def record_of(
    name: str, arguments: Sequence[object], params: Params, sections: Sequence[str], *, data: str
) -> dict[str, Any]:
    """Settings, data and command of a run that began with the first of `arguments`, for its checkpoints."""
    return {
        "settings": params.model_dump(mode="json", include=set(sections)),
        "data": without_secrets(data),
        "command": command_of(name, arguments, params, student_sections(arguments[0], *sections)),
    }
