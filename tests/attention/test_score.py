"""Test flash_attn.nosoftmax.score alone: f, f', saturation, and the dense weights of models without a
kernel.
"""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn.nosoftmax.score import ACTIVATIONS, NORMALIZATIONS, attention_weights, resolve, saturate_

from oracle import FUNCTIONS, ROW_FACTORS

S = torch.linspace(-6, 6, 40, dtype=torch.float64)  # without 0, where relu has a kink


def test_choices():
    """The package and the oracle know the same functions."""
    assert set(ACTIVATIONS) == set(FUNCTIONS) and set(NORMALIZATIONS) == set(ROW_FACTORS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_function_and_derivative(activation):
    bias = 0.7 if activation == "sigmoid" else 0.0
    s = S.clone().requires_grad_()
    expected = FUNCTIONS[activation](s, bias)
    row, kept, grad = ACTIVATIONS[activation], S.clone(), torch.linspace(-2, 3, len(S), dtype=torch.float64)
    assert torch.allclose(row.value(kept, bias), expected.detach(), rtol=1e-14)
    (slope,) = torch.autograd.grad(expected.sum(), s)
    assert torch.allclose(row.times_derivative(grad, kept, bias), grad * slope, rtol=1e-12)
    assert torch.equal(kept, S), "an argument was overwritten"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_shows(activation):
    """NaN and Inf show in f and f'. Only f itself may turn Inf into a finite value."""
    row, s = ACTIVATIONS[activation], torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    value, slope = row.value(s.clone(), 0.0), row.times_derivative(torch.ones(4), s.clone(), 0.0)
    assert value[0].isnan() and (slope[0].isnan() or ACTIVATIONS[activation].linear)
    assert not value[1].isfinite() or activation == "sigmoid"
    assert not value[2].isfinite() or activation in ("relu", "relu2", "sigmoid", "silu", "gelu", "softplus")
    grad = row.times_derivative(torch.tensor([math.nan, math.inf]), torch.ones(2), 0.0)
    assert not grad.isfinite().any()


def test_saturation():
    """Only float16 saturates, and only finite values."""
    wide = [0.0, -1e9, 7e4, 65504.0, -65504.0, 3e38, math.inf, -math.inf, math.nan]
    narrow = saturate_(torch.tensor(wide), torch.float16).half()
    assert (
        narrow[:6].tolist() == [0.0, -65504.0, 65504.0, 65504.0, -65504.0, 65504.0]
        and not narrow[6:].isfinite().any()
    )
    kept = saturate_(torch.tensor(wide), torch.bfloat16)
    assert torch.equal(kept[:-1], torch.tensor(wide[:-1]))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_weights(activation, normalization):
    """Dense weights and their gradients are right. Hidden scores may be NaN, and a row that sees no key is
    0.
    """
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(5, 7, dtype=torch.bool).tril()
    visible[1] = False
    poisoned = scores.masked_fill(~visible, math.nan).requires_grad_()
    weights = attention_weights(
        poisoned, visible, activation, "-log n" if activation == "sigmoid" else 0.0, normalization, n=11
    )
    clean = scores.clone().requires_grad_()
    factor = ROW_FACTORS[normalization](11, visible.sum(-1, keepdim=True).double())
    expected = torch.where(visible, FUNCTIONS[activation](clean, -math.log(11)), 0) * factor
    assert torch.allclose(weights, expected, rtol=1e-14) and not weights[..., 1, :].any()
    gradients = [
        torch.autograd.grad(x.sin().sum(), leaf)[0] for x, leaf in ((weights, poisoned), (expected, clean))
    ]
    assert torch.allclose(*gradients, rtol=1e-12)


@pytest.mark.parametrize("arguments, resolved", [
    ((True,), ("identity", 0.0, None, 1.0)),
    ((False, "silu", 0.0, "1/n"), ("silu", 0.0, "1/n", 1.0)),
    ((False, "silu", 0.0, 1 / 1024), ("silu", 0.0, None, 1 / 1024)),
    ((False, "silu", 0.0, 2), ("silu", 0.0, None, 2.0)),
    ((False, "sigmoid", -2), ("sigmoid", -2.0, None, 1.0)),
    ((False, "sigmoid", "-log n", "1/visible"), ("sigmoid", None, "1/visible", 1.0)),
])  # fmt: skip
def test_resolve(arguments, resolved):
    """resolve returns the options in the operators' form, with None for -log n."""
    assert resolve(*arguments) == resolved


@pytest.mark.parametrize("arguments, word", [
    ((False, "tanh"), "tanh"),
    ((False, "identity", 0.0, "1/m"), "1/m"),
    ((False, "relu", 1.0), "sigmoid_bias"),
    ((False, "sigmoid", math.nan), "nan"),
    ((False, "sigmoid", math.inf), "inf"),
    ((False, "sigmoid", "log n"), "log n"),
    ((True, "relu"), "use_softmax"),
    ((True, "identity", 0.0, "1/n"), "use_softmax"),
    ((True, "identity", "-log n"), "use_softmax"),
])  # fmt: skip
def test_resolve_refuses(arguments, word):
    """The message names the wrong argument."""
    with pytest.raises(ValueError, match=word):
        resolve(*arguments)
