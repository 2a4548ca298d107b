"""Test the ALiBi bias: without softmax it must be the full -slope * |i + seqlen_k - seqlen_q - j|, also when
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
    """With softmax a constant per row in the bias has no effect; without softmax the full value counts."""
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
    """For linear f the bias has no effect on dQ and dK, but dV has the bias of the forward."""
    q, k, v = qkv(attention, 1, 40, 50)
    plain = dict(causal=True, deterministic=True)
    bias = dict(plain, alibi_slopes=slopes(attention, 2))
    compare(attention, q, k, v, **bias)
    with_bias, without = (gradients(lambda *x: attention.dense(*x, **o), q, k, v) for o in (bias, plain))
    assert torch.equal(with_bias[1], without[1]) and torch.equal(with_bias[2], without[2])
    assert not torch.allclose(with_bias[3], without[3], rtol=0.1)


@pytest.mark.parametrize("activation", [name for name in FUNCTIONS if name != "identity"])
def test_nonlinear_functions(attention, activation):
    """The bias also enters f'."""
    q, k, v = qkv(attention, 2, 20, 24)
    compare(attention, q, k, v, causal=True, activation=activation, alibi_slopes=slopes(attention, 2))


def test_bias_that_overflows_past_the_last_query(attention):
    """In float16 the bias is in range for all 97 queries. Padding rows of a tile, where it overflows, must
    not affect dV.
    """
    q, k, v = qkv(attention, 1, 97, 97, nheads=1, head_dim=16, dtype=torch.float16)
    v = v * 1e-3
    slope = torch.full((1,), 670.0, device=attention.device)
    compare(attention, q, k, v, dout=torch.full_like(q, 1e-3), alibi_slopes=slope)
