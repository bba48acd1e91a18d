"""Images with masks of class indices, by number: from image shards, ADE20K's folders, or any two folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from milan_pipe.config.images import IMAGE_LIMITS, ImageSettings
from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, LabelError, MissingError
from milan_pipe.images.decode import opened_image, plain_errors
from milan_pipe.images.files import IMAGE_SUFFIXES, MASK_SUFFIX, MAX_TEXT_BYTES, files_under, printable_name
from milan_pipe.images.labelled import NumberedImages, digest_of_files, digest_of_sizes, nth_file, nth_span
from milan_pipe.images.shards import expand_shards, index_beside
from milan_pipe.images.tar import OnBad, read_shard
from milan_pipe.storage import is_url
from milan_pipe.storage.local import read_regular

ADE20K_CLASSES = 150
_MASK_FOLDERS = ("annotations", "masks", "labels")
_SPLITS = {"train": ("training", "train"), "val": ("validation", "val", "valid", "test")}
_MASK_SUFFIXES = ("png", "bmp", "tif", "tiff")
_MASK_FORMATS = ("PNG", "BMP", "TIFF")
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True, kw_only=True)
class MaskedImages(NumberedImages):
    """N images with masks.

    Attributes:
        classes: names of the classes, or their number, where it is known.
        zero_is_ignored: True for the layout of ADE20K, where 0 means no class.
        image, mask: give the encoded image and the encoded mask of a number.
    """

    classes: tuple[str, ...] | int | None
    zero_is_ignored: bool
    image: Callable[[int], bytes]
    mask: Callable[[int], bytes]


def masked_images(where: str | Path, split: str, on_bad: OnBad) -> MaskedImages:
    """Find images and their masks; none is decoded.

    Args:
        where: shards whose samples have a `mask.png`; or ADE20K's folder, with `images/` and `annotations/` that hold
            `training/` and `validation/` (or `train/` and `val/`); or a folder with `images/` and `masks/` (or
            `annotations/`, `labels/`); or a folder inside `images/`, with the masks in the folder of the same name
            inside `masks/`; or two folders as `IMAGES,MASKS`. An image and its mask have the same name but for the
            suffix.
        split: "train" or "val": which half of ADE20K's folder.
        on_bad: called with key and reason of each image that is skipped.

    Raises:
        MissingError: nothing is there, an image has no mask, or a folder has the other half alone.
        DataError: no images, or two of one name.
    """
    text = str(where)
    if not is_url(text):
        if "," in text and not Path(text).exists() and "{" not in text:
            images, _, masks = text.partition(",")
            return _folders(Path(images), Path(masks), text, ade=False)
        folder = Path(text)
        if folder.is_dir() and not any(folder.glob("*.tar")):
            return _folders(*_find_folders(folder, split), text, ade=_is_ade(folder))
    return _shards(text, on_bad)


def _is_ade(folder: Path) -> bool:
    root = folder if (folder / "images").is_dir() else folder.parent.parent
    return (root / "images" / "training").is_dir() and (root / "annotations" / "training").is_dir()


def _find_folders(folder: Path, split: str) -> tuple[Path, Path]:
    inside = [name for name in _MASK_FOLDERS if (folder / name).is_dir()]
    if (folder / "images").is_dir() and inside:
        images, masks = folder / "images", folder / inside[0]
        parts = {
            name: [part for part in known if (images / part).is_dir() and (masks / part).is_dir()]
            for name, known in _SPLITS.items()
        }
        if parts[split]:
            return images / parts[split][0], masks / parts[split][0]
        if any(parts.values()):
            found, names = next(filter(None, parts.values()))[0], " or ".join(f"{part}/" for part in _SPLITS[split])
            raise MissingError(
                f"{images} and {masks} have {found}/ and no {names}; name the folder inside of images/ that is meant"
            )
        return images, masks
    if folder.parent.name == "images":
        for name in _MASK_FOLDERS:
            masks = folder.parent.parent / name / folder.name
            if masks.is_dir():
                return folder, masks
    raise MissingError(
        f"{folder} holds neither .tar shards nor images with masks; expected images/ and masks/ (or annotations/) in "
        "it, a folder inside of images/ with one of the same name inside of masks/, or two folders as IMAGES,MASKS"
    )


def _folders(images: Path, masks: Path, where: str, *, ade: bool) -> MaskedImages:
    for folder in (images, masks):
        if not folder.is_dir():
            raise MissingError(f"{folder} is not there; expected a folder of images and one of masks")
    masks_by_key, images_by_key = _by_key(masks, _MASK_SUFFIXES), _by_key(images, IMAGE_SUFFIXES)
    keys, files = list(images_by_key), list(images_by_key.values())
    if not files:
        raise DataError(f"{images} holds no images; expected {', '.join(IMAGE_SUFFIXES)}")
    lacking = [key for key in keys if key not in masks_by_key]
    if lacking:
        raise MissingError(
            f"{len(lacking)} of the {len(keys)} images of {images} have no mask in {masks}, as {lacking[0]}; "
            f"expected {masks / lacking[0]}.png"
        )
    return MaskedImages(
        where=where,
        keys=keys,
        classes=_class_list(images, ade=ade),
        zero_is_ignored=ade,
        fingerprint=sha256_of("\n".join(keys).encode()),
        sizes=digest_of_files([*files, *(masks_by_key[key] for key in keys)]),
        image=partial(nth_file, files),
        mask=partial(nth_file, [masks_by_key[key] for key in keys]),
    )


def _by_key(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files_under(folder, suffixes):
        if (first := found.setdefault(_key(path, folder), path)) != path:
            raise DataError(
                f"{first} and {path.name} differ in their suffix alone, by which images and masks are not told apart; "
                "remove one of them"
            )
    return found


def _key(path: Path, folder: Path) -> str:
    return printable_name(path.relative_to(folder).with_suffix("").as_posix())


def _class_list(images: Path, *, ade: bool) -> tuple[str, ...] | int | None:
    for folder in (images.parent, images.parent.parent):
        for name in ("objectInfo150.txt", "classes.txt", "classes.json"):
            if (folder / name).is_file():
                return read_classes(folder / name)
    return ADE20K_CLASSES if ade else None


def read_classes(file: str | Path) -> tuple[str, ...]:
    """Names of classes: one per line, or a list in a .json, or the last column of ADE20K's table.

    Raises:
        MissingError: the file is not there.
        DataError: it is empty, larger than `MAX_TEXT_BYTES`, no text or no regular file.
    """
    try:
        data = read_regular(Path(file))
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"larger than {MAX_TEXT_BYTES >> 20} MiB")
        text = data.decode("utf-8-sig")
        named = json.loads(text) if Path(file).suffix == ".json" else re.split("\r\n|\r|\n", text)
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise ValueError("expected a list of names")
        # Half of a surrogate pair, which JSON can hold, can be neither written nor shown.
        "".join(named).encode()
        lines = [name.strip() for name in named if name.strip()]
    except FileNotFoundError:
        raise MissingError(f"class list {file} is not there; expected a text file with one name a line") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"class list {file} cannot be read: {error}") from error
    if lines and lines[0].split("\t")[0] == "Idx":
        lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
    if not lines:
        raise DataError(f"class list {file} is empty; expected one name a line")
    return tuple(lines)


def _shards(where: str, on_bad: OnBad) -> MaskedImages:
    shards = expand_shards(where)
    located = [(shard, at) for shard in shards for at in read_shard(shard, on_bad, locate=True)]
    lacking = [at.key for _, at in located if at.mask is None]
    if lacking:
        raise MissingError(
            f"{len(lacking)} of the {len(located)} images of {where} have no mask, as {lacking[0]!r}; expected a "
            f"member {lacking[0]}.{MASK_SUFFIX} beside each image"
        )
    if not located:
        raise DataError(f"none of the images of {where} can be used; prepare the shards again")
    return MaskedImages(
        where=where,
        keys=[at.key for _, at in located],
        classes=index.mask_classes if (index := index_beside(shards)) else None,
        zero_is_ignored=False,
        fingerprint=sha256_of("\n".join(f"{shard.name}/{at.key}" for shard, at in located).encode()),
        sizes=digest_of_sizes(len(part) for _, at in located for part in (at.image, at.mask or range(0))),
        image=partial(nth_span, [(shard, at.image) for shard, at in located]),
        mask=partial(nth_span, [(shard, at.mask) for shard, at in located if at.mask is not None]),
    )


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How the values of a mask become class indices.

    Attributes:
        classes: number of classes; indices are 0 to `classes` - 1.
        ignore_index: value that stands for no class.
        zero_is_ignored: 0 stands for no class as well, and value k for class k - 1.
    """

    classes: int
    ignore_index: int
    zero_is_ignored: bool


