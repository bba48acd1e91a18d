"""What a segmentation and its probe make of masks: classes, and a loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from milan_pipe.config.evaluation import SegmentSettings
from milan_pipe.errors import MismatchError, SettingError
from milan_pipe.images.masked import MaskedImages, MaskRule, read_classes

# Values of a mask of 16 bits.
_MOST_CLASSES = 2**16


def rule_and_names(
    train: MaskedImages, val: MaskedImages, settings: SegmentSettings
) -> tuple[MaskRule, tuple[str, ...]]:
    """How masks become class indices, and the names of the classes.

    Raises:
        MismatchError: TRAIN and VAL have different class lists, or 0 is a class in one of them alone.
        SettingError: the classes are not known, there is one alone, or there are more than masks have values.
        MissingError, DataError: as `read_classes`.
    """
    if train.classes is not None and val.classes is not None and train.classes != val.classes:
        raise MismatchError(
            f"TRAIN and VAL have different class lists: {train.where} {_described(train.classes)}, {val.where} "
            f"{_described(val.classes)}"
        )
    given = settings.classes if settings.classes is not None else train.classes or val.classes
    if given is None:
        raise SettingError(
            f"the classes of {train.where} are not known; set segment.classes to a file with their names, one a "
            "line, or to their number, or put a classes.txt beside the folders"
        )
    if isinstance(given, str):
        given = read_classes(given)
    count = given if isinstance(given, int) else len(given)
    if not 0 < count <= _MOST_CLASSES:
        raise SettingError(f"there are {count} classes, expected 2 to {_MOST_CLASSES}; set segment.classes")
    names = tuple(f"class {number}" for number in range(given)) if isinstance(given, int) else given
    if len(names) < 2:
        raise SettingError(f"there is one class, {names[0]!r}; a segmentation needs two at least")
    reduce = settings.reduce_zero_label
    if reduce is None and train.zero_is_ignored != val.zero_is_ignored:
        ade, other = (train, val) if train.zero_is_ignored else (val, train)
        raise MismatchError(
            f"TRAIN and VAL have masks of two kinds: 0 is no class in {ade.where}, which is laid out as ADE20K, and "
            f"the first class in {other.where}; set segment.reduce_zero_label to what holds for both"
        )
    rule = MaskRule(
        classes=len(names),
        ignore_index=settings.ignore_index,
        zero_is_ignored=train.zero_is_ignored if reduce is None else reduce,
    )
    return rule, names


def _described(classes: tuple[str, ...] | int) -> str:
    return f"{classes} classes" if isinstance(classes, int) else f"{len(classes)} classes ({', '.join(classes[:5])})"


def pixel_losses(logits_BGHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels that have a class; -1 is none."""
    # Pixels in a row, classes innermost, as UperNet leaves them, in float32: half the time of the same loss on maps.
    logits_NG = logits_BGHW.permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(logits_NG, mask_BHW.flatten(), ignore_index=-1, reduction="sum")
