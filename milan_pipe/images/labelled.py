"""Labelled images by number, for training in any order: from image shards or class folders, each read alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, MilanError, MissingError, StoreError
from milan_pipe.images.files import IMAGE_SUFFIXES, files_under, printable_name, read_file
from milan_pipe.images.index import PREPARE_MARKER
from milan_pipe.images.shards import ShardFile, expand_shards, index_beside
from milan_pipe.images.tar import OnBad, Sample, read_shard
from milan_pipe.storage import is_url
from milan_pipe.storage.kinds import IMAGES, mistaken
from milan_pipe.storage.local import real_path
from milan_pipe.units import some

_MOST_CLASSES = 2**22
_MOST_ASKED = 4096


@dataclass(frozen=True, kw_only=True)
class NumberedImages:
    """N images that are not read yet.

    Attributes:
        where: path or URL, for messages.
        keys: webdataset's key of each image, or its path inside the folder.
        fingerprint: changes with keys, labels and names of the shards.
        sizes: changes with the bytes of encoded images, those of shards and up to 4,096 of a folder.
    """

    where: str
    keys: Sequence[str]
    fingerprint: str
    sizes: str

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class LabelledImages(NumberedImages):
    """N images with labels.

    Attributes:
        label_N: int64 class indices, 0 or more.
        classes: names of the classes where they are known.
        read: gives the encoded image of a number. It raises DataError where the image is larger than
            `MAX_ENCODED_BYTES` or cannot be read, and StoreError where the object store cannot be read.
        files: of class folders the file of each image, else empty.
    """

    label_N: NDArray[np.int64]
    classes: tuple[str, ...] | None
    read: Callable[[int], bytes]
    files: Sequence[Path] = ()


def nth_file(paths: Sequence[Path], number: int) -> bytes:
    """An encoded image by its number; see `read_file`."""
    return read_file(paths[number])


def nth_span(spans: Sequence[tuple[ShardFile, range]], number: int) -> bytes:
    """Bytes of a member of a shard by its number."""
    shard, span = spans[number]
    data = shard.location.read_range(shard.name, span.start, span.stop)
    if len(data) != len(span):
        raise StoreError(f"{shard} gives {len(data)} of the {len(span)} bytes at {span.start}; was it cut meanwhile?")
    return data


def labelled_images(where: str | Path, on_bad: OnBad) -> LabelledImages:
    """Find labelled images; none is decoded.

    Args:
        where: shards as `expand_shards` takes them, each sample with a class index (`.cls`, or `label` in `.json`); or
            a folder with one subfolder per class, as ImageNet's `train`, numbered in the order of their names.
        on_bad: called with key and reason of each sample that is skipped.

    Raises:
        MissingError: nothing is there.
        DataError: there are no images, one has no label, or a shard is damaged.
        StoreError: the object store cannot be read.
    """
    return _class_folders(Path(where), on_bad) if is_class_folder(where) else _in_shards(where, on_bad)


def is_class_folder(where: str | Path) -> bool:
    """Whether this is a local folder with subfolders and without shards."""
    folder = Path(where)
    if is_url(where) or not folder.is_dir() or any(folder.glob("*.tar")):
        return False
    return not (folder / PREPARE_MARKER).exists()


def _names_in(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {error.strerror}") from error


def class_names(where: str | Path) -> tuple[str, ...] | None:
    """Names of the classes where they are known; no image is looked at. Errors as `labelled_images`."""
    if is_class_folder(where):
        if other := mistaken(Path(where), IMAGES):
            raise MissingError(other)
        return tuple(map(printable_name, _names_in(Path(where))))
    # Only local folders have an index, and a listing elsewhere takes a request.
    index = None if is_url(where) else index_beside(expand_shards(where))
    return None if index is None else index.classes


def _class_folders(root: Path, on_bad: OnBad) -> LabelledImages:
    names = _names_in(root)
    if not names:
        raise DataError(
            f"{root} holds neither .tar shards nor class folders; expected shards that `milan-pipe prepare` writes, or "
            "one subfolder of images per class"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        for path in files_under(root / name):
            if path.suffix[1:].lower() in IMAGE_SUFFIXES:
                files.append(path)
                labels.append(label)
            else:
                on_bad(_key(path, root), f"no image of type {', '.join(IMAGE_SUFFIXES)}")
    if not files:
        raise MissingError(
            mistaken(root, IMAGES)
            or f"{root} has {len(names)} subfolders, as {names[0]}, and no images in them; expected one subfolder of "
            f"images ({', '.join(IMAGE_SUFFIXES)}) per class"
        )
    empty = sorted(set(range(len(names))) - set(labels))
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(names)} class folders of {root} hold no images, as {names[empty[0]]}; remove "
            "them or fill them"
        )
    keys = [_key(path, root) for path in files]
    return LabelledImages(
        where=str(root),
        keys=keys,
        label_N=np.array(labels, dtype=np.int64),
        classes=tuple(map(printable_name, names)),
        fingerprint=_fingerprint(keys, labels),
        sizes=digest_of_files(files),
        read=partial(nth_file, files),
        files=files,
    )


def _key(path: Path, root: Path) -> str:
    return printable_name(path.relative_to(root).as_posix())


def _in_shards(where: str | Path, on_bad: OnBad) -> LabelledImages:
    shards = expand_shards(where)
    located: list[tuple[ShardFile, Sample]] = []
    for shard in shards:
        for at in read_shard(shard, on_bad, locate=True):
            if at.label < 0:
                raise no_label(shard, at.key)
            located.append((shard, at))
    if not located:
        raise DataError(f"none of the images of {where} can be used; prepare the shards again")
    keys = [at.key for _, at in located]
    labels = [at.label for _, at in located]
    return LabelledImages(
        where=str(where),
        keys=keys,
        label_N=np.array(labels, dtype=np.int64),
        classes=index.classes if (index := index_beside(shards)) else None,
        fingerprint=_fingerprint([f"{shard.name}/{at.key}" for shard, at in located], labels),
        sizes=digest_of_sizes(len(at.image) for _, at in located),
        read=partial(nth_span, [(shard, at.image) for shard, at in located]),
    )


def no_label(shard: ShardFile, key: str) -> DataError:
    """The error of an image without a label."""
    return DataError(
        f"shard {shard}: image {key!r} has no label; put images into one folder per class and run "
        "`milan-pipe prepare`, or add a .cls member with the class index"
    )


def _fingerprint(keys: Sequence[str], labels: Sequence[int]) -> str:
    return sha256_of("".join(f"{key}\0{label}\n" for key, label in zip(keys, labels, strict=True)).encode())


def digest_of_sizes(sizes: Iterable[int]) -> str:
    """Of numbers of bytes, in their order."""
    return sha256_of(json.dumps(list(sizes)).encode())


def digest_of_files(files: Sequence[Path]) -> str:
    """Of the sizes of some of them, evenly spaced: asking a network file system for those of millions takes minutes."""
    count = min(_MOST_ASKED, len(files))
    return digest_of_sizes(_size(files[number * len(files) // count]) for number in range(count))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # Reading it says why.
        return -1


def warn_if_shared(train: str | Path, test: str | Path) -> None:
    """Warn where both are one folder, or have a shard in common: a score on what was trained on says little."""
    if _places(train) & _places(test):
        message = f"{train} and {test} have images in common: the score says little about images that were not seen"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def warn_if_images_shared(train: NumberedImages, test: NumberedImages) -> None:
    """`warn_if_shared`, but that of ADE20K's folder each takes its own part."""
    if train.where != test.where or train.fingerprint == test.fingerprint:
        warn_if_shared(train.where, test.where)


