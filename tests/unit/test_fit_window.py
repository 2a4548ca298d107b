"""Test windows in the host code of the CUDA extension: fit_window of src/window.h, compiled, against the
contract.
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
extern "C" void fit(int *left, int *right, int max_seqlen_q, int max_seqlen_k, bool stays_windowed) {
    flash::fit_window(*left, *right, max_seqlen_q, max_seqlen_k, stays_windowed);
}
"""
SIDES = (-1, 0, 1, 2, 3, 4, 5, 9)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Compile the function (left, right, max_seqlen_q, max_seqlen_k, stays_windowed) -> (left, right)."""
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
    library = ctypes.CDLL(str(folder / "window.so"))

    def fitted(left: int, right: int, *lengths: int) -> tuple[int, int]:
        sides = ctypes.c_int(left), ctypes.c_int(right)
        library.fit(*map(ctypes.byref, sides), *lengths)
        return sides[0].value, sides[1].value

    return fitted


def visible(seqlen_q: int, seqlen_k: int, left: int, right: int) -> list[tuple[int, int]]:
    return [
        (i, j)
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k))
        for c in [i + seqlen_k - seqlen_q]
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
