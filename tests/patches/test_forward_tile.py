"""Test the arithmetic of a tile of the CUDA forward kernels, compiled for the CPU.

The code is the kernels' (``ScoreWeights``, ``convert_products``). The threads of a block run in turn. Left
out are the conversions to fp16, which are PTX, and matrix products.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from oracle import FUNCTIONS

pytestmark = [pytest.mark.source, pytest.mark.slow]
SEQLEN_Q, SEQLEN_K = 700, 650
OWN = ("identity", "relu", "relu2", "sigmoid", "silu")
KINDS = ("plain", "own", "general")  # own: the kernel has no other activation
KERNELS = [
    *((f, "plain", 0.0) for f in FUNCTIONS if f != "identity"), *((f, "own", 0.0) for f in OWN),
    *((f, "general", softcap) for f in FUNCTIONS for softcap in (0.0, 5.0)),
]  # fmt: skip


@pytest.fixture(scope="module")
def library(on_host) -> ctypes.CDLL:
    return on_host("forward_tile.cpp")


@pytest.mark.parametrize("first_col", [128, 256, 576], ids=["visible", "on the diagonal", "at the end"])
@pytest.mark.parametrize("scale, bias", [(0.25, -0.5), (3.0, 0.0)], ids=str)
@pytest.mark.parametrize("activation, kind, softcap", KERNELS, ids=str)
@pytest.mark.parametrize("head_dim, rows, cols", [(64, 128, 128), (128, 128, 64)], ids=str)
def test_weights(library, head_dim, rows, cols, activation, kind, softcap, scale, bias, first_col):
    """P of a tile, times what waits for the end. What the mask hides is 0, even where the score is NaN."""
    torch.manual_seed(0)
    row = torch.arange(640 if first_col > 500 else 320, 10**6)[:rows, None]
    col = torch.arange(first_col, first_col + cols)
    visible = (col <= row + SEQLEN_K - SEQLEN_Q) & (col < SEQLEN_K)
    raw = torch.where(visible, torch.randn(rows, cols) * 8, torch.nan)
    p = torch.full_like(raw, torch.nan)
    library.weigh(
        head_dim, KINDS.index(kind), list(FUNCTIONS).index(activation),
        *map(ctypes.c_float, (scale, bias, softcap)),
        SEQLEN_Q, SEQLEN_K, int(row[0]), first_col, *(ctypes.c_void_p(x.data_ptr()) for x in (raw, p)),
    )  # fmt: skip
    score = raw.nan_to_num(0.0).double() * scale
    value = FUNCTIONS[activation](score if softcap == 0.0 else softcap * (score / softcap).tanh(), bias)
    expected = torch.where(visible, value, 0.0)
    error = (p.double() - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() + 1e-6).all(), f"P is off by {error.max():.3g}"
