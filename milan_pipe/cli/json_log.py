"""What a command tells on stderr as one JSON object a line, for the logs of jobs that nobody watches."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from milan_pipe.cli.stderr import Stderr
from milan_pipe.errors import without_secrets

VARIABLE = "MILAN_PIPE_LOG_JSON"
"""Environment variable that asks for it: processes that a command starts inherit it."""

Event = Literal["progress", "warning", "error", "report"]

_LEVELS = {"progress": "info", "report": "info", "warning": "warning", "error": "error"}

command = ""
"""Name of the command that runs."""

# Of a list in a report.
_MOST = 20


def wanted() -> bool:
    """Whether stderr takes JSON instead of text."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


@contextmanager
def asked_by(words: Sequence[str]) -> Iterator[None]:
    """JSON for one command if its words ask for it, wherever they do, and for the processes that it starts."""
    global command
    command, earlier = "", os.environ.get(VARIABLE, "")
    if "--log-json" in words:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ[VARIABLE] = earlier


def tell(event: Event, **values: Any) -> None:
    """One line: the time, the level, the command, the rank where there are several, the event, and its values.

    Numbers stay numbers; what is not finite is null, and secrets are hidden.
    """
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": _LEVELS[event],
        "command": command or Path(sys.argv[0]).stem,
    }
    if (rank := os.environ.get("RANK", "")).isdigit():
        line["rank"] = int(rank)
    log = Stderr()
    log.write(json.dumps(_plain(line | {"event": event} | values)) + "\n")
    log.flush()


def tell_report(title: str, values: Mapping[str, Any]) -> None:
    """The last line of a command. Of what is long the first few are told, and `NAME_count` says how many there are."""
    told: dict[str, Any] = {}
    for name, value in values.items():
        told[name] = value
        if isinstance(value, dict | list | tuple) and len(value) > _MOST:
            first = itertools.islice(value.items() if isinstance(value, dict) else value, _MOST)
            told |= {name: dict(first) if isinstance(value, dict) else list(first), f"{name}_count": len(value)}
    tell("report", title=title, **told)


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {without_secrets(str(name)): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return without_secrets(str(value))
