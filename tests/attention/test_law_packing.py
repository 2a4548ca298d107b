"""Test that a sequence gives the same result alone, packed beside any other, with any sufficient max_seqlen,
and from any cache.
"""

from __future__ import annotations

import pytest
import torch
from flash_attn import flash_attn_varlen_func
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from measure import (
    NAMES,
    assert_close,
    assert_same,
    compare,
    compare_output,
    gradients,
    integers,
    packed,
    qkv,
    randn,
)
from package import cumulative

reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)

OPTIONS = [
    dict(),
    dict(causal=True),
    dict(normalization="1/n"),
    dict(causal=True, normalization="1/visible"),
    dict(window_size=(1, -1)),
    dict(window_size=(-1, 1)),
    dict(window_size=(3, 20)),
    dict(window_size=(20, 3), activation="silu", normalization="1/visible"),
    dict(window_size=(2, -1), activation="sigmoid", sigmoid_bias="-log n"),
    dict(window_size=(0, 0), softcap=2.0),
]
# (seqlen_q, seqlen_k): as many queries as keys, fewer, and far more.
SHAPES = [(9, 9), (5, 12), (10, 4), (33, 3), (1, 7)]
NEIGHBOURS = [(3, 50), (70, 2), (0, 9), (6, 0)]


def varlen(attention, q, k, v, lengths_q, lengths_k, more_q: int = 0, more_k: int = 0, **options):
    """Call the public function with max_seqlen larger than the longest sequence by ``more_q`` and
    ``more_k``.
    """
    cu_q, cu_k = (cumulative(lengths, attention.device) for lengths in (lengths_q, lengths_k))
    longest = max(lengths_q) + more_q, max(lengths_k) + more_k
    return attention._call(flash_attn_varlen_func, q, k, v, cu_q, cu_k, *longest, **options)


