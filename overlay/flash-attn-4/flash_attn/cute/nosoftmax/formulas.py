"""The activations f and f' of score.py in the form in which the kernels compute them.

A kernel gets y = unit * s instead of the score s: the host multiplies softmax_scale by `unit`, so the factor that tanh
or exp2 needs costs nothing per element. `derivative` is taken by y, and the factor softmax_scale of dQ and dK, which is
multiplied by `unit` as well, makes it the derivative by s.

The functions take `m`, the operations of the machine that runs them: ``tanh``, ``exp2``, ``rcp``, ``relu``,
``clamp(x, low, high)``, ``where_positive(x, a)`` (a where x > 0, else 0). score_mods.py has those of the kernels; tests use torch.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, Optional

_LOG2_E = math.log2(math.e)

# "relu2" takes larger scores as this, and its dS saturates at the square (score.py, "Finite in, finite out").
_RELU2_MAX_SCORE = 2.0**40
_RELU2_MAX_GRAD = 2.0**80

# Below this bias, sigmoid is so small that (1 + tanh) / 2 has lost it: tanh.approx has an error of 2^-11 beside 1.
_SIGMOID_TANH_MIN_BIAS = -2.0


@dataclass(frozen=True)
class Formula:
    """f(y, n) and grad * df/dy(grad, y, n), with n the number of keys of the sequence, as a float of the machine."""

    unit: float
    value: Callable[[Any, Any, Any], Any]
    derivative: Callable[[Any, Any, Any, Any], Any]


def _identity() -> Formula:
    return Formula(1.0, lambda m, y, n: y, lambda m, grad, y, n: grad)


def _relu() -> Formula:
    return Formula(1.0, lambda m, y, n: m.relu(y), lambda m, grad, y, n: m.where_positive(y, grad))


def _relu2() -> Formula:
    def value(m, y, n):
        x = m.clamp(y, 0.0, _RELU2_MAX_SCORE)
        return x * x

    def derivative(m, grad, y, n):
        x = m.clamp(y, 0.0, _RELU2_MAX_SCORE)
        return m.clamp(grad * (x + x), -_RELU2_MAX_GRAD, _RELU2_MAX_GRAD)

    return Formula(1.0, value, derivative)


def _silu() -> Formula:
    """silu(2y) = y + y tanh(y): one operation of the special function unit."""

    def value(m, y, n):
        return y + y * m.tanh(y)

    def derivative(m, grad, y, n):
        t = m.tanh(y)
        return grad * ((1.0 + t) + y * (1.0 - t * t))

    return Formula(0.5, value, derivative)


def _sigmoid_by_tanh(bias: float) -> Formula:
    """sigmoid(2y + bias) = 1/2 + 1/2 tanh(y + bias/2): one operation of the special function unit."""

    def value(m, y, n):
        return 0.5 + 0.5 * m.tanh(y + 0.5 * bias)

    def derivative(m, grad, y, n):
        t = m.tanh(y + 0.5 * bias)
        return grad * (0.5 - 0.5 * (t * t))

    return Formula(0.5, value, derivative)


def _sigmoid_by_exp2(bias: Optional[float]) -> Formula:
    """sigmoid(s + bias) = 1 / (1 + 2^(-y - bias log2 e)), accurate where it is small; bias None is -log n."""

    def value(m, y, n):
        e = n * m.exp2(-y) if bias is None else m.exp2(-y - bias * _LOG2_E)
        return m.rcp(1.0 + e)

    def derivative(m, grad, y, n):
        p = value(m, y, n)
        return grad * ((p - p * p) * math.log(2.0))

    return Formula(_LOG2_E, value, derivative)


def _capped(f: Formula, softcap: float) -> Formula:
    """f after s = softcap * tanh(s / softcap), in the unit of f."""
    cap = softcap * f.unit

    def value(m, y, n):
        return f.value(m, cap * m.tanh(y * (1.0 / cap)), n)

    def derivative(m, grad, y, n):
        t = m.tanh(y * (1.0 / cap))
        return f.derivative(m, grad, cap * t, n) * (1.0 - t * t)

    return Formula(f.unit, value, derivative)


def formula(activation: str, sigmoid_bias: Optional[float] = 0.0, softcap: float = 0.0) -> Formula:
    """The formula of arguments that score.resolve returned; sigmoid_bias None is -log n, softcap 0 is none."""
    if activation == "sigmoid":
        by_tanh = sigmoid_bias is not None and sigmoid_bias >= _SIGMOID_TANH_MIN_BIAS
        f = _sigmoid_by_tanh(sigmoid_bias) if by_tanh else _sigmoid_by_exp2(sigmoid_bias)
    else:
        f = {"identity": _identity, "relu": _relu, "relu2": _relu2, "silu": _silu}[activation]()
    return _capped(f, softcap) if softcap else f
