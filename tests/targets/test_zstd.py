"""Frames that say, or hold, more than a reader expects."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import compress

from milan_pipe.targets.zstd import MOST_RATIO, unpacked


@given(st.binary(min_size=1, max_size=70_000), st.sampled_from([1, 9]), st.booleans())
def test_whole_frames_are_unpacked(data: bytes, level: int, checksum: bool) -> None:
    frame = compress(data, level, checksum)
    assert unpacked(frame, len(data)).tobytes() == data
    with pytest.raises((ValueError, RuntimeError)):
        unpacked(frame[:-1], len(data))


@pytest.mark.parametrize("size", [1, 255, 256, 65_791, 65_792, 10_000_000])
def test_more_than_expected_is_refused_before_room_is_made(size: int) -> None:
    with pytest.raises(ValueError, match=f"a frame of {size} bytes, expected at most {size - 1}"):
        unpacked(compress(bytes(size), 1), size - 1)


def test_a_frame_of_keys_is_bounded_by_its_own_size() -> None:
    frame = compress(bytes(100_000_000), 1)
    with pytest.raises(ValueError, match=f"expected at most {MOST_RATIO * len(frame) + 65536}"):
        unpacked(frame)


def test_keys_that_differ_in_a_number_alone_are_unpacked() -> None:
    keys = "".join(f"{'/abc' * 1000}/{number:08d}" for number in range(1000)).encode()
    assert unpacked(compress(keys, 9)).tobytes() == keys


def test_a_frame_that_says_nothing_or_too_little_is_refused() -> None:
    block = struct.pack("<I", 131_071 << 3 | 1 << 1)[:3] + b"x"
    last = struct.pack("<I", 100 << 3 | 1 << 1 | 1)[:3] + b"x"
    with pytest.raises(ValueError, match="does not say"):
        unpacked(b"\x28\xb5\x2f\xfd\0\x58" + block * 50 + last, 10_000_000)
    frame = compress(bytes(1000), 1)
    with pytest.raises(ValueError, match="too small"):
        unpacked(frame + frame, 2000)
