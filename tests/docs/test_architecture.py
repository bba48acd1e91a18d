"""The map names modules and functions that exist."""

from __future__ import annotations

import importlib
import re

import pytest
from support.pages import ROOT

ROWS = [
    (modules, functions)
    for _, modules, functions, *_ in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[0].splitlines()
        if line.startswith("| ") and "`" in line
    )
]


@pytest.mark.parametrize(("modules", "functions"), ROWS)
def test_a_step_of_the_map_exists(modules: str, functions: str) -> None:
    names = re.findall(r"`([\w.]+)`", modules)
    package = names[0].partition(".")[0]
    found = [importlib.import_module(f"milan_pipe.{package if n[0] == '.' else ''}{n}") for n in names]
    for function in re.findall(r"`(\w+)`", functions):
        assert any(hasattr(module, function) for module in found), function


def test_the_map_has_every_step() -> None:
    assert len(ROWS) >= 14
