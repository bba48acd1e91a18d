"""Random numbers are those of the definition, whatever the library, and what is made of them is fair."""

from __future__ import annotations

import math

import numpy as np
import pytest

from milan_pipe.random_bits import permutation, raw_bits, seed_of, uniform, uniform_inside


def philox(key: bytes, count: int, sequence: int) -> list[int]:
    """Philox 4x64 of ten rounds, written from the paper; numpy counts up before it draws."""
    words: list[int] = []
    block = 0
    while len(words) < count:
        block += 1
        c0, c1, c2, c3 = block, 0, sequence, 0
        k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        for _ in range(10):
            high_0, low_0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
            high_1, low_1 = divmod(0xCA5A826395121157 * c2, 2**64)
            c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
        words += [c0, c1, c2, c3]
    return words[:count]


@pytest.mark.parametrize("sequence", [0, 2, 2**64 - 1])
def test_bits_are_those_of_the_definition(sequence: int) -> None:
    keys = [bytes(range(16)), bytes(16), b"\xff" * 16]
    assert raw_bits(keys, 11, sequence).tolist() == [philox(key, 11, sequence) for key in keys]
    assert raw_bits([], 3).shape == (0, 3)


def test_numbers_are_what_they_were() -> None:
    assert raw_bits([bytes(range(16))], 2, sequence=2).tolist() == [[5990711115544066627, 2140352479793966526]]
    assert seed_of("x", 3) == 15564378462986513906
    assert permutation(12, "x", 3).tolist() == [6, 0, 10, 7, 3, 1, 5, 2, 9, 11, 4, 8]


def test_uniform_numbers_keep_to_their_ends() -> None:
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert uniform(ends).tolist() == [0.0, 1 - 2.0**-53]
    assert uniform_inside(ends).tolist() == [2.0**-53, 1 - 2.0**-53]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 65, 1000])
def test_a_permutation_has_each_number_once(count: int) -> None:
    assert sorted(permutation(count, count, "x").tolist()) == list(range(count))


def test_a_permutation_is_the_order_of_its_bits() -> None:
    (raw,) = raw_bits([seed_of("y").to_bytes(16, "little")], 5000)
    assert permutation(5000, "y").tolist() == np.argsort(raw, kind="stable").tolist()


def test_every_order_is_drawn_equally_often() -> None:
    draws = 6000
    found = [tuple(permutation(3, "fair", number).tolist()) for number in range(draws)]
    counts = [found.count(order) for order in set(found)]
    assert len(counts) == math.factorial(3)
    # Expected 1000 each; chi-square of 5 degrees of freedom is above 20.5 once in a thousand.
    assert sum((count - draws / 6) ** 2 / (draws / 6) for count in counts) < 20.5
