"""What one would type for a function that was called with settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from milan_pipe.config.base import Settings
from milan_pipe.config.params import Params
from milan_pipe.errors import without_password


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def settings_of(params: Params, sections: Sequence[str]) -> list[str]:
    """`section.key=value` for each setting of these sections that is not at its built-in default.

    Args:
        sections: or single settings, as `section.key`.
    """
    given = []
    defaults = Params()
    for name in sections:
        section, _, only = name.partition(".")
        found, default = getattr(params, section), getattr(defaults, section)
        if not isinstance(found, Settings):
            if found != default:
                given.append(f"{section}={_word(found)}")
            continue
        values, usual = found.model_dump(mode="json"), default.model_dump(mode="json")
        given += [
            f"{section}.{key}={_word(value)}"
            for key, value in values.items()
            if value != usual[key] and only in ("", key)
        ]
    return given


def command_of(name: str, arguments: Sequence[object], params: Params, sections: Sequence[str]) -> str:
    """`milan-pipe NAME ARGUMENTS --set ...`: the same work from any folder where the arguments mean the same.

    Args:
        sections: of the settings that the command takes.
    """
    words = ["milan-pipe", name, *map(str, arguments)]
    for setting in settings_of(params, sections):
        words += ["--set", setting]
    # Commands are kept in checkpoints and reports, which are passed on.
    return shlex.join(map(without_password, words))


RANDOM, TEACHER = "random", "teacher"
"""What stands for an untrained student and for the teacher where a checkpoint is named."""


def student_sections(checkpoint: object, *sections: str) -> tuple[str, ...]:
    """Sections that a command takes: a checkpoint has its student's sizes, `random` and `teacher` have none."""
    of = {RANDOM: ("student",), TEACHER: ("student.image_size", "student.patch_size", "teacher")}
    return (*of.get(str(checkpoint), ()), *sections)


def record_of(
    name: str, arguments: Sequence[object], params: Params, sections: Sequence[str], *, data: str
) -> dict[str, Any]:
    """What a run on a checkpoint, the first of `arguments`, keeps of how it came about: settings, data and command."""
    return {
        "settings": params.model_dump(mode="json", include=set(sections)),
        "data": data,
        "command": command_of(name, arguments, params, student_sections(arguments[0], *sections)),
    }
