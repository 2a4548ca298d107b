"""Test activations and normalizations: f acts on the score, the mask comes after f, the row factor after the
sum.
"""

from __future__ import annotations

import pytest
import torch

from measure import compare, gradients, qkv, randn
from score_functions import FUNCTIONS

NORMALIZATIONS = [None, "1/n", "1/visible", "1/sqrt(n)"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("options", [dict(causal=True), dict(window_size=(4, 3))], ids=["causal", "local"])
def test_every_pair(attention, function, normalization, options):
    """Every activation works with every normalization, with more queries than keys, so that some rows see no
    key.
    """
    compare(attention, *qkv(attention, 1, 27, 21), normalization=normalization, **function, **options)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_dtypes(attention, dtype, function):
    compare(
        attention,
        *qkv(attention, 1, 40, 72, head_dim=32, dtype=dtype),
        causal=True,
        normalization="1/visible",
        **function,
    )


@pytest.mark.parametrize("function", FUNCTIONS[1:], ids=lambda f: "-".join(map(str, f.values())))
def test_softcap_and_window(attention, function):
    """f' and tanh' of the softcap multiply."""
    compare(attention, *qkv(attention, 1, 20, 24, size=3), softcap=2.0, window_size=(5, 4), **function)


@pytest.mark.parametrize("softmax_scale", [0.02, -0.7, 3.0])
@pytest.mark.parametrize("function", FUNCTIONS[1:], ids=lambda f: "-".join(map(str, f.values())))
def test_scales(attention, function, softmax_scale):
    """softmax_scale applies inside f."""
    compare(attention, *qkv(attention, 1, 20, 24), softmax_scale=softmax_scale, **function)


def test_minus_log_n(attention):
    """n is the sequence's number of keys; at equal scores the weights then sum to about 1."""
    q, k, v = qkv(attention, 1, 4, 100)
    out = attention.dense(
        torch.zeros_like(q), k, torch.ones_like(v), activation="sigmoid", sigmoid_bias="-log n"
    )
    assert torch.allclose(out, torch.full_like(out, 100 / 101), rtol=1e-3)


def test_one_over_visible_is_the_mean(attention):
    """With weights of 1/2 everywhere, the output is half the mean of the values that a query sees."""
    q, k, v = qkv(attention, 1, 30, 30)
    out = attention.dense(
        torch.zeros_like(q),
        k,
        torch.ones_like(v),
        causal=True,
        activation="sigmoid",
        normalization="1/visible",
    )
    assert torch.allclose(out, torch.full_like(out, 0.5), rtol=1e-3)


def test_normalization_is_not_folded_into_16_bits(attention):
    """Weights of 0.02 / 32768 have two digits in float16, so the factor must apply to the float32 sum."""
    q, k, v = (
        randn(1, s, 1, 64, seed=i, like=attention, dtype=torch.float16)
        for i, s in enumerate((4, 32768, 32768))
    )
    out, *_, dv = gradients(
        lambda *x: attention.dense(*x, softmax_scale=1 / 512, normalization="1/n"),
        q,
        k,
        v * 64,
        dout=64 * torch.ones_like(q),
    )
    wide = [x.double().cpu() for x in (q, k, v * 64)]
    p = torch.einsum("bihd,bjhd->bhij", *wide[:2]) / 512
    for actual, expected in (
        (out, torch.einsum("bhij,bjhd->bihd", p, wide[2]) / 32768),
        (dv, torch.einsum("bhij->bj", p)[..., None, None].expand(dv.shape) / 512),
    ):
        assert (actual.cpu() - expected).abs().max() <= 2e-3 * expected.abs().max()