def _step_of(image: Image.Image) -> int:
    """By how much Pillow multiplies what a file of less than 8 bits of grey holds."""
    tiles = getattr(image, "tile", None)
    kind = tiles[0].args if tiles else None
    kind = kind[0] if isinstance(kind, tuple) and kind else kind
    return {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}.get(str(kind), 1)


def decode_mask(
    data: bytes, rule: MaskRule, size: tuple[int, int], key: str, limits: ImageSettings = IMAGE_LIMITS
) -> NDArray[np.int64]:
    """(H, W) class indices, -1 where there is none.

    Args:
        data: PNG, BMP or TIFF.
        size: height and width of the image.

    Raises:
        LabelError: the mask is damaged, above `limits`, of another size, in colours, or has a value that is no class.
    """
    try:
        with opened_image(data, limits, _MASK_FORMATS) as image, plain_errors(limits, _MASK_FORMATS):
            mode, found = image.mode, image.size[::-1]
            # What is refused for its mode or size is not decoded.
            step = _step_of(image)
            values = np.asarray(image) // step if found == size and mode in _MASK_MODES else None
    except DataError as error:
        raise LabelError(f"mask of {key!r} cannot be decoded: {error}") from None
    if mode not in _MASK_MODES:
        raise LabelError(
            f"mask of {key!r} has colours (mode {mode}), expected one channel of class indices; convert it to a "
            "greyscale or palette PNG whose values are the classes"
        )
    if values is None:
        raise LabelError(
            f"mask of {key!r} has {found[0]} x {found[1]} pixels, its image {size[0]} x {size[1]}; "
            "they must be of one size (height x width, after the image's EXIF turn)"
        )
    index = values.astype(np.int64)
    none = index == rule.ignore_index
    if rule.zero_is_ignored:
        none |= index == 0
        index = index - 1
    wrong = ~none & ((index < 0) | (index >= rule.classes))
    if wrong.any():
        first = int(values[wrong][0])
        low = 1 if rule.zero_is_ignored else 0
        raise LabelError(
            f"mask of {key!r} has value {first} in {int(wrong.sum())} pixels, expected {low} to "
            f"{rule.classes - 1 + low}, or {rule.ignore_index} for no class; set segment.classes to the class list, or "
            "segment.ignore_index"
        )
    index[none] = -1
    return index
