"""The 32-bit words: published vectors, the counter's layout, and identity of backends to the bit."""

from __future__ import annotations

import pytest
import sdesolve_kernels as k
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import reference
from torch import Tensor

MASK = 0xFFFFFFFF
SEEDS = st.integers(0, 2**64 - 1)
STREAMS = st.integers(0, 255)
# Every word of the counter, its carries and its ends.
PATHS = st.one_of(st.integers(0, 2**64 - 64), st.integers(2**32 - 64, 2**32 + 64), st.integers(2**63 - 64, 2**63 + 64))
OFFSETS = st.one_of(
    st.integers(0, 300), st.integers(2**34 - 300, 2**34 + 300), st.integers(0, 2**58 - 300), st.just(2**58 - 300)
)


def philox_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, written from the paper's figure and not from our code."""
    c, key = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ key[1], p0 & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return c


def word(seed: int, stream: int, path: int, n: int) -> int:
    q = n // 4
    counter = [q % 2**32, path % 2**32, path // 2**32, stream + 256 * (q // 2**32)]
    return philox_integers(counter, [seed % 2**32, seed // 2**32])[n % 4]


# The known-answer tests for philox4x32-10 that are distributed with Random123.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    c = [torch.tensor([w]) for w in hexadecimal(counter)]
    k0, k1 = hexadecimal(key)
    got = reference.philox4x32((c[0], c[1], c[2], c[3]), (k0, k1))
    assert [int(w) for w in got] == hexadecimal(expected)
    assert philox_integers(hexadecimal(counter), [k0, k1]) == hexadecimal(expected)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_published_vectors_through_the_op(backend: str, counter: str, key: str, expected: str) -> None:
    c, (k0, k1) = hexadecimal(counter), hexadecimal(key)
    q, path, stream = c[0] + 2**32 * (c[3] // 256), c[1] + 2**32 * c[2], c[3] % 256
    with k.use_backend(backend):
        got = k.words(1, 4, seed=k0 + 2**32 * k1, stream=stream, first_path=path, offset=4 * q)
    assert got[0].tolist() == hexadecimal(expected)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@given(seed=SEEDS, stream=STREAMS, path=PATHS, offset=OFFSETS)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_words_follow_the_definition(backend: str, seed: int, stream: int, path: int, offset: int) -> None:
    with k.use_backend(backend):
        got = k.words(2, 6, seed=seed, stream=stream, first_path=path, offset=offset)
    assert got.tolist() == [[word(seed, stream, path + i, offset + j) for j in range(6)] for i in range(2)]


@given(seed=SEEDS, stream=STREAMS, path=PATHS, offset=OFFSETS, paths=st.integers(0, 40), count=st.integers(0, 90))
@settings(deadline=None, derandomize=True, max_examples=120)
def test_words_agree_between_backends(seed: int, stream: int, path: int, offset: int, paths: int, count: int) -> None:
    def words(backend: str) -> Tensor:
        with k.use_backend(backend):
            return k.words(paths, count, seed=seed, stream=stream, first_path=path, offset=offset)

    assert torch.equal(words("numba"), words("reference"))


def test_block_carry_inside_a_row() -> None:
    """Entry 4 * 2^32 is the first whose block number does not fit in 32 bits."""
    offset = 2**34 - 130
    got = k.words(1, 260, seed=9, stream=5, first_path=2**32 - 1, offset=offset)[0].tolist()
    assert got == [word(9, 5, 2**32 - 1, offset + j) for j in range(260)]
    assert len(set(got)) == len(got)


def test_path_carry_inside_a_column() -> None:
    first = 2**32 - 40
    got = k.words(80, 1, seed=9, stream=5, first_path=first, offset=3)[:, 0].tolist()
    assert got == [word(9, 5, first + i, 3) for i in range(80)]


def test_nothing_wraps_at_31_or_32_bits() -> None:
    """An index kept in 32 bits reuses noise; these places would then coincide."""
    places = [0, 2**31, 2**32, 2**33, 2**34, 2**35, 2**40, 2**57]
    by_offset = [tuple(k.words(1, 4, seed=1, stream=0, offset=n)[0].tolist()) for n in places]
    by_path = [tuple(k.words(1, 4, seed=1, stream=0, first_path=n)[0].tolist()) for n in places[1:]]
    by_seed = [tuple(k.words(1, 4, seed=1 + n, stream=0)[0].tolist()) for n in places[1:]]
    assert len(set(by_offset + by_path + by_seed)) == 3 * len(places) - 2
