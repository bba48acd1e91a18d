"""A folder of images as a source: flat, with class folders, or divided into splits of either kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from milan_pipe.config.images import ImageSettings, PrepareSettings
from milan_pipe.errors import DataError
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.files import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, files_under, printable_name, read_file
from milan_pipe.images.source import Bad, Job, Members, Source, free_key, label_and_caption

SPLIT_FOLDERS = ("train", "val", "test")
"""Names of subfolders that are splits."""


@dataclass(frozen=True, kw_only=True)
class _Image:
    """A file to pack. `name` is its path relative to the source, in printable characters."""

    path: Path
    name: str
    key: str
    label: int


@dataclass(frozen=True)
class _Images:
    images: tuple[_Image, ...]
    limits: ImageSettings

    def __len__(self) -> int:
        return len(self.images)

    def members(self, bad: list[Bad]) -> Iterator[Members]:
        for image in self.images:
            suffix = image.path.suffix[1:].lower()
            try:
                if suffix in OTHER_IMAGE_SUFFIXES:
                    raise DataError(f"images of type .{suffix} are not read; convert to {', '.join(IMAGE_SUFFIXES)}")
                data = read_file(image.path)
                decode_pixels(data, limits=self.limits)
            except DataError as error:
                bad.append({"key": image.key, "file": image.name, "reason": str(error)})
            else:
                yield image.key, {suffix: data} | label_and_caption(image.label)


def image_files(root: Path) -> list[Path]:
    """The images below a folder, those of types that are not read as well; raises DataError as `files_under`."""
    return files_under(root, IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES)


def folder_source(root: Path, found: list[Path], settings: PrepareSettings, limits: ImageSettings) -> Source:
    """The images that `image_files` found in `root`.

    Raises:
        DataError: splits lie beside other folders.
    """
    files = [path.relative_to(root).parts for path in found]
    splits = _split_folders(root, files)
    depth = 1 if splits else 0
    classes = sorted({file[depth] for file in files if len(file) > depth + 1})
    labels = {name: label for label, name in enumerate(classes)}
    members: dict[str, list[_Image]] = {split: [] for split in splits or [settings.split]}
    keys: set[str] = set()
    for file in files:
        image = _Image(
            path=root.joinpath(*file),
            name=printable_name("/".join(file)),
            key=free_key(file, keys),
            label=labels[file[depth]] if len(file) > depth + 1 else -1,
        )
        members[file[0] if splits else settings.split].append(image)
        keys.add(image.key)
    step = settings.samples_per_shard
    return Source(
        described={"kind": "folder", "path": printable_name(root.as_posix())},
        jobs=[
            Job(split=split, part=_Images(tuple(inner[start : start + step]), limits))
            for split, inner in members.items()
            for start in range(0, len(inner), step)
        ],
        classes=tuple(map(printable_name, classes)) or None,
    )


def _split_folders(root: Path, files: list[tuple[str, ...]]) -> list[str]:
    """The splits that a source is divided into, if it is."""
    tops = {file[0] if len(file) > 1 else "" for file in files}
    present = [name for name in SPLIT_FOLDERS if name in tops]
    others = sorted(tops - set(present))
    if not others:
        return present
    # One such name among others is a class, as "train" among vehicles. Two are splits with something beside them.
    if len(present) > 1:
        beside = printable_name(others[0]) or "images"
        raise DataError(
            f"source {root} holds the splits {', '.join(present)} beside {beside}; expected only split folders or only "
            "class folders: move the rest elsewhere"
        )
    return []
