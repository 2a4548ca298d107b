"""Test the activations of the CUDA kernels (csrc/flash_attn/src/activations.h), compiled for the CPU.

The functors are the same; tanh, exp2 and rcp are the CPU's, which are exact to a rounding. This finds a wrong
formula or constant without a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from oracle import FUNCTIONS

HEADER = Path(__file__).parents[2] / "overlay/flash-attn/csrc/flash_attn/src/activations.h"
OWN = ("relu", "relu2", "sigmoid", "silu")
NAMES = ("identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus")
PROGRAM = """
#include "activations.h"
using namespace flash;
extern "C" void evaluate(int activation, float scale, float bias, int n, const float *x, float *value,
                         float *both, float *derivative) {
    with_activation<false>(Activation(activation), scale, bias, [&](const auto f) {
        for (int i = 0; i < n; ++i) {
            value[i] = f.value(x[i]);
            both[i] = f.value(x[i], derivative[i]);
        }
    });
}
// As in a kernel with one activation: value * weights_at_end, and dp * f'.
template <Activation activation>
void evaluate_own(float scale, float bias, int n, const float *x, const float *dp, float *value,
                  float *products) {
    using F = Own<activation>;
    const F f(scale, bias);
    for (int i = 0; i < n; ++i) {
        float slope;
        const float p = f.value(x[i], slope);
        value[i] = (F::kIsClamped ? machine::max(p, 0.f) : p) * F::weights_at_end(scale);
        products[i] = F::times_slope(dp[i], slope) * F::slopes_at_end(scale);
    }
}
extern "C" void evaluate_own(int activation, float scale, float bias, int n, const float *x, const float *dp,
                             float *value, float *products) {
    const auto evaluate = activation == int(Activation::relu) ? &evaluate_own<Activation::relu>
        : activation == int(Activation::relu2) ? &evaluate_own<Activation::relu2>
        : activation == int(Activation::sigmoid) ? &evaluate_own<Activation::sigmoid>
        : &evaluate_own<Activation::silu>;
    evaluate(scale, bias, n, x, dp, value, products);
}
extern "C" const float hidden_score = kHiddenScore;
extern "C" const char *name(int activation) { return kActivationNames[activation]; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("activations")
    (folder / "namespace_config.h").write_text("#define FLASH_NAMESPACE flash\n")
    (folder / "program.cpp").write_text(PROGRAM)
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{folder}", f"-I{HEADER.parent}",
         folder / "program.cpp", "-o", folder / "program.so"],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(folder / "program.so"))
    loaded.name.restype = ctypes.c_char_p
    return loaded


def evaluate(library, activation: str, x: torch.Tensor, scale: float = 1.0, bias: float = 0.0) -> tuple:
    """Return f(scale * x) twice, as both functions of the functor compute it, and f'."""
    results = [torch.full_like(x, torch.nan) for _ in range(3)]
    library.evaluate(
        NAMES.index(activation), ctypes.c_float(scale), ctypes.c_float(bias), len(x),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *results)),
    )  # fmt: skip
    return tuple(results)


def test_names(library):
    """The kernels' names of the activations are those of the contract."""
    assert tuple(library.name(i).decode() for i in range(len(NAMES))) == NAMES == tuple(FUNCTIONS)


@pytest.mark.parametrize("bias", [-9.0, -2.0, 0.0, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.125, -0.5])
@pytest.mark.parametrize("activation", NAMES[1:])
def test_values_and_derivatives(library, activation, scale, bias):
    """f and f' are as exact as a 16-bit P and dS need."""
    x = torch.linspace(-40.0, 40.0, 4001)
    s = (x.double() * scale).requires_grad_()
    expected = FUNCTIONS[activation](s, bias)
    (slope,) = torch.autograd.grad(expected.sum(), s)
    value, both, derivative = evaluate(library, activation, x, scale, bias)
    assert torch.equal(value, both)
    kink = (s.detach() == 0) & (activation == "relu")
    for name, actual, e, floor in (
        ("f", value, expected.detach(), 1e-7 * (1 + s.detach().abs())),
        ("f'", derivative, torch.where(kink, derivative, slope), 2.0**-15),  # that of gelu crosses 0
    ):
        error = (actual.double() - e).abs()
        assert (error <= 2.0**-13 * e.abs() + floor).all(), f"{name} is off by {error.max():.3g}"


def test_identity(library):
    """The identity is the only one that never applies the scale: kernels do so before, or at the end."""
    x = torch.tensor([-3.0, 0.0, 2.5, torch.inf])
    value, both, derivative = evaluate(library, "identity", x, scale=0.125)
    assert torch.equal(value, x) and torch.equal(both, x) and torch.equal(derivative, torch.ones(4))


