"""Test the kernels' formulas against score.py, and their backward's normalization by a model."""

import itertools
import math

import pytest
import torch
from overlay_package import module

formulas = module("formulas")
contract = module("score")

# f in float64, independent of the formulas: relu2 with its cap, gelu and softplus by other functions than
# ours.
EXACT = {
    "identity": lambda s, bias: s,
    "relu": lambda s, bias: s.relu(),
    "relu2": lambda s, bias: s.relu().clamp(max=2.0**36).square(),
    "sigmoid": lambda s, bias: torch.sigmoid(s + bias),
    "silu": lambda s, bias: s * torch.sigmoid(s),
    "gelu": lambda s, bias: 0.5 * s * torch.special.erfc(-s / math.sqrt(2.0)),
    "softplus": lambda s, bias: torch.logaddexp(s, torch.zeros_like(s)),
}
# Relative error of the formulas that use polynomials. The others are exact.
RTOL = {"gelu": 2.0**-14, "softplus": 2.0**-14}
CASES = [
    (activation, bias, softcap)
    for activation, bias in [
        *((a, 0.0) for a in EXACT),
        ("sigmoid", 1.5),
        ("sigmoid", -6.0),
        ("sigmoid", None),
        ("sigmoid", formulas.BY_HEAD),
    ]
    for softcap in (0.0, 3.0)
]
N = 50
OF_HEAD = -1.75  # the bias that a kernel reads


def parameter(bias) -> float:
    """Return what a kernel passes to a formula as n."""
    return OF_HEAD if bias == formulas.BY_HEAD else float(N)


class Host:
    """The operations of formulas.py on the CPU; ramp loses NaN, as in the kernels."""

    tanh = staticmethod(torch.tanh)
    exp2 = staticmethod(torch.exp2)
    rcp = staticmethod(torch.reciprocal)
    relu = staticmethod(torch.relu)
    abs = staticmethod(torch.abs)

    @staticmethod
    def ramp(x, high):
        return torch.where(x.isnan(), high, x.clamp(0.0, high))

    @staticmethod
    def where_positive(x, a, b):
        return torch.where(x > 0, a, b)


