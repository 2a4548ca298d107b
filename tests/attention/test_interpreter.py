"""Test that the quickened interpreter of Triton gives right results, and leaves the language as it was."""

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
