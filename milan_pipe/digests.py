"""SHA-256 of bytes, files, and JSON values that carry their own digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def sha256_of(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(file: Path | IO[bytes]) -> str:
    """Hexadecimal digest of a file by its path, or of the rest of an open one, read in pieces; raises OSError."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return sha256_of_file(opened)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _canonical(values: Mapping[str, Any]) -> bytes:
    # Names of files that are no UTF-8 are half surrogates in Python.
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values and, under `sha256`, the digest of their canonical JSON: sorted keys, no spaces, UTF-8."""
    return {**values, "sha256": sha256_of(_canonical(values))}


def verified(found: Any) -> dict[str, Any] | None:
    """Values without their digest; None if it does not fit."""
    if not isinstance(found, dict) or "sha256" not in found:
        return None
    values = {key: value for key, value in found.items() if key != "sha256"}
    return values if sha256_of(_canonical(values)) == found["sha256"] else None
