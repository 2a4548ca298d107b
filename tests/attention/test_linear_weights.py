"""Test how linear time's kernels multiply columns by weights, on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which is not installed")
import triton.language as tl  # noqa: E402
from flash_attn.nosoftmax.backends.linear.kernels import _scaled  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _scale(columns, weights, out, N: tl.constexpr, PAIRS: tl.constexpr):
    at = tl.arange(0, N)
    places = at[:, None] * N + at[None, :]
    tl.store(out + places, _scaled(tl.load(columns + places), tl.load(weights + at), PAIRS))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_products_are_rounded_once(dtype, size, pairs):
    """They are those of float32 but for some that lie in the middle of two 16-bit numbers, within 1 in the
    last place. A weight that is rounded to 16 bit before would change about half of them.
    """
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(64, 64, generator=generator).to(DEVICE, dtype)
    weights = (torch.rand(64, generator=generator) * size).to(DEVICE)
    out = torch.empty_like(columns)
    _scale[(1,)](columns, weights, out, 64, pairs)
    expected = (columns.float() * weights).to(dtype)
    other = out != expected
    assert other.float().mean() < (0.02 if pairs and dtype == torch.bfloat16 else 1e-9)
    torch.testing.assert_close(out[other], expected[other], rtol=2.0**-7, atol=0.0)


def test_what_is_not_finite_shows():
    columns = torch.ones(16, 16, device=DEVICE, dtype=torch.bfloat16)
    columns[0, 0], columns[1, 1] = torch.inf, torch.nan
    out = torch.empty_like(columns)
    _scale[(1,)](columns, torch.full((16,), 0.3, device=DEVICE), out, 16, True)
    assert not out[0, 0].isfinite() and out[1, 1].isnan()
    assert out.isfinite().sum() == 254
