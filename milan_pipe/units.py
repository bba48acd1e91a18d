"""Numbers and lists as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float) -> str:
    """Bytes with a unit, powers of 1000."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def rate(value: float) -> str:
    """A number of things a second, to three or four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 1 else f"{value:.2g}"


def some(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first names, and how many more there are."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
