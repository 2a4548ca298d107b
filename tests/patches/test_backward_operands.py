"""Test where the backward that is made of three forward passes reads and writes, compiled for the CPU.

If a causal mask is transposed over as many queries as keys, all rows are walked from the last to the first.
"""

from __future__ import annotations

import ctypes

import pytest

pytestmark = [pytest.mark.source, pytest.mark.slow]
SEQLEN, ROW_STRIDE, SIZE = 7, 96, 2  # rows, elements a row, bytes of an element


@pytest.fixture(scope="module")
def library(on_host) -> ctypes.CDLL:
    return on_host("backward_operands.cpp")


def operands(library: ctypes.CDLL, is_causal: bool, is_wide: bool, seqlen_k: int) -> list[dict]:
    """For dQ, dK and dV: tensor of the launch -> (bytes to its first row, elements to the next row)."""
    found = (ctypes.c_int64 * 24)()
    library.operands(is_causal, is_wide, SEQLEN, seqlen_k, ctypes.c_int64(ROW_STRIDE), found)
    launches = (found[i : i + 8] for i in (0, 8, 16))
    return [dict(zip("qkvo", zip(launch[:4], launch[4:]))) for launch in launches]


@pytest.mark.parametrize("is_wide", [False, True], ids=["16 bit", "float32"])
def test_rows_are_walked_from_the_last_one(library, is_wide):
    dq, *transposed = operands(library, True, is_wide, SEQLEN)
    assert dq == dict.fromkeys("qkvo", (0, ROW_STRIDE))
    for launch in transposed:
        for name, (offset, stride) in launch.items():
            size = 4 if is_wide and name == "o" else SIZE
            assert (offset, stride) == ((SEQLEN - 1) * ROW_STRIDE * size, -ROW_STRIDE), name


@pytest.mark.parametrize("is_causal, seqlen_k", [(False, SEQLEN), (True, SEQLEN + 1)])
def test_other_masks_are_walked_from_the_first_row(library, is_causal, seqlen_k):
    for launch in operands(library, is_causal, True, seqlen_k):
        assert launch == dict.fromkeys("qkvo", (0, ROW_STRIDE))