def score(u: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(u / softcap) if softcap else u


def exact(u: torch.Tensor, activation: str, bias, softcap: float) -> torch.Tensor:
    by_head = bias == formulas.BY_HEAD
    number = (
        -torch.log(torch.tensor(float(N), dtype=u.dtype)) if bias is None else OF_HEAD if by_head else bias
    )
    return EXACT[activation](score(u, softcap), number)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.linspace(
        -9.0, 9.0, 360, dtype=torch.float64
    )  # an even number of points leaves out 0, a kink


@pytest.mark.parametrize("activation, bias, softcap", CASES)
def test_value(scores, activation, bias, softcap):
    f = formulas.formula(activation, bias, softcap)
    want = exact(scores, activation, bias, softcap)
    torch.testing.assert_close(
        f.value(Host, scores * f.unit, parameter(bias)), want, rtol=RTOL.get(activation, 1e-9), atol=1e-12
    )


@pytest.mark.parametrize("activation, bias, softcap", CASES)
def test_derivative_times_unit_is_that_of_autograd(scores, activation, bias, softcap):
    u = scores.requires_grad_()
    grad = torch.linspace(-2.0, 3.0, len(u), dtype=torch.float64)
    (want,) = torch.autograd.grad(exact(u, activation, bias, softcap), u, grad)
    f = formulas.formula(activation, bias, softcap)
    got = f.derivative(Host, grad, scores.detach() * f.unit, parameter(bias)) * f.unit
    # gelu' has a zero, near which its two terms are as large as grad.
    torch.testing.assert_close(
        got, want, rtol=RTOL.get(activation, 1e-9), atol=1e-4 if activation == "gelu" else 1e-12
    )


@pytest.mark.parametrize("activation", EXACT)
def test_a_wrong_unit_is_noticed(scores, activation):
    """The test of the values fails for a formula without its factor."""
    f = formulas.formula(activation)
    wrong = f.value(Host, scores * f.unit * 1.01, float(N))
    assert not torch.allclose(
        wrong, exact(scores, activation, 0.0, 0.0), rtol=RTOL.get(activation, 1e-9), atol=1e-12
    )


def test_every_activation_has_a_test():
    assert set(formulas._FORMULAS) == set(EXACT) >= set(contract.ACTIVATIONS)


@pytest.mark.parametrize("activation, lowest, digits", [("gelu", -12.0, 1e-4), ("softplus", -80.0, 1e-4)])
def test_tails_keep_their_digits_in_float32(activation, lowest, digits):
    """The error is relative to f, which is 1e-31 at the ends; float16 and bfloat16 round by 2^-12 and 2^-9.
    That of gelu' is relative to |f'| + |s f''|, because gelu' has a zero near -0.75.
    """
    s = torch.linspace(lowest, 12.0, 2001, dtype=torch.float64).requires_grad_()
    f = formulas.formula(activation)
    y = (s.detach() * f.unit).float()
    value = exact(s, activation, 0.0, 0.0)
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert ((f.value(Host, y, 1.0) - value) / value).abs()[s != 0].max() < digits
    got = f.derivative(Host, torch.ones_like(y), y, 1.0) * f.unit
    density = torch.exp(-0.5 * s * s) / math.sqrt(2.0 * math.pi)
    size = slope.abs() + (density * (2.0 - s * s) * s).abs() if activation == "gelu" else slope
    assert ((got - slope).abs() / size).max() < digits


def test_the_derivative_of_a_sigmoid_keeps_its_digits_in_float32():
    """p - p^2 would be off by 1 % at a score of 12, and 0 from 17 on. At large negative scores 2^-y is
    Inf.
    """
    f = formulas.formula("sigmoid", -3.0)
    s = torch.tensor(
        [-200.0, -90.0, -80.0, -20.0, -3.0, 0.0, 3.0, 15.0, 20.0, 60.0, 80.0], dtype=torch.float64
    )
    got = f.derivative(Host, torch.ones(len(s)), (s * f.unit).float(), 1.0) * f.unit
    want = torch.sigmoid(s - 3.0) * torch.sigmoid(3.0 - s)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-36)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    "activation, bias",
    [*((a, 0.0) for a in EXACT), ("sigmoid", -6.0), ("sigmoid", None), ("sigmoid", formulas.BY_HEAD)],
)
def test_nan_shows_in_value_and_derivative(activation, bias, softcap):
    f = formulas.formula(activation, bias, softcap)
    y = torch.full((1,), math.nan)
    n = parameter(bias)
    assert f.value(Host, y, n).isnan().all()
    if activation != "identity" or softcap:  # the derivative of the identity does not depend on the score
        assert f.derivative(Host, torch.ones(1), y, n).isnan().all()
    if f.value(Host, torch.ones(1), n) != 0.0:
        assert f.derivative(Host, y, torch.ones(1), n).isnan().all()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    "activation, bias",
    [*((a, 0.0) for a in EXACT), ("sigmoid", -6.0), ("sigmoid", None), ("sigmoid", formulas.BY_HEAD)],
)
def test_an_infinite_score_shows_unless_f_ends_it(activation, bias, softcap):
    """An infinite score shows, and formulas whose Inf the kernels do not look for give none."""
    f = formulas.formula(activation, bias, softcap)
    y = torch.tensor([math.inf, -math.inf])
    got = f.value(Host, y, parameter(bias))
    assert f.inf_seen_in in ("scores", "weights") or not got.isinf().any()
    ended = exact(y.double(), activation, bias, softcap).isfinite()
    right = exact(torch.tensor([1e6, -1e6], dtype=torch.float64), activation, bias, softcap)
    assert all(
        not g.isfinite() or (e and torch.isclose(g.double(), r, rtol=1e-4))
        for g, e, r in zip(got, ended, right)
    )


@pytest.mark.parametrize("s, bias", [(100.0, -100.0), (-90.0, 91.0), (0.0, -80.0), (3.0, 200.0)])
def test_a_bias_of_a_head_may_be_large(s, bias):
    """e^-bias alone would overflow or underflow in float32."""
    f = formulas.formula("sigmoid", formulas.BY_HEAD)
    y = torch.tensor([s]) * f.unit
    want = torch.sigmoid(torch.tensor([s + bias], dtype=torch.float64))
    torch.testing.assert_close(f.value(Host, y, bias).double(), want, rtol=1e-4, atol=0.0)
    got = f.derivative(Host, torch.ones(1), y, bias).double() * f.unit
    torch.testing.assert_close(got, want * (1.0 - want), rtol=1e-4, atol=1e-30)


def test_a_small_sigmoid_keeps_its_digits():
    """(1 + tanh) / 2 loses a weight of 1/n in the error of tanh.approx, 2^-11; the formula by exp2 keeps
    it.
    """

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
    assert not torch.allclose(
        by_tanh.value(Rough, s * by_tanh.unit, n), torch.sigmoid(s - 8.0), rtol=0.1, atol=0.0
    )


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("size", [1e12, 1e20])
def test_finite_for_huge_scores(activation, size):
    f = formulas.formula(activation)
    y = torch.tensor([-size, -1.0, 0.0, 1.0, size], dtype=torch.float32) * f.unit
    assert torch.isfinite(f.value(Host, y, 10.0)).all()
    assert torch.isfinite(f.derivative(Host, torch.full_like(y, 1e15), y, 10.0)).all()


