"""Which family an image tower is of, and the input size that it is used at."""

from __future__ import annotations

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from milan_pipe.errors import SettingError
from milan_pipe.teacher.family import TowerFamily, TowerSizes
from milan_pipe.teacher.native import NativeFamily
from milan_pipe.teacher.timm_tower import TimmFamily, TimmTower

_FAMILIES: dict[type[nn.Module], TowerFamily] = {
    VisionTransformer: NativeFamily(),
    TimmModel: TimmFamily(),
    TimmTower: TimmFamily(),
}


def family_of(visual: nn.Module, name: str) -> TowerFamily:
    """The family of an image tower; `name` is the teacher's, for messages.

    Raises:
        SettingError: it has no patch tokens, or no one query whose attention says which patches matter.
    """
    family = _FAMILIES.get(type(visual))
    problem = family.problem(visual) if family else f"its image tower is a {type(visual).__name__}"
    if family is None or problem:
        raise SettingError(
            f"teacher {name!r} cannot be used: {problem}; expected a ViT that pools by its CLS token, as ViT-B-16, "
            "ViT-L-14, EVA02-B-16 or timm:vit_small_patch14_dinov2, or by one attention query, as ViT-B-16-SigLIP"
        )
    return family


def choose_input_size(
    sizes: TowerSizes, name: str, image_size: int | None = None, grid: tuple[int, int] | None = None
) -> int:
    """Side of the square input in pixels, a whole number of patches.

    The setting `image_size`, else what gives the student's `grid`, else the tower's own, less what fills no patch.

    Raises:
        SettingError: input, patches or grid are not square, or `image_size` is no whole number of patches.
    """
    own, patch = sizes.image_size[0], sizes.patch_size[0]
    for what, (height, width) in {"reads": sizes.image_size, "has patches of": sizes.patch_size}.items():
        if height != width:
            raise SettingError(f"teacher {name!r} {what} {height} x {width} pixels, expected square ones")
    if image_size is not None:
        if image_size % patch:
            below = image_size // patch * patch
            near = f"{below} or {below + patch}" if below else str(patch)
            raise SettingError(
                f"teacher.image_size is {image_size}, expected a multiple of {patch}, the patch side of {name!r}, "
                f"as {near}"
            )
        return image_size
    if grid is None:
        return own // patch * patch
    if grid[0] != grid[1]:
        raise SettingError(
            f"the student has {grid[0]} x {grid[1]} patches, teacher {name!r} can only match a square grid; "
            "name its input with teacher.image_size"
        )
    return grid[0] * patch
