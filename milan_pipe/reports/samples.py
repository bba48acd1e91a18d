"""Which samples of a store are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from milan_pipe.errors import MissingError, SettingError
from milan_pipe.loader.dataset import Targets


def choose_samples(targets: Targets, keys: Sequence[str], count: int) -> list[int]:
    """Numbers of the samples with these keys, in that order, or of `count` samples spread evenly over the store.

    Raises:
        MissingError: keys are not in the store; names them, and what keys look like.
        SettingError: `count` is below 1.
    """
    if keys:
        missing = [key for key in keys if key not in targets]
        if missing:
            raise MissingError(targets.no_sample(", ".join(missing)))
        return [targets.index(key) for key in keys]
    if count < 1:
        raise SettingError(f"number of images: found {count}, expected at least 1")
    return sorted({len(targets) * (2 * number + 1) // (2 * count) for number in range(count)})
