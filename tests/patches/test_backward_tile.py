"""Test the arithmetic of a tile of the CUDA backward kernel, and where it adds dQ, compiled for the CPU.

The code is the kernel's (``ScoreWeights::differentiate``), for every tile that is launched. The threads of a
block run in turn. Left out are the conversions to fp16, which are PTX, and all that needs more than one
thread at a time: matrix products and the sums of dQ.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from oracle import FUNCTIONS

pytestmark = [pytest.mark.source, pytest.mark.slow]
NUM_TILES = 9
SEQLEN_Q, SEQLEN_K = 700, 650
SCALE, BIAS, SLOPE = 0.25, -0.5, 0.03
KERNELS = ("special", "general", "one activation")
OWN = ("relu", "relu2", "sigmoid", "silu")


@pytest.fixture(scope="module")
def library(on_host) -> ctypes.CDLL:
    loaded = on_host("backward_tile.cpp")
    loaded.count_added.restype = ctypes.c_bool
    assert loaded.number_of_tiles() == NUM_TILES
    return loaded


def shape_of(library: ctypes.CDLL, tile: int) -> tuple[int, int, int]:
    """The queries and keys of a tile, and its head size."""
    sizes = (ctypes.c_int * 3)()
    library.shape_of_tile(tile, sizes)
    return tuple(sizes)


@pytest.mark.parametrize(
    "kernel, per_visible",
    [("special", False), ("general", False), ("general", True), ("one activation", False)],
    ids=str,
)
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("tile", range(NUM_TILES))
def test_weights_and_derivatives(library, tile, activation, kernel, per_visible):
    """P and dS of a tile, with a decay in a general kernel, and factors of rows relative to the largest. What
    the mask hides is 0, even where dP is NaN.
    """
    if kernel == "one activation" and activation not in OWN:
        pytest.skip("has no kernel of its own")
    torch.manual_seed(0)
    rows, cols, _ = shape_of(library, tile)
    row = torch.arange(256, 256 + rows)[:, None]
    col = torch.arange(192, 192 + cols)
    last_key = row + SEQLEN_K - SEQLEN_Q  # that a query sees, in or before the tile's columns
    raw = torch.randn(rows, cols) * 8
    visible = col <= last_key
    dp = torch.where(visible, torch.randn(rows, cols), torch.nan)
    p, ds = torch.full_like(raw, torch.nan), torch.full_like(raw, torch.nan)
    library.differentiate(
        tile, KERNELS.index(kernel), list(FUNCTIONS).index(activation),
        *map(ctypes.c_float, (SCALE, BIAS, SLOPE)), per_visible, SEQLEN_Q, SEQLEN_K, int(row[0]), int(col[0]),
        *(ctypes.c_void_p(x.data_ptr()) for x in (raw, dp, p, ds)),
    )  # fmt: skip

    s = (raw.double() * SCALE).requires_grad_()
    value = FUNCTIONS[activation](s, BIAS)
    (slope,) = torch.autograd.grad(value.sum(), s)
    weight = torch.ones_like(s)
    if kernel == "general":
        weight = weight * torch.exp(-SLOPE * (last_key - col).abs())
    elif activation in ("identity", "relu"):
        value = value / SCALE  # waits for the end
    elif activation == "relu2" and kernel == "one activation":
        value = value / SCALE**2
    if per_visible:  # the query that sees the fewest keys sees one, or counts as one
        weight = weight / (last_key + 1)
    expected = torch.where(visible, value * weight, 0.0).detach()
    error = (p.double() - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() + 1e-6).all(), f"P is off by {error.max():.3g}"
    expected, bound = (torch.where(visible, x * weight, 0.0) for x in (dp * slope, dp.abs()))
    error = (ds.double() - expected).abs()
    assert (error <= 2.0**-12 * bound).all(), f"dS is off by {error.max():.3g}"


@pytest.mark.parametrize("tile", range(NUM_TILES))
def test_vectors_of_dq_cover_the_tile(library, tile):
    """The threads' vectors are whole, aligned, and meet each element of dQ once."""
    rows, _, head_dim = shape_of(library, tile)
    counts = torch.zeros(rows, head_dim, dtype=torch.int32)
    assert library.count_added(tile, ctypes.c_void_p(counts.data_ptr()))
    assert (counts == 1).all()
