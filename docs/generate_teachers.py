"""Writes the tables of docs/teachers.md from open_clip and timm as installed: `python docs/generate_teachers.py`.

Towers are built without memory for their weights. Names that cannot be teachers are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import open_clip
import timm
import torch
from timm.models import get_pretrained_cfg, list_pretrained

from milan_pipe.config.teacher import TIMM
from milan_pipe.errors import MilanError
from milan_pipe.teacher.family import TowerSizes
from milan_pipe.teacher.source import find_source
from milan_pipe.teacher.tower import family_of

PAGE = Path(__file__).parent / "teachers.md"
BEGIN, END = "<!-- written by generate_teachers.py -->", "<!-- end -->"
TEACHERS = ("of", "model", "patch", "own input", "grid", "width", "licence of its weights")
WEIGHTS = ("model", "`pretrained`", "repository", "licence")
BELOW = "#weights-of-open_clips-names"

Alike = defaultdict[tuple[str, TowerSizes, str], list[str]]


def sizes_of(name: str) -> TowerSizes | None:
    """Sizes of a teacher by its name in the settings; None where it cannot be one."""
    try:
        with torch.device("meta"):
            visual = find_source(name, "random").untrained()
        return family_of(visual, name).sizes(visual)
    except MilanError:
        return None


def _licences(found: Iterable[str | None], otherwise: str) -> str:
    stated = set(found)
    named = ", ".join(sorted(filter(None, stated)))
    return f"{named}, {otherwise}" if named and None in stated else named or (otherwise if stated else "no weights")


def timm_licences(name: str) -> str:
    """What timm says of the weights that a model has, by its name in timm."""
    return _licences((get_pretrained_cfg(tag).license for tag in list_pretrained(f"{name}.*")), "not stated")


def clip_licences(name: str) -> str:
    """What is known of the weights that a model of open_clip has."""
    return _licences((weights.licence for weights in clip_weights([name])), f"[on cards]({BELOW})")


class Weights(NamedTuple):
    """Weights that tags of open_clip stand for, by the repository that has them."""

    models: tuple[str, ...]
    tags: tuple[str, ...]
    repository: str
    licence: str | None


@cache
def _stated() -> dict[str, str | None]:
    """Licences that timm states, by the repository of the weights."""
    known = map(get_pretrained_cfg, list_pretrained())
    return {one.hf_hub_id: one.license for one in known if one.hf_hub_id}


def clip_weights(names: Iterable[str]) -> list[Weights]:
    """Weights of models of open_clip. It states no licence itself; timm does where the repository is its own."""
    by: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        for tag in open_clip.list_pretrained_tags_by_model(name):
            # A file of the repository may follow.
            organisation, repository, *_ = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].split("/")
            by[f"{organisation}/{repository}"].append((name, tag))
    return [
        Weights(*(tuple(dict.fromkeys(part)) for part in zip(*found, strict=True)), where, _stated().get(where))
        for where, found in by.items()
    ]


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table(titles: tuple[str, ...], rows: Iterable[Iterable[object]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def teacher_rows(alike: Alike) -> Iterator[tuple[object, ...]]:
    """Models of the same sizes and licences together."""
    for (library, sizes, licence), names in alike.items():
        grid = f"{sizes.grid[0]} x {sizes.grid[1]}"
        yield (library, _code(names), sizes.patch_size[0], sizes.image_size[0], grid, sizes.width, licence)


def weight_rows(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Weights of models of open_clip with where their licence is."""
    for one in clip_weights(names):
        link = f"[{one.repository}](https://huggingface.co/{one.repository})"
        yield (_code(one.models), _code(one.tags), link, one.licence or "on its card")


def teachers() -> Alike:
    """Names of teachers by library, sizes and licences."""
    alike: Alike = defaultdict(list)
    for name in open_clip.list_models():
        if sizes := sizes_of(name):
            alike["open_clip", sizes, clip_licences(name)].append(name)
    for module in ("vision_transformer", "eva"):
        for name in timm.list_models(module=module):
            if sizes := sizes_of(TIMM + name):
                alike["timm", sizes, timm_licences(name)].append(TIMM + name)
    return alike


def main() -> None:
    """Replace what stands between the two marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    alike = teachers()
    clip = [name for (library, *_), names in alike.items() if library == "open_clip" for name in names]
    lines = [
        f"Of open_clip {open_clip.__version__} and timm {timm.__version__}:",
        "",
        *table(TEACHERS, teacher_rows(alike)),
        "",
        "### Weights of open_clip's names",
        "",
        "open_clip states no licences. Those here are timm's, of the same repositories; the others are on cards.",
        "",
        *table(WEIGHTS, weight_rows(clip)),
    ]
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
