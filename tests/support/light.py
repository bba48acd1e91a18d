"""What an installation of the core has, found in this environment, and processes that see nothing else."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
_EXTRAS_OF_EXTRAS = ("all", "dev")
# Modules that are not there for an import and for whoever asks whether they are.
_SITE = """
import json, sys
from importlib.machinery import PathFinder

absent = set(json.loads({names!r}))

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@cache
def requirements() -> dict[str, list[str]]:
    """What `pyproject.toml` asks for: under `core`, and by extra."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in table["optional-dependencies"].items() if name not in _EXTRAS_OF_EXTRAS}
    return {"core": table["dependencies"], **extras}


@cache
def core() -> frozenset[str]:
    """Packages that come with the core, itself included, as far as they are installed here."""
    found: set[tuple[str, str]] = set()
    todo = [Requirement(line) for line in requirements()["core"]]
    while todo:
        one = todo.pop()
        for extra in one.extras | {""}:
            key = (canonicalize_name(one.name), extra)
            if key in found:
                continue
            try:
                needed = [Requirement(line) for line in requires(one.name) or ()]
            except PackageNotFoundError:
                continue
            found.add(key)
            todo += [more for more in needed if more.marker is None or more.marker.evaluate({"extra": extra})]
    return frozenset(name for name, _ in found) | {"milan-pipe"}


@cache
def _owners() -> dict[str, set[str]]:
    """Packages by the top modules that they bring."""
    return {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}


def environment(folder: Path) -> dict[str, str]:
    """Variables for processes, and their children, in which all modules are missing that the core does not bring."""
    absent = [module for module, owners in _owners().items() if not owners & core()]
    (folder / "sitecustomize.py").write_text(_SITE.format(names=json.dumps(absent)))
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def modules_of(lines: Iterable[str]) -> set[str]:
    """Top modules that the packages of these requirements bring."""
    names = {canonicalize_name(Requirement(line).name) for line in lines}
    return {module for module, owners in _owners().items() if names & owners}
