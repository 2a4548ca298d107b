"""Test laws of attention without softmax. They need no oracle, so that no error in an oracle can hide."""

from __future__ import annotations

import pytest
import torch

from measure import assert_same, gradients, qkv, randn, slopes

LINEAR = [dict(), dict(causal=True), dict(window_size=(5, 3)), dict(normalization="1/n")]
NONLINEAR = [
    dict(activation="sigmoid", sigmoid_bias=-1.0),
    dict(activation="silu", causal=True),
    dict(softcap=2.0),
]


@pytest.mark.parametrize("options", LINEAR + NONLINEAR, ids=str)
def test_linear_in_v(attention, options):
    """f(q, k, a v1 + b v2) = a f(q, k, v1) + b f(q, k, v2)."""
    q, k, v1 = qkv(attention, seqlen_q=17, seqlen_k=21)
    v2 = randn(*v1.shape, seed=50, like=attention)
    combined = attention.dense(q, k, 2 * v1 - v2 / 2, **options)
    assert_same(
        "out", combined, 2 * attention.dense(q, k, v1, **options) - attention.dense(q, k, v2, **options) / 2
    )


@pytest.mark.parametrize("factor", [2.0, -0.5])
@pytest.mark.parametrize("options", LINEAR, ids=str)
def test_linear_in_q_and_k(attention, options, factor):
    """Scaling q, k or the softmax scale scales the output, with its sign."""
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=21)
    expected = factor * attention.dense(q, k, v, **options)
    assert_same("q", attention.dense(factor * q, k, v, **options), expected)
    assert_same("k", attention.dense(q, factor * k, v, **options), expected)
    assert_same("scale", attention.dense(q, k, v, softmax_scale=factor * 8**-0.5, **options), expected)


@pytest.mark.parametrize("activation, power", [("relu", 1), ("relu2", 2)])
def test_homogeneous(attention, activation, power):
    """relu(c s) = c relu(s) and relu2(c s) = c² relu2(s) for c > 0."""
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=21)
    assert_same(
        "out",
        attention.dense(2 * q, k, v, activation=activation),
        2**power * attention.dense(q, k, v, activation=activation),
    )


def test_relu_splits_identity(attention):
    """relu(s) - relu(-s) = s."""
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=21)
    positive, negative = (attention.dense(sign * q, k, v, activation="relu", causal=True) for sign in (1, -1))
    assert_same("out", positive - negative, attention.dense(q, k, v, causal=True))


@pytest.mark.parametrize("options", [dict(), *NONLINEAR[::2], dict(activation="relu2")], ids=str)
def test_disjoint_keys_add_up(attention, options):
    """Attention over all keys is the sum of attention over each part, on which split keys and rings rely."""
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=40)
    parts = [
        attention.dense(q, k[:, part], v[:, part], **options)
        for part in (slice(0, 13), slice(13, 14), slice(14, 40))
    ]
    assert_same("out", sum(parts), attention.dense(q, k, v, **options))


def test_causal_is_a_sum_of_a_square_and_a_triangle(attention):
    """As in chunked causal attention, later queries see all earlier keys, and their own keys causally."""
    q, k, v = qkv(attention, seqlen_q=20, seqlen_k=20)
    late = q[:, 12:]
    whole = attention.dense(late, k[:, :12], v[:, :12])
    own = attention.dense(late, k[:, 12:], v[:, 12:], causal=True)
    assert_same("out", whole + own, attention.dense(q, k, v, causal=True)[:, 12:])


@pytest.mark.parametrize(
    "options", [dict(), *NONLINEAR[::2], dict(activation="silu", normalization="1/visible")], ids=str
)
def test_order_of_keys_does_not_matter(attention, options):
    """Without mask and bias, the order of keys does not matter, in forward and backward."""
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=21)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).to(q.device)
    plain = gradients(lambda *x: attention.dense(*x, **options), q, k, v)
    mixed = gradients(lambda *x: attention.dense(*x, **options), q, k[:, order], v[:, order])
    for name, a, b in zip(("out", "dq", "dk", "dv"), mixed, (*plain[:2], *(x[:, order] for x in plain[2:]))):
        assert_same(name, a, b)


