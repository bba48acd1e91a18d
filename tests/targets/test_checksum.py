"""Chunks of a file by an index that may lie."""

from __future__ import annotations

import numpy as np
import pytest

from milan_pipe.targets.checksum import crc32c, read_chunks


def file_of(rows: list[bytes]) -> bytes:
    return b"".join(row + crc32c(row).to_bytes(4, "little") for row in rows)


def read(data: bytes, index: list[list[int]]) -> np.ndarray:
    def part(begin, memory, on_part):
        found = data[begin : begin + len(memory)]
        for count in range(1, len(found) + 1):
            memory[:count] = found[:count]
            on_part(count)
        return len(found)

    chunks = np.empty((len(index), 12), np.uint8)
    read_chunks(part, np.array(index, np.uint64), 0, len(index), chunks, len(data))
    return chunks[:, :8]


ROWS = [bytes(range(start, start + 8)) for start in (0, 50, 100)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0]])
def test_chunks_in_any_order(order: list[int]) -> None:
    found = read(file_of(ROWS), [[12 * row, 12] for row in order])
    assert [bytes(row) for row in found] == [ROWS[row] for row in order]


def test_what_was_not_written_is_zeros() -> None:
    found = read(file_of(ROWS), [[12, 12], [2**64 - 1, 2**64 - 1], [0, 12]])
    assert [bytes(row) for row in found] == [ROWS[1], bytes(8), ROWS[0]]


@pytest.mark.parametrize("position", range(36))
def test_a_flipped_byte_of_any_chunk_is_found(position: int) -> None:
    data = bytearray(file_of(ROWS))
    data[position] ^= 1
    with pytest.raises(ValueError, match=f"chunk {position // 12}"):
        read(bytes(data), [[0, 12], [12, 12], [24, 12]])


@pytest.mark.parametrize("index", [[[0, 12], [2**41, 12]], [[30, 12]], [[0, 13]]])
def test_an_index_that_leads_elsewhere_costs_nothing(index: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"leads to byte|has 13 to 13 bytes"):
        read(file_of(ROWS), index)
