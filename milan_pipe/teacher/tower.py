"""Image towers of every kind that can teach, behind the same few functions."""

from __future__ import annotations

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from milan_pipe.errors import SettingError
from milan_pipe.teacher.family import TowerFamily, TowerSizes
from milan_pipe.teacher.native import NativeFamily
from milan_pipe.teacher.timm_tower import TimmFamily

_FAMILIES: dict[type[nn.Module], TowerFamily] = {VisionTransformer: NativeFamily(), TimmModel: TimmFamily()}


def check_tower(visual: nn.Module, name: str) -> None:
    """Refuse a tower that has no patch tokens, or no one query whose attention says which patches matter.

    Raises:
        SettingError: says what was found and what is expected.
    """
    family = _FAMILIES.get(type(visual))
    problem = family.problem(visual) if family else f"its image tower is a {type(visual).__name__}"
    if problem:
        raise SettingError(
            f"teacher {name!r} cannot be used: {problem}; expected a ViT that pools by its CLS token, as ViT-B-16, "
            "ViT-L-14 or EVA02-B-16, or by one attention query, as ViT-B-16-SigLIP"
        )


def tower_outputs(visual: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Run the image tower once.

    Args:
        visual: a tower that `check_tower` accepts.
        pixels_BCHW: normalised input at the tower's own size.

    Returns:
        features (B, S, T): CLS or pooled token first, then patches in raster order; not unit length. All tokens are
        past the tower's final norm and its projection, where it has one.
        importance (B, L) float32: the attention of the query that pools over the patch keys, softmax over all keys,
        mean over heads, columns of CLS and register tokens dropped, so that a row sums to at most 1. The query is
        the last block's CLS query, or the one of attention pooling.

    Source: arXiv 2208.06049, sections 3.1 and 3.3.
    """
    return _FAMILIES[type(visual)].outputs(visual, pixels_BCHW)


def sizes_of(visual: nn.Module) -> TowerSizes:
    """Sizes as they are now."""
    return _FAMILIES[type(visual)].sizes(visual)


def choose_input_size(
    visual: nn.Module, name: str, image_size: int | None = None, grid: tuple[int, int] | None = None
) -> int:
    """Side of the square input in pixels, a whole number of patches.

    Args:
        name: of the teacher, for messages.
        image_size: the setting, which wins.
        grid: patches of the student, down and across; the side at which the tower has as many.
            With neither, the tower's own side, less what does not fill a patch.

    Raises:
        SettingError: input or patches are not square, `image_size` is no whole number of patches, or the student's grid
            is not square.
    """
    sizes = sizes_of(visual)
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


def resize_tower(visual: nn.Module, side: int) -> None:
    """Let the tower read `side` x `side` pixels, a whole number of patches.

    Learned position embeddings are interpolated (bicubic, antialiased), rotary ones are computed for the new grid.
    """
    if sizes_of(visual).image_size != (side, side):
        _FAMILIES[type(visual)].resize(visual, side)