@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "softplus"])
def test_tails(library, activation):
    """Small weights keep their digits, as many keys add them up."""
    x = torch.linspace(-12.0, -4.0, 801)
    bias = -3.0 if activation == "sigmoid" else 0.0
    expected = FUNCTIONS[activation](x.double(), bias)
    value, _, _ = evaluate(library, activation, x, bias=bias)
    assert ((value.double() / expected - 1).abs() < 2.0**-10).all()


@pytest.mark.parametrize("activation", NAMES[1:])
def test_non_finite_scores_show(library, activation):
    """NaN makes f and f' NaN. Inf makes f Inf or NaN, or its limit. Large numbers do neither."""
    nan, inf, large = torch.tensor([torch.nan]), torch.tensor([torch.inf]), torch.tensor([2.5e20])
    assert all(x.isnan() for x in evaluate(library, activation, nan))
    value, _, _ = evaluate(library, activation, inf)
    assert value.item() == 1.0 if activation == "sigmoid" else not value.isfinite()
    for bias in (0.0, -5.0) if activation == "sigmoid" else (0.0,):
        assert all(x.isfinite() for x in evaluate(library, activation, large, bias=bias))
        assert all(x.isfinite() for x in evaluate(library, activation, -large, bias=bias))


# Of kernels with one activation. In float16 they take scores that the scale was applied to: a scale of 1.
SCALES = [1.0, 0.125, 2.0**-16, 2.0**16]


def evaluate_own(
    library, activation: str, x: torch.Tensor, dp: torch.Tensor, scale: float = 1.0, bias: float = 0.0
) -> tuple:
    """Return f(scale * x), and dp * f'."""
    results = [torch.full_like(x, torch.nan) for _ in range(2)]
    library.evaluate_own(
        NAMES.index(activation), ctypes.c_float(scale), ctypes.c_float(bias), len(x),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, dp, *results)),
    )  # fmt: skip
    return tuple(results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("activation", OWN)
def test_own_values_and_derivatives(library, activation, scale, bias, dtype):
    """f and f' of kernels with one activation, from 0 to scores whose f fits, and rounded to 16 bits."""
    large = torch.logspace(1, 4.5, 200) if dtype == torch.float16 else torch.logspace(1, 10.8, 200)
    s32 = torch.cat([torch.linspace(-40.0, 40.0, 4001), torch.tensor([0.0, -0.0]), large, -large])
    x, given = (s32, 1.0) if dtype == torch.float16 else (s32 / scale, scale)
    s = (x.double() * given).requires_grad_()
    expected = FUNCTIONS[activation](s, bias)
    (slope,) = torch.autograd.grad(expected.sum(), s)
    expected, s = expected.detach(), s.detach()
    value, products = evaluate_own(library, activation, x, torch.full_like(x, -3.0), given, bias)
    assert not value.isnan().any()
    if dtype == torch.float16:  # P saturates
        value, expected = (v.double().clamp(-65504, 65504) for v in (value, expected))
    kink = (s == 0) & (activation == "relu")
    error = (value.to(dtype).double() - expected).abs()
    bound = torch.finfo(dtype).eps * expected.abs() + 1e-7 * (1 + s.abs())
    assert (error <= bound).all(), f"f is off by {error.max():.3g}"
    error = torch.where(kink, 0.0, products.double() + 3.0 * slope).abs()
    assert (error <= 3 * (2.0**-13 * slope.abs() + 2.0**-15)).all(), f"f' is off by {error.max():.3g}"
    assert (products[kink] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("activation", OWN)
def test_own_non_finite_values_show_and_hidden_ones_do_not(library, activation, scale):
    nan, inf, one = torch.tensor([torch.nan]), torch.tensor([torch.inf]), torch.ones(1)
    assert all(r.isnan() for r in evaluate_own(library, activation, nan, one, scale))
    value, _ = evaluate_own(library, activation, inf, one, scale)
    assert value.item() == 1.0 if activation == "sigmoid" else not value.isfinite()
    value, _ = evaluate_own(library, activation, -inf, one, scale)
    assert value.item() == 0.0 or value.isnan()
    # A NaN in dO or V shows where f' is not 0.
    _, products = evaluate_own(library, activation, one / scale, nan, scale)
    assert products.isnan()
    hidden = torch.tensor([ctypes.c_float.in_dll(library, "hidden_score").value])
    for bias in (0.0, 60.0) if activation == "sigmoid" else (0.0,):
        value, products = evaluate_own(library, activation, hidden, nan, scale, bias)
        assert value.item() == 0.0 and (activation != "relu" or products.item() == 0.0)
