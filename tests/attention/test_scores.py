"""Test the score: sign, scale, softcap, head size and precision."""

from __future__ import annotations

import pytest
import torch

from measure import compare, gradients, qkv, single, slopes


def test_every_dtype(attention, dtype):
    """Signed scores are as exact as the dtype allows, in forward and backward."""
    compare(attention, *qkv(attention, 2, 65, 130, head_dim=64, dtype=dtype), causal=True)


def test_negative_scores_count(attention):
    """If every score is negative, none is clipped, made positive or put through an exponential."""
    q, k, v = qkv(attention)
    compare(attention, q.abs(), -k.abs(), v)
    assert (attention.dense(q.abs(), -k.abs(), v.abs()) < 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_scale", [None, 0.3, 1.0, -0.5])
def test_scale(attention, softmax_scale, causal):
    """The scale enters P (out, dV), dQ and dK once each, as given and not times log2(e)."""
    compare(attention, *qkv(attention, seqlen_q=20, seqlen_k=24), softmax_scale=softmax_scale, causal=causal)


def test_scale_zero(attention):
    """With scale 0 every score is 0, and so are the output and dV."""
    out, dq, dk, dv = gradients(lambda *x: attention.dense(*x, softmax_scale=0.0), *qkv(attention))
    assert not any(x.any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap, size", [(1.0, 1.0), (30.0, 1.0), (30.0, 8.0)])
def test_softcap(attention, softcap, size, causal):
    """The softcap is right from nearly linear to saturated, in forward and backward."""
    compare(attention, *qkv(attention, seqlen_q=20, seqlen_k=24, size=size), softcap=softcap, causal=causal)


def test_softcap_and_scale(attention):
    """softmax_scale applies inside the cap."""
    compare(attention, *qkv(attention, seqlen_q=20, seqlen_k=24, size=3), softcap=2.0, softmax_scale=0.4)


@pytest.mark.parametrize("options", [
    dict(softcap=30.0, softmax_scale=-0.5),
    dict(softcap=30.0, softmax_scale=0.0),
    dict(softcap=30.0, dropout_p=0.1),
    dict(alibi=True, softmax_scale=0.0),
    dict(softmax_scale=float("nan")),
    dict(softmax_scale=float("inf")),
], ids=str)  # fmt: skip
def test_impossible_scores_are_refused(attention, options):
    """Options that cannot give scores, such as a scale that the softcap cannot be divided by, raise."""
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(attention, 2)
    with pytest.raises((ValueError, RuntimeError)):
        attention.dense(*qkv(attention), **options)


@pytest.mark.parametrize("head_dim", [8, 16, 40, 59, 80, 111, 160, 224, 256])
def test_head_dims(attention, head_dim):
    """Head sizes that are padded to a multiple of 8 work, and the default scale comes from the size before
    padding.
    """
    compare(attention, *qkv(attention, 1, 9, 13, head_dim=head_dim), causal=True)


def test_head_dim_of_one(attention):
    compare(attention, *qkv(attention, head_dim=1))


def test_default_scale(attention):
    """The default scale is 1 / sqrt(head_dim)."""
    q, k, v = qkv(attention, head_dim=16)
    assert torch.equal(attention.dense(q, k, v), attention.dense(q, k, v, softmax_scale=0.25))


def test_zero_query_has_a_gradient(attention):
    """The scores of a zero query are 0 but visible, so dQ is scale * sum of (dO·v) k and not 0. Likewise for
    a zero key.
    """
    q, k, v = qkv(attention)
    q[:, 2], k[:, 4] = 0, 0
    compare(attention, q, k, v, causal=True)
    out, dq, dk, _ = gradients(attention.dense, q, k, v)
    assert not out[:, 2].any() and dq[:, 2].all() and dk[:, 4].all()


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(attention, seqlen_q, seqlen_k):
    """Without queries or keys, results are zeros of the right shape, in forward and backward."""
    q, k, v = qkv(attention, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    for actual, like in zip(gradients(attention.dense, q, k, v), (q, q, k, v)):
        assert actual.shape == like.shape and not actual.any()


SEVERAL_BLOCKS = [
    dict(causal=True),
    dict(causal=True, use_softmax=True),
    dict(window_size=(130, 40), alibi=True),
    dict(causal=True, softcap=3.0, activation="silu"),
    dict(activation="relu2", normalization="1/visible", causal=True),
    dict(activation="sigmoid", sigmoid_bias="-log n", normalization="1/n"),
]


@pytest.mark.parametrize("options", SEVERAL_BLOCKS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(300, 1100), (700, 520)])
def test_larger_than_any_block(attention, options, seqlen_q, seqlen_k):
    """Results are right over several blocks of queries and keys with a ragged last block, and for grouped
    heads.
    """
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(attention, 2, size=0.01)
    q, k, v = qkv(
        attention, 1, seqlen_q, seqlen_k, nheads=2, nheads_k=1, head_dim=16, dtype=single(attention)
    )
    compare(attention, q, k, v, **options)
