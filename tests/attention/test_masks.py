"""Test causal masks and windows, aligned to the bottom right, and results that must be exactly zero."""

from __future__ import annotations

import pytest
import torch

from measure import compare, gradients, poisoned, qkv
from oracle import Options, visibility

SHAPES = [(1, 1), (1, 9), (9, 1), (7, 9), (9, 7), (16, 16), (3, 70), (70, 3)]
WINDOWS = [(0, 0), (2, 1), (3, 0), (0, 3), (2, -1), (-1, 1)]
FULL_SIZE = [(128, 128), (113, 203), (799, 3), (239, 1), (3, 799), (1, 239)]


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_small_shapes(attention, causal, seqlen_q, seqlen_k):
    """The mask aligns to the bottom right for every relation of the two lengths."""
    compare(attention, *qkv(attention, seqlen_q=seqlen_q, seqlen_k=seqlen_k), causal=causal)


@pytest.mark.parametrize("seqlen_q, seqlen_k", FULL_SIZE)
def test_causal(attention, seqlen_q, seqlen_k):
    """dS is masked like P (dQ and dK), also for queries that see no key, and for a single query."""
    compare(attention, *qkv(attention, 1, seqlen_q, seqlen_k, head_dim=64), causal=True)


def test_causal_does_not_matter_for_one_query(attention):
    """The last query sees every key, with and without causal."""
    q, k, v = qkv(attention, seqlen_q=1, seqlen_k=37)
    for a, b in zip(
        *(
            gradients(lambda *x: attention.dense(*x, causal=c, deterministic=True), q, k, v)
            for c in (False, True)
        )
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 9), (8, 7), (33, 65)])
def test_windows(attention, window_size, seqlen_q, seqlen_k):
    """Windows may be closed on both sides or one side, or hide every neighbour."""
    compare(attention, *qkv(attention, 1, seqlen_q, seqlen_k), window_size=window_size)


@pytest.mark.parametrize("seqlen, window_size", [(257, (64, 17)), (1025, (100, 31)), (1025, (512, 0))])
def test_wide_windows(attention, seqlen, window_size):
    """Windows may begin and end within blocks of a kernel."""
    compare(attention, *qkv(attention, 1, seqlen, seqlen, nheads=1, head_dim=16), window_size=window_size)


@pytest.mark.parametrize("window_size", [(0, 0), (5, 3), (0, 6)])
def test_windows_over_fewer_keys(attention, window_size):
    """Windows are right with more queries than keys."""
    compare(attention, *qkv(attention, 1, 70, 33), window_size=window_size)


def test_causal_window(attention):
    """Causal closes the right side of a window and leaves its left side."""
    compare(attention, *qkv(attention, seqlen_q=30, seqlen_k=33), causal=True, window_size=(5, 7))


@pytest.mark.parametrize(
    "function", [dict(), dict(activation="sigmoid"), dict(activation="silu", normalization="1/visible")]
)
def test_queries_without_keys_are_zero(attention, function):
    """Queries without keys have an output and gradient of exactly 0, and the gradients of the keys stay
    finite.
    """
    q, k, v = qkv(attention, seqlen_q=79, seqlen_k=3)
    out, dq, dk, dv = gradients(lambda *x: attention.dense(*x, causal=True, **function), q, k, v)
    assert not out[:, :76].any() and not dq[:, :76].any()
    assert out[:, 76:].all(), "queries that see a key must have an output"
    assert torch.isfinite(torch.cat([dk, dv])).all()


@pytest.mark.parametrize("function", [dict(), dict(activation="sigmoid")])
def test_keys_without_queries_have_no_gradient(attention, function):
    """Keys without queries have gradients of exactly 0, even if no part of a kernel has read their block."""
    q, k, v = qkv(attention, seqlen_q=3, seqlen_k=799, nheads=1)
    _, _, dk, dv = gradients(lambda *x: attention.dense(*x, window_size=(2, 2), **function), q, k, v)
    seen = visibility(3, 799, Options(window_size=(2, 2))).any(0)
    assert not dk[:, ~seen].any() and not dv[:, ~seen].any()
    assert dk[:, seen].all() and dv[:, seen].all()


@pytest.mark.parametrize("function", [dict(), dict(activation="sigmoid"), dict(activation="silu")])
def test_keys_outside_every_window_do_not_matter(attention, function):
    """The result is bit for bit the same, whatever such keys hold."""
    q, k, v = qkv(attention, seqlen_q=5, seqlen_k=90, nheads=1)
    hidden = ~visibility(5, 90, Options(window_size=(6, 3))).any(0)
    options = dict(function, window_size=(6, 3), deterministic=True)
    results = []
    for filling in (0.0, 1e4):
        keys = (poisoned(x, (slice(None), hidden), filling) for x in (k, v))
        results.append(gradients(lambda *x: attention.dense(*x, **options), q, *keys))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_masked_is_zero_not_function_of_zero(attention):
    """f(0) is 1/2 for sigmoid, but a masked entry is 0 after f. Each row is half the sum of the values that
    it sees.
    """
    q, k, v = qkv(attention, seqlen_q=6, seqlen_k=6)
    out = attention.dense(torch.zeros_like(q), k, v, causal=True, activation="sigmoid")
    assert torch.allclose(out, v.cumsum(1) / 2, rtol=1e-2 if v.dtype == torch.float16 else 1e-12, atol=1e-3)
