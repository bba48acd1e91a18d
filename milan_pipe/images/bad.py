"""When unreadable images are too many."""

from __future__ import annotations

_JUDGED_FROM_IMAGES, _JUDGED_FROM_SHARE = 1000, 0.1


def too_many_bad(bad: int, seen: int, done: int, shards: int, limit: float) -> bool:
    """Whether more than a share `limit` of all images is bad, of which `done` of `shards` shards are known.

    Judged once it is sure, or once enough of the whole is known: a first shard may hold all that is bad.

    Args:
        seen: images known, bad ones included.
    """
    whole = seen * shards / max(done, 1)
    is_enough = seen >= _JUDGED_FROM_IMAGES and seen >= _JUDGED_FROM_SHARE * whole
    return bad > limit * (seen if is_enough else whole)
