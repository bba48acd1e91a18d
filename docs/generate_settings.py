"""Writes docs/settings.md from the config classes: `python docs/generate_settings.py`."""

from pathlib import Path

from milan_pipe.config.base import shown
from milan_pipe.config.params import Params


def _shown(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def settings_page() -> str:
    """The page, from the classes' own defaults and descriptions."""
    lines = [
        "# Settings",
        "",
        "Written by `docs/generate_settings.py` from the config classes. `null` stands for none.",
        "",
    ]
    for section, field in Params.model_fields.items():
        kind = Params.sections().get(section)
        if kind is None:
            lines += [f"## {section}", "", f"Default `{_shown(field.default)}`. {field.description or ''}".rstrip(), ""]
            continue
        doc = " ".join((kind.__doc__ or "").split())
        lines += [f"## {section}", "", doc, "", "| key | default | |", "|---|---|---|"]
        for name, entry in kind.model_fields.items():
            text = entry.description or ""
            lines.append(f"| `{name}` | `{_shown(entry.default)}` | {text.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "settings.md").write_text(settings_page(), encoding="utf-8")
