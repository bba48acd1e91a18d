"""What a command tells on stderr as one JSON object a line, for the logs of jobs that nobody watches."""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from milan_pipe.errors import without_secrets

VARIABLE = "MILAN_PIPE_LOG_JSON"
"""Environment variable that asks for it: processes that a command starts inherit it."""

Event = Literal["progress", "warning", "error", "report"]

_LEVELS = {"progress": "info", "report": "info", "warning": "warning", "error": "error"}

command = ""
"""Name of the command that runs."""


def wanted() -> bool:
    """Whether stderr takes JSON instead of text."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def tell(event: Event, **values: Any) -> None:
    """One line: the time, the level, the command, the rank where there are several, the event, and its values.

    Numbers stay numbers; what is not finite is null.
    """
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": _LEVELS[event],
        "command": command or Path(sys.argv[0]).stem,
    }
    if (rank := os.environ.get("RANK", "")).isdigit():
        line["rank"] = int(rank)
    text = json.dumps(_finite(line | {"event": event} | values), default=_as_json)
    sys.stderr.write(without_secrets(text) + "\n")
    sys.stderr.flush()


def _as_json(value: Any) -> Any:
    return _finite(value.model_dump(mode="json")) if hasattr(value, "model_dump") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