def assert_equal_results(actual, expected) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same(name, a, e, 8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_neighbours_do_not_matter(attention, options, seqlen_q, seqlen_k):
    """Longer and shorter neighbours, before and behind a sequence, do not change its output and gradients."""
    options = dict(options, deterministic=True)
    q, k, v = qkv(attention, 1, seqlen_q, seqlen_k, nheads=2, nheads_k=1)
    dout = randn(*q.shape, seed=99, like=attention)
    alone = gradients(lambda *x: attention.dense(*x, **options), q, k, v, dout=dout)
    for before, behind in zip(NEIGHBOURS, NEIGHBOURS[1:] + NEIGHBOURS[:1]):
        lengths = dict(lengths_q=[before[0], seqlen_q, behind[0]], lengths_k=[before[1], seqlen_k, behind[1]])
        tensors = []
        for side, x in zip("qkkq", (q, k, v, dout)):
            first, _, last = lengths[f"lengths_{side}"]
            around = (randn(n, *x.shape[2:], seed=n, like=attention) for n in (first, last))
            tensors.append(torch.cat([next(around), x[0], next(around)]))
        *inputs, gradient = tensors
        results = gradients(lambda *x: attention.varlen(*x, **lengths, **options), *inputs, dout=gradient)
        cut = [
            x[before[i] :][:n][None]
            for x, i, n in zip(results, (0, 0, 1, 1), (seqlen_q,) * 2 + (seqlen_k,) * 2)
        ]
        assert_equal_results(cut, alone)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_max_seqlen_does_not_matter(attention, options, seqlen_q, seqlen_k):
    """Any max_seqlen that is long enough, for queries and for keys, gives the same result."""
    lengths = dict(lengths_q=[seqlen_q, 2], lengths_k=[seqlen_k, 2])
    q, k, v = packed(attention, **lengths)
    dout = randn(*q.shape, seed=99, like=attention)
    exact, *others = (
        gradients(
            lambda *x: varlen(attention, *x, **lengths, more_q=a, more_k=b, deterministic=True, **options),
            q,
            k,
            v,
            dout=dout,
        )
        for a, b in ((0, 0), (0, 1), (1, 0), (0, 60), (60, 0), (200, 200))
    )
    for other in others:
        assert_equal_results(other, exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
def test_capacity_does_not_matter(attention, options, seqlen_q, seqlen_k):
    """The capacity of a cache and the content of its unused part do not matter."""
    q, k, v = qkv(attention, 2, seqlen_q, seqlen_k, nheads=2, nheads_k=1)
    expected = attention.dense(q, k, v, **options)
    for capacity in (seqlen_k, seqlen_k + 1, seqlen_q + seqlen_k, 64, 300):
        pair = [x.new_full((2, capacity, *x.shape[2:]), float("nan")) for x in (k, v)]
        for cache, x in zip(pair, (k, v)):
            cache[:, :seqlen_k] = x
        lengths = integers(attention, seqlen_k, seqlen_k)
        assert_same(
            f"capacity {capacity}", attention.kvcache(q, *pair, cache_seqlens=lengths, **options), expected, 8
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pages_do_not_matter(attention, options):
    """Dense keys, a cache and pages with the same keys give the same result."""
    q, k, v = qkv(attention, 1, 30, 20, nheads=2, nheads_k=1)
    expected = attention.dense(q, k, v, **options)
    pages = [x.new_full((3, 256, *x.shape[2:]), float("nan")) for x in (k, v)]
    for page, x in zip(pages, (k, v)):
        page[2, :20] = x[0]
    table = integers(attention, 2, 1).view(1, 2)
    decoded = attention.kvcache(
        q, *pages, cache_seqlens=integers(attention, 20), block_table=table, **options
    )
    assert_same("cache", decoded, expected, 8)
    prefilled = attention.varlen(q[0], *pages, [30], [20], block_table=table, **options)
    assert_same("varlen", prefilled, expected[0], 8)


@pytest.mark.parametrize("window_size, seen", [
    ((1, -1), [4, 4, 4, 4, 4, 4, 4, 4, 3, 2]),
    ((-1, 1), [0, 0, 0, 0, 0, 1, 2, 3, 4, 4]),
    ((0, 7), [2, 3, 4, 4, 4, 4, 4, 3, 2, 1]),
    ((3, 0), [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]),
], ids=str)  # fmt: skip
def test_the_keys_that_ten_queries_see_of_four(attention, window_size, seen):
    q, k, v = (torch.ones(1, n, 1, 8, dtype=attention.dtype, device=attention.device) for n in (10, 4, 4))
    out = attention.dense(q, k, v, softmax_scale=1 / 8, window_size=window_size)
    assert out[0, :, 0, 0].round().int().tolist() == seen


@pytest.mark.parametrize("window_size", [(31, 7), (1, -1), (-1, 1), (400, 2), (2, 400)], ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(799, 3), (300, 130)])
def test_many_queries_over_few_keys(attention, window_size, seqlen_q, seqlen_k):
    """Windows are right for many queries over few keys, in several blocks of queries."""
    compare(attention, *qkv(attention, 1, seqlen_q, seqlen_k, nheads=1, head_dim=32), window_size=window_size)


@pytest.mark.slow
@reuse
@given(data=st.data())
def test_any_window_over_any_lengths(attention, data):
    batch, sides = data.draw(st.integers(1, 3)), st.integers(-1, 45)
    lists = [data.draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)) for _ in range(2)]
    each = dict(zip(("lengths_q", "lengths_k"), lists))
    options = dict(causal=data.draw(st.booleans()), window_size=(data.draw(sides), data.draw(sides)))
    compare(attention, *packed(attention, **each), method="varlen", **each, **options)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_slack_rows_are_zero(attention, options):
    """Rows behind the last sequence are 0 in out, dq, dk and dv, whatever the inputs and dO hold there."""
    lengths = dict(lengths_q=[5, 0, 7], lengths_k=[6, 2, 3])
    tight = packed(attention, **lengths)
    dout = randn(*tight[0].shape, seed=99, like=attention)
    torch.full((1 << 20,), float("nan"), device=attention.device)  # so that unwritten memory is not 0 by luck
    wide = [torch.cat([x, x.new_full((9, *x.shape[1:]), float("nan"))]) for x in (*tight, dout)]

    def run(*x):
        return varlen(attention, *x, **lengths, deterministic=True, **options)

    results = gradients(run, *wide[:3], dout=wide[3])
    assert_equal_results([x[:-9] for x in results], gradients(run, *tight, dout=dout))
    for name, x in zip(NAMES, results):
        assert not x[-9:].any(), f"{name} is not 0 behind the last sequence"


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_nothing_gives_nothing(attention, activation, batch, seqlen_q, seqlen_k):
    """Without sequences, queries or keys, results are zeros of the right shape, dense and packed."""
    q, k, v = qkv(attention, batch, seqlen_q, seqlen_k)
    results = gradients(lambda *x: attention.dense(*x, activation=activation), q, k, v)
    for x, like in zip(results, (q, q, k, v)):
        assert x.shape == like.shape and not x.any()
    cu_q, cu_k = (cumulative([n] * batch, attention.device) for n in (seqlen_q, seqlen_k))
    results = gradients(
        lambda *x: attention._call(
            flash_attn_varlen_func, *x, cu_q, cu_k, seqlen_q, seqlen_k, activation=activation
        ),
        *(x.flatten(0, 1) for x in (q, k, v)),
    )
    for x, like in zip(results, (q, q, k, v)):
        assert x.shape == like.flatten(0, 1).shape and not x.any()


