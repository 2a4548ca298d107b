"""Define the activations f and f' of score.py in the form in which the kernels compute them.

A kernel gets y = unit * s instead of the score s: the host multiplies softmax_scale by `unit`, so the factor
that tanh or exp2 needs costs nothing per element. `derivative` is the derivative by y. The factor
softmax_scale of dQ and dK, which the host multiplies by `unit` as well, turns it into the derivative by s.

The functions take `m`, the operations of the machine that runs them: ``tanh``, ``exp2``, ``rcp``, ``abs``,
``relu`` (NaN for NaN), ``ramp(x, high)`` (x clamped to [0, high], any number for NaN) and ``where_positive(x,
a, b)`` (a where x > 0, else b). score_mods.py has the operations of the kernels; tests use torch.

f and f' turn a NaN score into NaN, and an Inf score into Inf or NaN unless f maps it to a finite value.

To add an activation, write a function of its bias that returns its Formula, and name it in _FORMULAS.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, Optional, Union

BY_HEAD = "by head"  # in the place of a sigmoid_bias: f gets it at run time
Bias = Union[float, None, str]

_LOG2_E = math.log2(math.e)

# "relu2" clamps larger scores to this (score.py, "Finite in, finite out").
_RELU2_MAX_SCORE = 2.0**36

# Below this bias, sigmoid is too small for (1 + tanh) / 2: tanh.approx has an error of 2^-11 near 1.
_SIGMOID_TANH_MIN_BIAS = -2.0

# erfc(x) = e^(-x^2) t P(t) with t = 1 / (1 + p x) is the form of Hastings (Approximations for Digital
# Computers, 1955; Abramowitz and Stegun 7.1.23 to 7.1.26). These are (p, P) for e^(s^2/2) erfc(s / sqrt 2) /
# 2 by s, fitted for the smallest relative error over 0 <= s <= 14, 2^-14.9. 7.1.26 has the smallest absolute
# error, and loses the tail.
_ERFC_P = 0.375
_ERFC = (0.1490610035, 0.1577342061, 0.0835633490, 0.2002825670, -0.0906432187)

# log1p(e) / e for 0 <= e <= 1, fitted to the smallest relative error, 2^-14.1.
_LOG1P = (0.9999432813, -0.4969778394, 0.3063010184, -0.1574272832, 0.0413473179)


@dataclass(frozen=True)
class Formula:
    """f(y, n) and grad * df/dy(grad, y, n). n is a float of the machine: the number of keys of the sequence,
    or the bias of the head if sigmoid_bias is BY_HEAD.

    inf_seen_in: where a kernel looks for an infinite score before float16 saturation turns it into a large
    number. "weights" works for any f. "scores" costs half as much, but needs registers that f leaves free.
    None if f is finite or NaN even at +-Inf.
    """

    unit: float
    value: Callable[[Any, Any, Any], Any]
    derivative: Callable[[Any, Any, Any, Any], Any]
    inf_seen_in: Optional[str] = "weights"


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    *rest, total = coefficients
    for coefficient in reversed(rest):
        total = total * x + coefficient
    return total


def _identity(bias: Bias) -> Formula:
    return Formula(1.0, lambda m, y, n: y, lambda m, grad, y, n: grad, inf_seen_in="scores")


def _relu(bias: Bias) -> Formula:
    def derivative(m, grad, y, n):
        # The kernel already has P. Where P is not > 0 it is 0 or NaN, and dS is then the same.
        p = m.relu(y)
        return m.where_positive(p, grad, p)

    return Formula(1.0, lambda m, y, n: m.relu(y), derivative, inf_seen_in="scores")


def _relu2(bias: Bias) -> Formula:
    def value(m, y, n):
        x = m.ramp(y, _RELU2_MAX_SCORE)
        return x * x + y * 0.0  # the last term is 0, but restores the NaN or Inf that the clamp lost, as NaN

    def derivative(m, grad, y, n):
        p = m.relu(y)
        return grad * (p + p)

    return Formula(1.0, value, derivative, inf_seen_in=None)


def _silu(bias: Bias) -> Formula:
    """silu(2y) = y + y tanh(y): one operation of the special function unit."""

    def value(m, y, n):
        return y + y * m.tanh(y)

    def derivative(m, grad, y, n):
        t = m.tanh(y)
        return grad * ((1.0 + t) + y * (1.0 - t * t))

    return Formula(0.5, value, derivative)


def _gelu(bias: Bias) -> Formula:
    """s Phi(s) = max(s, 0) - |s| Phi(-|s|) with y^2 = log2(e) s^2 / 2, so that 2^(-y^2) is e^(-s^2 / 2).

    Phi(-|s|) is e^(-s^2 / 2) t P(t) (see _ERFC), which keeps its digits in the tail.
    """
    unit = math.sqrt(0.5 * _LOG2_E)
    coefficients = tuple(c / unit for c in _ERFC)
    of_density = 1.0 / (unit * unit * math.sqrt(2.0 * math.pi))

    def tail(m, y):
        """Return 2^(-y^2) and Phi(-|s|) / unit."""
        t = m.rcp(m.abs(y) * (_ERFC_P / unit) + 1.0)
        e = m.exp2(-(y * y))
        return e, e * t * _polynomial(coefficients, t)

    def value(m, y, n):
        return m.relu(y) * (1.0 / unit) - m.abs(y) * tail(m, y)[1]

    def derivative(m, grad, y, n):
        e, h = tail(m, y)
        return grad * (m.where_positive(y, 1.0 / unit - h, h) + e * (y * of_density))

    return Formula(unit, value, derivative, inf_seen_in=None)


def _softplus(bias: Bias) -> Formula:
    """log(1 + e^s) = max(s, 0) + log1p(2^-|y|); its derivative is the sigmoid."""

    def value(m, y, n):
        e = m.exp2(-m.abs(y))
        return m.relu(y) * math.log(2.0) + e * _polynomial(_LOG1P, e)

    def derivative(m, grad, y, n):
        e = m.exp2(-m.abs(y))
        p = m.rcp(1.0 + e)
        return grad * (m.where_positive(y, p, e * p) * math.log(2.0))

    return Formula(_LOG2_E, value, derivative)


def _sigmoid(bias: Bias) -> Formula:
    # Only the device knows the bias of a head, and by exp2 each is accurate.
    by_tanh = isinstance(bias, float) and bias >= _SIGMOID_TANH_MIN_BIAS
    return _sigmoid_by_tanh(bias) if by_tanh else _sigmoid_by_exp2(bias)


def _sigmoid_by_tanh(bias: float) -> Formula:
    """sigmoid(2y + bias) = 1/2 + 1/2 tanh(y + bias/2): one operation of the special function unit."""

    def value(m, y, n):
        return 0.5 + 0.5 * m.tanh(y + 0.5 * bias)

    def derivative(m, grad, y, n):
        t = m.tanh(y + 0.5 * bias)
        return grad * (0.5 - 0.5 * (t * t))

    return Formula(0.5, value, derivative, inf_seen_in=None)


def _sigmoid_by_exp2(bias: Bias) -> Formula:
    """sigmoid(s + bias) = 1 / (1 + 2^(-y - bias log2 e)), accurate where it is small; bias None is -log n."""

    def parts(m, y, n):
        # Not n = e^-bias for BY_HEAD: it would overflow where s + bias is moderate.
        e = n * m.exp2(-y) if bias is None else m.exp2(-y - (n if bias == BY_HEAD else bias) * _LOG2_E)
        return e, m.rcp(1.0 + e)

    def value(m, y, n):
        return parts(m, y, n)[1]

    def derivative(m, grad, y, n):
        # sigmoid(x) sigmoid(-x), because p - p^2 would lose its digits where p is about 1. The ramp avoids
        # Inf * 0 where p = 0.
        e, p = parts(m, y, n)
        return grad * ((m.ramp(e, 2.0**100) * p) * (p * math.log(2.0)))

    return Formula(_LOG2_E, value, derivative, inf_seen_in=None)


_FORMULAS: dict[str, Callable[[Bias], Formula]] = {
    "identity": _identity,
    "relu": _relu,
    "relu2": _relu2,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "softplus": _softplus,
}


def _capped(f: Formula, softcap: float) -> Formula:
    """Apply f after s = softcap * tanh(s / softcap), in the unit of f. The cap makes an Inf finite."""
    cap = softcap * f.unit

    def value(m, y, n):
        return f.value(m, cap * m.tanh(y * (1.0 / cap)), n)

    def derivative(m, grad, y, n):
        t = m.tanh(y * (1.0 / cap))
        return f.derivative(m, grad, cap * t, n) * (1.0 - t * t)

    return Formula(f.unit, value, derivative, inf_seen_in=None)


def formula(activation: str, sigmoid_bias: Bias = 0.0, softcap: float = 0.0) -> Formula:
    """Return the formula of arguments from score.resolve. sigmoid_bias None is -log n, BY_HEAD is a bias for
    each head. softcap 0 is none.
    """
    f = _FORMULAS[activation](sigmoid_bias)
    return _capped(f, softcap) if softcap else f
