"""Test that the changed interpreter of Triton gives right results, in bfloat16 too, and leaves the language
as it was."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which is not installed")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton compiles")


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _fill(out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, _twice(_twice(at)) + tl.max(at, 0) + tl.program_id(0) * 0)


@triton.jit
def _fail(out):
    tl.store(out, _twice(out))


def test_launches_are_right_and_leave_the_language_as_it_was():
    before = {name: getattr(tl, name) for name in ("arange", "store", "range", "reduce", "program_id")}
    for _ in range(2):
        out = torch.zeros(8, dtype=torch.int32)
        _fill[(2,)](out, 8)
        assert out.tolist() == [4 * i + 7 for i in range(8)]
        assert all(getattr(tl, name) is function for name, function in before.items())
        with pytest.raises(Exception, match="add pointers"):
            _fail[(1,)](out)
        assert all(getattr(tl, name) is function for name, function in before.items())


@triton.jit
def _multiply(x, y, product, sum_, scaled, fused, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(product + at, tl.dot(a, b))
    tl.store(sum_ + at, (a.to(tl.float32) + b.to(tl.float32)).to(tl.bfloat16))
    tl.store(scaled + at, a * b)
    tl.store(fused + at, tl.fma(a, b, a * b))


def test_bfloat16():
    """Products are of the numbers, and float32 is rounded as torch does it."""
    x, y = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    x[0, :3] = torch.tensor([1.0, torch.inf, torch.nan])
    y[0, :3] = torch.tensor([2.0**-8, 1.0, 1.0])  # 1 + 2^-8 is as far from 1 as from the next number
    product = torch.empty(16, 16)
    total, scaled, fused = (torch.empty(16, 16, dtype=torch.bfloat16) for _ in range(3))
    _multiply[(1,)](x, y, product, total, scaled, fused, 16)
    torch.testing.assert_close(product, x.float() @ y.float(), equal_nan=True)
    torch.testing.assert_close(total, (x.float() + y.float()).bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scaled, x * y, rtol=0, atol=0, equal_nan=True)
    # The product that is added is rounded, the other one is not.
    exact = (x.double() * y.double() + (x * y).double()).bfloat16()
    torch.testing.assert_close(fused, exact, rtol=0, atol=0, equal_nan=True)