SEQUENCES = 70_000


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_more_sequences_than_a_grid_axis_holds(attention, activation):
    """More than 65,535 sequences, CUDA's limit for two axes of a grid, are right. With one token each, out =
    f(q·k) v.
    """
    if attention.device == "cpu":
        pytest.skip("there is no grid on the CPU, where packed sequences are a loop; a batch is tested below")
    q, k, v = (randn(SEQUENCES, 1, 8, seed=i, like=attention) for i in range(3))
    lengths = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=q.device)
    out, *grads = gradients(
        lambda *x: attention._call(
            flash_attn_varlen_func, *x, lengths, lengths.clone(), 1, 1, activation=activation
        ),
        q,
        k,
        v,
    )
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    s = (leaves[0] * leaves[1]).sum(-1, keepdim=True) * 8**-0.5
    expected = (s if activation == "identity" else torch.nn.functional.silu(s)) * leaves[2]
    dout = randn(*q.shape, seed=99).to(q)
    for name, a, e in zip(
        NAMES, (out, *grads), (expected.detach(), *torch.autograd.grad(expected, leaves, dout.double()))
    ):
        assert_close(name, a, e, baseline=e.to(a.dtype))


def test_more_sequences_than_a_grid_axis_holds_dense(attention):
    q, k, v = (
        randn(SEQUENCES, 1, 1, 8 if attention.device == "cpu" else 64, seed=i, like=attention)
        for i in range(3)
    )
    out, *grads = gradients(lambda *x: attention.dense(*x, softmax_scale=0.125), q, k, v)
    expected = (q.double() * k.double()).sum(-1, keepdim=True) / 8 * v.double()
    assert_close("out", out, expected, baseline=expected.to(out.dtype))
    assert all(x.isfinite().all() and x[-1].any() for x in grads)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_sequences_times_heads_in_one_axis(attention, num_splits):
    """Batch times heads may exceed the limit: a split cache and the returned dropout mask put both into one
    axis of the grid.
    """
    if attention.device == "cpu":
        pytest.skip("there is no grid on the CPU")
    batch, nheads = 2200, 32  # 70,400 together
    q, k, v = (randn(batch, n, nheads, 8, seed=i, like=attention) for i, n in enumerate((1, 3, 3)))
    lengths = torch.full((batch,), 3, dtype=torch.int32, device=q.device)
    out = attention.kvcache(q, k, v, cache_seqlens=lengths, num_splits=num_splits)
    compare_last = slice(batch - 2, batch)
    compare_output(
        _Given(out[compare_last]), q[compare_last], k[compare_last], v[compare_last], method="dense"
    )


class _Given:
    """An implementation that returns a given result."""

    def __init__(self, out: torch.Tensor) -> None:
        self.dense = lambda *tensors, **options: out
