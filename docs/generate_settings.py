"""Writes docs/settings.md from the config classes: `python docs/generate_settings.py`."""

from pathlib import Path

from milan_pipe.config.base import Settings
from milan_pipe.config.params import Params


def settings_page() -> str:
    """The page, from the classes' own defaults and descriptions."""
    lines = ["# Settings", "", "Written by `docs/generate_settings.py` from the config classes.", ""]
    for section, field in Params.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Settings)):
            lines += [f"## {section}", "", f"Default `{field.default}`. {field.description or ''}".rstrip(), ""]
            continue
        doc = (kind.__doc__ or "").split("Attributes:")[0].split()
        lines += [f"## {section}", "", " ".join(doc), "", "| key | default | |", "|---|---|---|"]
        told = _attributes(kind.__doc__ or "")
        for name, entry in kind.model_fields.items():
            text = entry.description or told.get(name, "")
            lines.append(f"| `{name}` | `{entry.default}` | {text.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def _attributes(doc: str) -> dict[str, str]:
    told: dict[str, str] = {}
    name = ""
    for line in doc.partition("Attributes:")[2].splitlines():
        text = line.strip()
        head, colon, rest = text.partition(":")
        if colon and head.isidentifier() and line.startswith(" " * 8) and not line.startswith(" " * 9):
            name, told[head] = head, rest.strip()
        elif name and text:
            told[name] += f" {text}"
    return told


if __name__ == "__main__":
    (Path(__file__).parent / "settings.md").write_text(settings_page(), encoding="utf-8")
