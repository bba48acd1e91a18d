"""Checkpoints that are changed, and whole again: as if they had been written so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `checkpoint.json` and its digest, digests of the files beside it too; written from the docs alone."""
    file = folder / "checkpoint.json"
    record = json.loads(file.read_text())
    record.pop("sha256", None)
    change(record)
    record["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.safetensors")
    }
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    file.write_text(json.dumps({**record, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}))
