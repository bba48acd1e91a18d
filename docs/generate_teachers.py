"""Writes the table of docs/teachers.md from open_clip and timm as installed: `python docs/generate_teachers.py`.

Towers are built without memory for their weights. Names that cannot be teachers are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

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


def sizes_of(name: str) -> TowerSizes | None:
    """Sizes of a teacher by its name in the settings; None where it cannot be one."""
    try:
        with torch.device("meta"):
            visual = find_source(name, "random").untrained()
        return family_of(visual, name).sizes(visual)
    except MilanError:
        return None


def licences(name: str) -> str:
    """What timm says of the weights that a model has."""
    found = {get_pretrained_cfg(tag).license for tag in list_pretrained(f"{name}.*")}
    return ", ".join(sorted(filter(None, found))) or "no weights"


def rows() -> Iterator[str]:
    """Lines of the table, models of the same sizes and licences together."""
    alike: defaultdict[tuple[str, TowerSizes, str], list[str]] = defaultdict(list)
    for name in open_clip.list_models():
        if sizes := sizes_of(name):
            alike["open_clip", sizes, "by its model card"].append(name)
    for module in ("vision_transformer", "eva"):
        for name in timm.list_models(module=module):
            if sizes := sizes_of(TIMM + name):
                alike["timm", sizes, licences(name)].append(TIMM + name)
    for (library, sizes, licence), names in alike.items():
        model = ", ".join(f"`{name}`" for name in names)
        cells = (
            library,
            model,
            sizes.patch_size[0],
            sizes.image_size[0],
            f"{sizes.grid[0]} x {sizes.grid[1]}",
            sizes.width,
        )
        yield f"| {' | '.join(map(str, (*cells, licence)))} |"


def main() -> None:
    """Replace what stands between the two marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    titles = ("of", "model", "patch", "own input", "grid", "width", "licence of its weights")
    table = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *rows()]
    PAGE.write_text("\n".join([before + BEGIN, "", *table, "", END]) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
