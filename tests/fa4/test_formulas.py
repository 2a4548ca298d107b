"""The formulas of the kernels against score_function.py, and a model of the kernels' backward with its normalization."""

import itertools

import pytest
import torch
from overlay_package import module

formulas = module("formulas")
score_function = module("score_function")

CASES = [
    (activation, bias, softcap)
    for activation, bias in [*((a, 0.0) for a in score_function.ACTIVATIONS), ("sigmoid", 1.5), ("sigmoid", -6.0), ("sigmoid", None)]
    for softcap in (0.0, 3.0)
]
N = 50


class Host:
    """The operations of formulas.py on the CPU."""

    tanh = staticmethod(torch.tanh)
    exp2 = staticmethod(torch.exp2)
    rcp = staticmethod(torch.reciprocal)
    relu = staticmethod(torch.relu)
    clamp = staticmethod(torch.clamp)

    @staticmethod
    def where_positive(x, a):
        return torch.where(x > 0, a, torch.zeros_like(a))


def score(u: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(u / softcap) if softcap else u


def exact(u: torch.Tensor, activation: str, bias, softcap: float) -> torch.Tensor:
    number = -torch.log(torch.tensor(float(N), dtype=u.dtype)) if bias is None else bias
    return score_function.activate(score(u, softcap), activation, number)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.linspace(-9.0, 9.0, 360, dtype=torch.float64)  # an even number: 0 is a kink


@pytest.mark.parametrize("activation, bias, softcap", CASES)
def test_value(scores, activation, bias, softcap):
    f = formulas.formula(activation, bias, softcap)
    torch.testing.assert_close(f.value(Host, scores * f.unit, float(N)), exact(scores, activation, bias, softcap), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation, bias, softcap", CASES)
def test_derivative_times_unit_is_that_of_autograd(scores, activation, bias, softcap):
    u = scores.requires_grad_()
    grad = torch.linspace(-2.0, 3.0, len(u), dtype=torch.float64)
    (want,) = torch.autograd.grad(exact(u, activation, bias, softcap), u, grad)
    f = formulas.formula(activation, bias, softcap)
    got = f.derivative(Host, grad, scores.detach() * f.unit, float(N)) * f.unit
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", score_function.ACTIVATIONS)
def test_a_wrong_unit_is_noticed(scores, activation):
    """The test of the values fails on a formula that forgets its factor."""
    f = formulas.formula(activation)
    wrong = f.value(Host, scores * f.unit * 1.01, float(N))
    assert not torch.allclose(wrong, exact(scores, activation, 0.0, 0.0), rtol=1e-9, atol=1e-12)


def test_a_small_sigmoid_keeps_its_digits():
    """(1 + tanh) / 2 with the error of tanh.approx, 2^-11, has lost a weight of 1/n; the formula by exp2 has not."""

    class Rough(Host):
        @staticmethod
        def tanh(x):
            return torch.tanh(x) * (1 + 2.0**-11)

    s = torch.linspace(-1, 1, 9, dtype=torch.float64)
    n = 4096.0
    for bias in (None, -8.0):
        f = formulas.formula("sigmoid", bias)
        want = torch.sigmoid(s + (-torch.log(torch.tensor(n)) if bias is None else bias))
        torch.testing.assert_close(f.value(Rough, s * f.unit, n), want, rtol=1e-6, atol=0.0)
    by_tanh = formulas._sigmoid_by_tanh(-8.0)
    assert not torch.allclose(by_tanh.value(Rough, s * by_tanh.unit, n), torch.sigmoid(s - 8.0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("activation", score_function.ACTIVATIONS)
@pytest.mark.parametrize("size", [1e12, 1e20])
def test_finite_for_huge_scores(activation, size):
    f = formulas.formula(activation)
    y = torch.tensor([-size, -1.0, 0.0, 1.0, size], dtype=torch.float32) * f.unit
    grad = torch.full_like(y, 1e20)
    assert torch.isfinite(f.value(Host, y, 10.0)).all()
    assert torch.isfinite(f.derivative(Host, grad, y, 10.0)).all()


def model_backward(q, k, v, dout, activation: str, normalization, causal: bool, balance: bool = True):
    """What flash_bwd_sm90 with the hooks computes: float32 sums, P and dS in float16, norm as row and sequence factors."""
    f = formulas.formula(activation)
    n, half = k.shape[0], torch.float16
    scale = q.shape[-1] ** -0.5 * f.unit
    i, j = torch.arange(q.shape[0])[:, None], torch.arange(n)[None]
    visible = j <= i + n - q.shape[0] if causal else torch.ones(q.shape[0], n, dtype=torch.bool)
    row = torch.ones(q.shape[0], 1)
    of_sequence = {None: 1.0, "1/n": 1.0 / n, "1/sqrt(n)": n**-0.5, "1/visible": n**-0.5}[normalization]
    if normalization == "1/visible":
        row = n**0.5 / visible.sum(1, keepdim=True).clamp(min=1).float()
    if not balance:  # the factors of the sequence on P and dP too
        row, of_sequence = row * of_sequence, 1.0
    y = q.float() @ k.float().T * scale
    p = (f.value(Host, y, float(n)).masked_fill(~visible, 0.0) * row).to(half).float()
    ds = f.derivative(Host, dout.float() @ v.float().T * row, y, float(n)).masked_fill(~visible, 0.0).to(half).float()
    return ds @ k.float() * of_sequence * scale, ds.T @ q.float() * scale * of_sequence, p.T @ dout.float() * of_sequence


def oracle_backward(q, k, v, dout, activation, normalization, causal):
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    visible = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0]) if causal else None
    weights = score_function.attention_weights(q @ k.T * q.shape[-1] ** -0.5, visible, activation, 0.0, normalization)
    return torch.autograd.grad(weights @ v, (q, k, v), dout.double())


def worst(got, want) -> float:
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want))


@pytest.mark.parametrize(
    "activation, normalization, causal",
    list(itertools.product(score_function.ACTIVATIONS, score_function.NORMALIZATIONS, (False, True))),
)
def test_backward_keeps_float16_digits(activation, normalization, causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(400, 32, generator=generator).half() for _ in range(4))
    got = model_backward(q, k, v, dout, activation, normalization, causal)
    assert worst(got, oracle_backward(q, k, v, dout, activation, normalization, causal)) < 2e-3


def test_a_norm_folded_into_float16_is_noticed():
    """With small gradients, 1/n on P and dP leaves subnormals of float16; as factor of the sums it costs nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(400, 32, generator=generator).half() for _ in range(4))
    args = q, k, v, (dout * 2.0**-12).half(), "identity", "1/n", False
    want = oracle_backward(*args)
    assert worst(model_backward(*args), want) < 2e-3
    assert worst(model_backward(*args, balance=False), want) > 4e-3
