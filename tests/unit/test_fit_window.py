"""Test windows in the CUDA extension, src/window.h, compiled: fit_window and open_sides of the host code, and
shifted_side of the kernels, with the bounds that the kernels take from it, against the contract.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

HEADER = Path(__file__).parents[2] / "overlay" / "flash-attn" / "csrc" / "flash_attn" / "src" / "window.h"
PROGRAM = """
#define FLASH_NAMESPACE flash
#include "window.h"
extern "C" void open_sides(int *left, int *right) { flash::open_sides(*left, *right); }
extern "C" int shifted_side(int side, int shift) { return flash::shifted_side(side, shift); }
extern "C" void fit(int *left, int *right, int max_seqlen_q, int max_seqlen_k, bool stays_windowed) {
    flash::fit_window(*left, *right, max_seqlen_q, max_seqlen_k, stays_windowed);
}
"""
SIDES = (-1, 0, 1, 2, 3, 4, 5, 9)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Compile and load the functions of the header."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("window")
    (folder / "window.cpp").write_text(PROGRAM)
    (folder / "namespace_config.h").write_text("#pragma once\n")
    command = [
        "g++",
        "-shared",
        "-fPIC",
        f"-I{folder}",
        f"-I{HEADER.parent}",
        "window.cpp",
        "-o",
        "window.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "window.so"))


@pytest.fixture(scope="module")
def fit(header):
    """The function (left, right, max_seqlen_q, max_seqlen_k, stays_windowed) -> (left, right)."""

    def fitted(left: int, right: int, *lengths: int) -> tuple[int, int]:
        sides = ctypes.c_int(left), ctypes.c_int(right)
        header.fit(*map(ctypes.byref, sides), *lengths)
        return sides[0].value, sides[1].value

    return fitted


def visible(
    seqlen_q: int, seqlen_k: int, left: int, right: int, diagonal: int | None = None
) -> list[tuple[int, int]]:
    first = seqlen_k - seqlen_q if diagonal is None else diagonal
    return [
        (i, j)
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k))
        for c in [i + first]
        if (left < 0 or j >= c - left) and (right < 0 or j <= c + right)
    ]


@pytest.mark.parametrize("stays_windowed", [False, True])
@pytest.mark.parametrize("longest", [(10, 4), (4, 10), (5, 5), (1, 7), (7, 1)], ids=str)
def test_the_same_keys_are_visible(fit, longest, stays_windowed):
    """Every packed sequence sees the same keys, whatever the longest sequence is, with more queries than keys
    or more keys.
    """
    for left, right in itertools.product(SIDES, SIDES):
        sides = fit(left, right, *longest, stays_windowed)
        # As set_params_fprop does: kernels take both sides or none.
        kernel = (longest[1], sides[1]) if sides[0] < 0 <= sides[1] else sides
        assert (kernel[0] < 0) == (kernel[1] < 0)
        for lengths in itertools.product(range(1, longest[0] + 1), range(1, longest[1] + 1)):
            assert visible(*lengths, *kernel) == visible(*lengths, left, right), (
                lengths,
                left,
                right,
                kernel,
            )


def test_a_window_that_hides_nothing_is_open(fit):
    """An open window gets full attention's kernels, the fastest, and one query with grouped heads a faster
    layout.
    """
    assert fit(-1, 0, 1, 100, False) == (-1, -1)
    assert fit(99, 0, 1, 100, False) == (-1, -1)
    assert fit(99, 0, 7, 100, False) == (-1, 0)
    assert fit(98, 0, 7, 100, False) == (98, 0)


def test_rotary_calls_keep_their_window(fit):
    """In a call with a window of any size, queries rotate by their positions."""
    assert max(fit(100, 100, 3, 10, True)) >= 0
    assert fit(-1, -1, 3, 10, True) == (-1, -1)


# ---- With a diagonal ----

ROWS, KEYS = 4, 3  # of a tile
FAR = 2**30
DIAGONALS = (*range(-9, 10), 10**6, -(10**6), FAR - 1, FAR, -FAR)
LENGTHS = tuple(itertools.product((1, 3, 4, 9), (1, 2, 3, 7)))
WINDOWS = tuple(itertools.product((-1, 0, 2, 5, 10**6, FAR, 2**31 - 2), repeat=2))


def quotient(a: int, b: int) -> int:
    """a / b as in C++."""
    return abs(a) // b * (1 if a >= 0 else -1)


def rounded_up(a: int, b: int) -> int:
    """cute::ceil_div."""
    return quotient(a + b - 1, b)


def in_32_bits(x: int) -> int:
    assert -(2**31) <= x < 2**31, f"{x} overflows an int"
    return x


def sides_of(header, seqlen_q: int, seqlen_k: int, window: tuple[int, int], diagonal: int):
    """The sides of a sequence in the kernels, as window_of_sequence in row_factors.h makes them."""
    sides = tuple(map(ctypes.c_int, window))
    header.open_sides(*map(ctypes.byref, sides))
    shift = in_32_bits(diagonal - (seqlen_k - seqlen_q))
    return header.shifted_side(sides[0], -shift), header.shifted_side(sides[1], shift)


def forward_tiles(seqlen_q: int, seqlen_k: int, left: int, right: int):
    """The tiles (block of queries, block of keys) that flash_fwd_kernel.h visits."""
    c = seqlen_k - seqlen_q
    for m in range(rounded_up(seqlen_q, ROWS)):
        first = max(0, quotient(in_32_bits(m * ROWS + c - left), KEYS))
        last = min(rounded_up(seqlen_k, KEYS), rounded_up(in_32_bits((m + 1) * ROWS + c + right), KEYS))
        yield from ((m, n) for n in range(first, last))


def backward_tiles(seqlen_q: int, seqlen_k: int, left: int, right: int):
    """The tiles that flash_bwd_kernel.h visits."""
    c = seqlen_k - seqlen_q
    for n in range(rounded_up(seqlen_k, KEYS)):
        first = max(0, quotient(in_32_bits(n * KEYS - c - right), ROWS))
        last = min(rounded_up(seqlen_q, ROWS), rounded_up(in_32_bits((n + 1) * KEYS - c + left), ROWS))
        yield from ((m, n) for m in range(first, last))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("window", [x for x in WINDOWS if max(x) >= 0], ids=str)
def test_a_diagonal_shifts_the_window(header, window, transposed):
    """The kernels see the keys of the contract, visit every tile that has one, and read no key that no query
    sees. A pass that takes keys as queries does the same for -diagonal and the sides swapped.
    """
    for (seqlen_q, seqlen_k), diagonal in itertools.product(LENGTHS, DIAGONALS):
        expected = set(visible(seqlen_q, seqlen_k, *window, diagonal))
        if transposed:
            lengths = seqlen_k, seqlen_q
            left, right = sides_of(header, *lengths, window[::-1], -diagonal)
            expected = {(j, i) for i, j in expected}
        else:
            lengths = seqlen_q, seqlen_k
            left, right = sides_of(header, *lengths, window, diagonal)
        case = lengths, diagonal, left, right
        c = lengths[1] - lengths[0]
        seen = {
            (i, j)
            for i, j in itertools.product(*map(range, lengths))
            if in_32_bits(i + c - left) <= j < in_32_bits(i + 1 + c + right)
        }
        assert seen == expected, case
        needed = {(i // ROWS, j // KEYS) for i, j in expected}
        assert needed <= set(forward_tiles(*lengths, left, right)), case
        assert needed <= set(backward_tiles(*lengths, left, right)), case
        first, last = in_32_bits(c - left), lengths[1] + min(right, 0)
        assert all(first <= j < last for _, j in expected), case
        if not transposed and max(window) < 10:  # the number of keys that a query sees: row_factors.h
            for i in range(seqlen_q):
                stop = min(seqlen_k, in_32_bits(i + c + 1 + right))
                count = max(stop - max(in_32_bits(i + c - left), 0), 1)
                assert count == max(sum(row == i for row, _ in expected), 1), case


def test_a_call_without_a_window_stays_open(header):
    sides = ctypes.c_int(-1), ctypes.c_int(-1)
    header.open_sides(*map(ctypes.byref, sides))
    assert (sides[0].value, sides[1].value) == (-1, -1)