def _places(where: str | Path) -> set[Path]:
    try:
        return {real_path(str(shard)) for shard in expand_shards(where)}
    except MilanError:
        return {real_path(where)}


def require_same_names(
    train: str | Path, train_names: Sequence[str] | None, test: str | Path, test_names: Sequence[str] | None
) -> None:
    """Raise DataError where both have names of their classes, and other ones."""
    if train_names is None or test_names is None or tuple(train_names) == tuple(test_names):
        return
    only_train = [name for name in train_names if name not in test_names]
    only_test = [name for name in test_names if name not in train_names]
    sides = (train, only_train), (test, only_test)
    changes = "; ".join(f"only {where} has {some(names, 5)}" for where, names in sides if names)
    raise DataError(
        f"{train} and {test} have different classes: {changes or 'their order differs'}; a label is the number of a "
        "class name in order, so both need the same names"
    )


def require_same_classes(train: LabelledImages, val: LabelledImages) -> int:
    """The number of classes that both share.

    Raises:
        DataError: the names of the classes differ, or VAL has a label that TRAIN has not.
    """
    require_same_names(train.where, train.classes, val.where, val.classes)
    named = train.classes or val.classes
    classes = int(train.label_N.max()) + 1 if named is None else len(named)
    if classes > _MOST_CLASSES:
        raise DataError(f"{train.where} has label {classes - 1}, expected fewer than {_MOST_CLASSES} classes")
    for side in (train, val):
        number = int(side.label_N.argmax())
        if side.label_N[number] >= classes:
            known = f"{classes} classes are named" if named is not None else f"TRAIN has labels 0 to {classes - 1}"
            raise DataError(
                f"{side.where}: image {side.keys[number]!r} has label {side.label_N[number]}, {known}; prepare both "
                "from folders of the same class names"
            )
    return classes
