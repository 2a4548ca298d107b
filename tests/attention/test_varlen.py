"""Test packed sequences of unequal lengths, some of them empty, and sequences cut short by seqused_k and
leftpad_k.
"""

from __future__ import annotations

import pytest
import torch

from measure import assert_close, compare, compare_output, gradients, integers, packed, qkv, randn, slopes
from package import Package
from ragged import EMPTY, RAGGED

OPTIONS = [
    dict(),
    dict(causal=True),
    dict(window_size=(3, 2)),
    dict(causal=True, softcap=2.0),
    dict(activation="sigmoid", sigmoid_bias="-log n"),
    dict(activation="relu2", normalization="1/n"),
    dict(activation="silu", causal=True, normalization="1/visible"),
    dict(normalization="1/sqrt(n)"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, EMPTY], ids=["ragged", "empty"])
def test_options(attention, lengths, options):
    """Masks, -log n and normalizations use each sequence's own length; sequences may be empty."""
    compare(attention, *packed(attention, **lengths, nheads=4), method="varlen", **lengths, **options)


def test_alibi(attention):
    """Slopes are per batch and head, and distances count from each sequence's own end."""
    options = dict(RAGGED, alibi_slopes=slopes(attention, 3, 2, size=0.1), causal=True)
    compare(attention, *packed(attention, **RAGGED), method="varlen", **options)


def test_one_key_each(attention):
    """Many queries over single keys are right; most causal rows are empty."""
    lengths = dict(lengths_q=[76, 34, 146], lengths_k=[1, 1, 1])
    compare(attention, *packed(attention, **lengths), method="varlen", **lengths, causal=True)


@pytest.mark.parametrize("seqlen_k", [1, 2, 5, 17])
def test_short_keys(attention, seqlen_k):
    """Sequences may be shorter than any tile."""
    lengths = dict(lengths_q=[130, 3], lengths_k=[seqlen_k, seqlen_k])
    compare(attention, *packed(attention, **lengths), method="varlen", **lengths)


def test_empty_queries_give_no_key_gradient(attention):
    """dK and dV of a sequence without queries are exactly 0."""
    lengths = dict(lengths_q=[4, 0], lengths_k=[6, 7])
    _, _, dk, dv = gradients(lambda *x: attention.varlen(*x, **lengths), *packed(attention, **lengths))
    assert not dk[6:].any() and not dv[6:].any() and dk[:6].all() and dv[:6].all()


def test_equal_lengths_equal_dense(attention):
    """Sequences of equal length give the same packed and dense."""
    q, k, v = qkv(attention, 3, 8, 11)
    out = attention.varlen(*(x.flatten(0, 1) for x in (q, k, v)), [8] * 3, [11] * 3, causal=True)
    assert_close("out", out.unflatten(0, (3, 8)), attention.dense(q, k, v, causal=True))


def test_sequences_do_not_see_each_other(attention):
    """Changing one sequence leaves the others, and their gradients, bit for bit as they were."""
    q, k, v = packed(attention, **RAGGED)
    changed = tuple(x.clone() for x in (q, k, v))
    changed[0][7:8], changed[1][9:29], changed[2][9:29] = 3.0, 5.0, -7.0

    def run(*tensors):
        options = dict(RAGGED, deterministic=True)
        return gradients(lambda *x: attention.varlen(*x, **options), *tensors, dout=torch.ones_like(q))

    for a, b, middle in zip(
        run(q, k, v), run(*changed), (slice(7, 8), slice(7, 8), slice(9, 29), slice(9, 29))
    ):
        outside = torch.ones(len(a), dtype=torch.bool, device=a.device)
        outside[middle] = False
        assert torch.equal(a[outside], b[outside])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqused, leftpad", [((5, 0, 3), None), (None, (2, 4, 1)), ((8, 20, 4), (2, 4, 4))])
def test_seqused_and_leftpad(attention, seqused, leftpad, options):
    """Keys before leftpad_k and from seqused_k on do not count; n and the alignment use the remaining
    keys.
    """
    used = dict(
        seqused_k=seqused and integers(attention, *seqused),
        leftpad_k=leftpad and integers(attention, *leftpad),
    )
    compare_output(attention, *packed(attention, **RAGGED), method="varlen", **RAGGED, **used, **options)


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(window_size=(50, 9)), dict(normalization="1/n")], ids=str
)
def test_paged(attention, options):
    """Prefill from pages works in any order, for ragged lengths and a sequence without keys."""
    lengths = dict(lengths_q=[5, 2, 9], lengths_k=[300, 0, 17])
    q, _, _ = packed(attention, **lengths, nheads=4)
    k, v = (randn(7, 256, 2, 8, seed=i, like=attention) for i in (1, 2))
    table = integers(attention, 4, 1, 0, 6, 2, 5).view(3, 2)
    compare_output(attention, q, k, v, method="varlen", **lengths, block_table=table, **options)


def test_pages_have_no_backward(device):
    """The forward runs for tensors that require a gradient, as upstream's own tests expect. The backward
    raises an error.
    """
    attention = Package(device)
    pages, q = (
        randn(4, 256, 2, 8, seed=1, like=attention),
        randn(5, 2, 8, seed=2, like=attention).requires_grad_(),
    )
    table = integers(attention, 2, 0, 3, 1).view(2, 2)
    out = attention.varlen(q, pages, pages, [2, 3], [300, 200], block_table=table)
    with pytest.raises(RuntimeError, match="block_table has no backward"):
        out.sum().backward()
