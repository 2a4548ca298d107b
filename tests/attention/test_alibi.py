"""The ALiBi bias: without softmax it must be the whole of -slope * |i + seqlen_k - seqlen_q - j|, also when
causal.
"""

from __future__ import annotations

import pytest
import torch

from measure import compare, gradients, qkv, slopes
from oracle import FUNCTIONS


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(113, 203), (203, 113), (16, 16), (1, 20)])
def test_bias(attention, causal, seqlen_q, seqlen_k):
    """Softmax forgives a bias that is off by a constant per row; without it the value itself counts."""
    q, k, v = qkv(attention, 1, seqlen_q, seqlen_k)
    compare(attention, q, k, v, causal=causal, alibi_slopes=slopes(attention, 2, size=0.05))


@pytest.mark.parametrize("causal", [False, True])
def test_slopes_per_batch(attention, causal):
    """Slopes of shape (batch, nheads)."""
    q, k, v = qkv(attention, 3, 20, 24)
    compare(attention, q, k, v, causal=causal, alibi_slopes=slopes(attention, 3, 2))


def test_window_and_softcap(attention):
    """The bias comes after the cap and before the mask; tanh' is taken at the score without the bias."""
    q, k, v = qkv(attention, 2, 20, 24, size=3)
    compare(attention, q, k, v, window_size=(5, 4), softcap=2.0, alibi_slopes=slopes(attention, 2))


def test_softcap(attention):
    """Softcap and ALiBi together."""
    q, k, v = qkv(attention, 2, 20, 24, size=3)
    compare(attention, q, k, v, causal=True, softcap=2.0, alibi_slopes=slopes(attention, 2))


def test_bias_reaches_dv_alone(attention):
    """For linear f the gradients of q and k don't see the bias; dV does, with the bias of the forward."""
    q, k, v = qkv(attention, 1, 40, 50)
    plain = dict(causal=True, deterministic=True)
    bias = dict(plain, alibi_slopes=slopes(attention, 2))
    compare(attention, q, k, v, **bias)
    with_bias, without = (gradients(lambda *x: attention.dense(*x, **o), q, k, v) for o in (bias, plain))
    assert torch.equal(with_bias[1], without[1]) and torch.equal(with_bias[2], without[2])
    assert not torch.allclose(with_bias[3], without[3], rtol=0.1)


@pytest.mark.parametrize("activation", [name for name in FUNCTIONS if name != "identity"])
def test_nonlinear_functions(attention, activation):
    """The bias moves f' too."""
    q, k, v = qkv(attention, 2, 20, 24)
    compare(attention, q, k, v, causal=True, activation=activation, alibi_slopes=slopes(attention, 2))


def test_bias_that_overflows_past_the_last_query(attention):
    """float16: the bias is in range for all 97 queries; rows that only a padded tile has must not
    spoil dV.
    """
    q, k, v = qkv(attention, 1, 97, 97, nheads=1, head_dim=16, dtype=torch.float16)
    v = v * 1e-3
    slope = torch.full((1,), 670.0, device=attention.device)
    compare(attention, q, k, v, dout=torch.full_like(q, 1e-3), alibi_slopes=slope)