def test_relu2_caps_its_value_and_not_its_derivative():
    f = formulas.formula("relu2")
    y = torch.tensor([2.0**35, 2.0**50])
    assert f.value(Host, y, 1.0).tolist() == [2.0**70, 2.0**72]
    assert f.derivative(Host, torch.ones(2), y, 1.0).tolist() == [2.0**36, 2.0**51]


def model_backward(
    q, k, v, dout, activation: str, normalization, causal: bool, balance: bool = True, factors=None
):
    """Model the hooked flash_bwd_sm90: float32 sums, P and dS in float16, norm as row and sequence factors.
    factors: those that the caller gives for rows, float32 (queries,).
    """
    f = formulas.formula(activation)
    n, half = k.shape[0], torch.float16
    scale = q.shape[-1] ** -0.5 * f.unit
    i, j = torch.arange(q.shape[0])[:, None], torch.arange(n)[None]
    visible = j <= i + n - q.shape[0] if causal else torch.ones(q.shape[0], n, dtype=torch.bool)
    row = torch.ones(q.shape[0], 1)
    of_sequence = {None: 1.0, "1/n": 1.0 / n, "1/sqrt(n)": n**-0.5, "1/visible": n**-0.5}[normalization]
    if normalization == "1/visible":
        row = n**0.5 / visible.sum(1, keepdim=True).clamp(min=1).float()
    if factors is not None:
        of_sequence = factors.amax().clamp(2.0**-126, 2.0**126)
        row = factors[:, None] * (1.0 / of_sequence)
    if not balance:  # apply the sequence's factors to P and dP too
        row, of_sequence = row * of_sequence, 1.0
    y = q.float() @ k.float().T * scale
    p = (f.value(Host, y, float(n)).masked_fill(~visible, 0.0) * row).to(half).float()
    ds = (
        f.derivative(Host, dout.float() @ v.float().T * row, y, float(n))
        .masked_fill(~visible, 0.0)
        .to(half)
        .float()
    )
    return (
        ds @ k.float() * of_sequence * scale,
        ds.T @ q.float() * scale * of_sequence,
        p.T @ dout.float() * of_sequence,
    )


def oracle_backward(q, k, v, dout, activation, normalization, causal, factors=None):
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    visible = (
        torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0]) if causal else None
    )
    weights = contract.attention_weights(
        q @ k.T * q.shape[-1] ** -0.5, visible, activation, 0.0, normalization
    )
    if factors is not None:
        weights = weights * factors.double()[:, None]
    return torch.autograd.grad(weights @ v, (q, k, v), dout.double())


def worst(got, want) -> float:
    return max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want))


@pytest.mark.parametrize(
    "activation, normalization, causal",
    list(itertools.product(contract.ACTIVATIONS, contract.NORMALIZATIONS, (False, True))),
)
def test_backward_keeps_float16_digits(activation, normalization, causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(400, 32, generator=generator).half() for _ in range(4))
    got = model_backward(q, k, v, dout, activation, normalization, causal)
    assert worst(got, oracle_backward(q, k, v, dout, activation, normalization, causal)) < 2e-3


@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**30, 2.0**127])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("causal", [False, True])
def test_backward_with_factors_of_rows_keeps_float16_digits(activation, causal, size):
    """The size that all factors of a sequence share never meets float16, in which 2^-40 is 0 and 2^30
    infinite.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(400, 32, generator=generator).half() for _ in range(4))
    if size > 2.0**100:  # keep the sums below the largest float32
        dout = (dout * 2.0**-12).half()
    factors = torch.rand(400, generator=generator) * size
    factors[::7] = 0.0
    args = q, k, v, dout, activation, None, causal
    want = oracle_backward(*args, factors=factors)
    assert worst(model_backward(*args, factors=factors), want) < 2e-3
    if size != 1.0:
        assert not worst(model_backward(*args, factors=factors, balance=False), want) < 4e-3


def test_factors_that_are_all_0_give_0():
    q, k, v, dout = (torch.ones(5, 8).half() for _ in range(4))
    got = model_backward(q, k, v, dout, "silu", None, False, factors=torch.zeros(5))
    assert not any(x.any() for x in got)


def test_a_norm_folded_into_float16_is_noticed():
    """With small gradients, 1/n on P and dP gives subnormals of float16; as a factor of the sums it loses
    nothing.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(400, 32, generator=generator).half() for _ in range(4))
    args = q, k, v, (dout * 2.0**-12).half(), "identity", "1/n", False
    want = oracle_backward(*args)
    assert worst(model_backward(*args), want) < 2e-3
    assert worst(model_backward(*args, balance=False), want) > 4e-3