@pytest.mark.parametrize(
    "options", [dict(), dict(softcap=2.0), dict(activation="relu2"), dict(activation="silu")], ids=str
)
def test_zero_keys_do_not_matter(attention, options):
    """f(0) = 0, so keys of zeros change nothing, whatever their values. Softmax would give them weight."""
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=21)
    noise = randn(2, 10, 2, 8, seed=50, like=attention)
    longer = attention.dense(
        q, torch.cat([k, torch.zeros_like(noise)], 1), torch.cat([v, 100 * noise], 1), **options
    )
    assert_same("out", longer, attention.dense(q, k, v, **options))


@pytest.mark.parametrize("options", LINEAR + NONLINEAR, ids=str)
def test_order_of_batch_and_heads_does_not_matter(attention, options):
    """Each sequence and each head is independent; grouped heads move with their key head."""
    q, k, v = qkv(attention, 3, 9, 11, nheads=4, nheads_k=2)
    plain = attention.dense(q, k, v, **options)
    heads, groups, batch = [2, 3, 0, 1], [1, 0], [2, 0, 1]
    mixed = attention.dense(q[batch][:, :, heads], k[batch][:, :, groups], v[batch][:, :, groups], **options)
    assert_same("out", mixed, plain[batch][:, :, heads])


@pytest.mark.parametrize(
    "options",
    [dict(), dict(activation="sigmoid"), dict(activation="silu", normalization="1/visible")],
    ids=str,
)
def test_later_keys_do_not_matter_when_causal(attention, options):
    """With causal, keys behind a query do not change its output by a bit."""
    q, k, v = qkv(attention, 1, 20, 20)
    changed = [torch.cat([x[:, :12], -3 * x[:, 12:]], 1) for x in (k, v)]
    a, b = (attention.dense(q, *pair, causal=True, **options) for pair in ((k, v), changed))
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(activation="relu2", window_size=(3, 3))], ids=str
)
def test_gradients_pair_with_their_inputs(attention, options):
    """By Euler's theorem <v, dV> = <out, dO>, because the output is linear in v, and <q, dQ> = <k, dK>,
    because only products q·k enter.
    """
    q, k, v = qkv(attention, seqlen_q=17, seqlen_k=21)
    dout = randn(*q.shape, seed=99, like=attention)
    out, dq, dk, dv = gradients(lambda *x: attention.dense(*x, **options), q, k, v, dout=dout)
    dot = lambda a, b: (a.double() * b.double()).sum()  # noqa: E731
    tolerance = 20 * torch.finfo(q.dtype).eps * (dot(out.abs(), dout.abs()) + dot(q.abs(), dq.abs()))
    assert (dot(v, dv) - dot(out, dout)).abs() <= tolerance
    assert (dot(q, dq) - dot(k, dk)).abs() <= tolerance


@pytest.mark.parametrize("window_size", [(-1, -1), (5, 3), (30, 0)], ids=str)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(20, 20), (17, 25), (25, 17)])
def test_backward_is_three_forwards(attention, window_size, alibi, seqlen_q, seqlen_k):
    """dQ = F(dO, V, K; M), dK = F(V, dO, Q; Mᵀ), dV = F(K, Q, dO; Mᵀ, bias), where Mᵀ swaps the two sides.

    The bias enters dV alone.
    """
    bias = dict(alibi_slopes=slopes(attention, 2)) if alibi else {}
    q, k, v = qkv(attention, 2, seqlen_q, seqlen_k)
    dout = randn(*q.shape, seed=99, like=attention)
    forward, across = dict(window_size=window_size), dict(window_size=window_size[::-1])
    _, dq, dk, dv = gradients(lambda *x: attention.dense(*x, **forward, **bias), q, k, v, dout=dout)
    assert_same("dq", dq, attention.dense(dout, v, k, **forward), 4)
    assert_same("dk", dk, attention.dense(v, dout, q, **across), 4)
    assert_same("dv", dv, attention.dense(k, q, dout, **across, **bias), 4)


def test_backward_is_three_linear_forwards(attention):
    """Without a mask, out = scale q (kᵀ v), in time linear in the length."""
    q, k, v = qkv(attention, 2, 40, 30)
    state = torch.einsum("bjhd,bjhe->bhde", k.double(), v.double()) * 8**-0.5
    assert_same("out", attention.dense(q, k, v), torch.einsum("bihd,bhde->bihe", q.double(), state), 4)
