"""`bad_samples.jsonl` of a run: pictures that could not be read, each once."""

from __future__ import annotations

import json
from pathlib import Path

from milan_pipe.images.tar import OnBad


def bad_file(run: Path) -> OnBad:
    """Adds a line to RUN/bad_samples.jsonl, once per key."""
    file = run / "bad_samples.jsonl"
    told: set[str] = set()
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            told.add(str(json.loads(line)["key"]))

    def add(key: str, reason: str) -> None:
        if key not in told:
            told.add(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")

    return add
