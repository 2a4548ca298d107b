"""Test grouped key-value heads: query head h reads key head h // group, and a key head sums its group's
gradients.
"""

from __future__ import annotations

import math

import pytest
import torch

from measure import NAMES, assert_same, compare, compare_output, gradients, qkv, randn, slopes


@pytest.mark.parametrize("nheads_k", [1, 2, 6])
@pytest.mark.parametrize(
    "options", [dict(causal=True), dict(window_size=(4, 3), softcap=3.0), dict(activation="silu")]
)
def test_groups(attention, nheads_k, options):
    """Grouped heads are right in forward and backward."""
    compare(attention, *qkv(attention, 2, 17, 21, nheads=6, nheads_k=nheads_k), **options)


def test_groups_equal_repeated_heads(attention):
    """The result equals that of repeated k and v, whose gradients add up."""
    q, k, v = qkv(attention, 2, 17, 21, nheads=6, nheads_k=2)

    def repeated(q, k, v):
        return attention.dense(q, *(x.repeat_interleave(3, 2) for x in (k, v)), causal=True)

    for name, a, b in zip(
        NAMES, gradients(lambda *x: attention.dense(*x, causal=True), q, k, v), gradients(repeated, q, k, v)
    ):
        assert_same(name, a, b)


@pytest.mark.parametrize("nheads_k", [1, 2])
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(window_size=(4, 0)), dict(alibi=True)])
def test_one_query(attention, nheads_k, options):
    """A kernel may treat the heads of a group as queries, which must keep their order."""
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(attention, 6)
    compare(attention, *qkv(attention, 2, 1, 21, nheads=6, nheads_k=nheads_k), **options)


def test_one_query_varlen(attention):
    """The same holds for packed sequences."""
    q, k, v = (randn(total, h, 8, seed=total + h, like=attention) for total, h in ((3, 6), (20, 2), (20, 2)))
    compare(attention, q, k, v, method="varlen", lengths_q=[1, 1, 1], lengths_k=[4, 9, 7])


@pytest.mark.parametrize("causal", [False, True])
def test_one_query_kvcache(attention, causal):
    """The same holds when decoding."""
    q, k, v = qkv(attention, 2, 1, 40, nheads=6, nheads_k=2)
    lengths = torch.tensor([11, 40], dtype=torch.int32, device=attention.device)
    compare_output(attention, q, k, v, method="kvcache", cache_seqlens=lengths, causal=causal)


def test_group_sum_in_float16(attention):
    """dV is +90510 from one head and -90510 from the other. Both are out of range, their sum is 0, and a
    finite result is right.
    """
    q, k, v, dout = (
        torch.ones(1, 16, h, 8, dtype=torch.float16, device=attention.device) for h in (2, 1, 1, 2)
    )
    q[:, :, 0], q[:, :, 1] = 10, -10
    *_, dv = gradients(attention.dense, q, k, v, dout=dout * 200)
    assert all(not math.isfinite(x) or abs(x) < 1 for x in dv.flatten().tolist()), f"dV is {dv.flatten()[0]}"
