"""The score function of attention without softmax: its contract, and one row for each activation and
normalization.

This docstring is the one statement of what ``use_softmax=False`` means; the other docstrings refer to it.

With i a query of the sequence (i < seqlen_q), j a key of it (j < seqlen_k) and c = i + seqlen_k - seqlen_q
the key that the query is aligned with (bottom right):

    u = softmax_scale * q_i . k_j                          the scaled score
    u = softcap * tanh(u / softcap)                        only if softcap > 0
    s = u - slope * |c - j|                                only with alibi_slopes: the full bias, also when
                                                           causal
    P = f(s) if j is visible to i, else exactly 0          assigned after f, since f(0) may be non-zero
    O_i = norm_i / (1 - dropout_p) * sum_j keep_ij P_ij v_j

Visible: j < seqlen_k, and j <= c + window_right and j >= c - window_left as far as these are limited, each
side alone and for any lengths; causal is window_right = 0. A query that sees no key gives exactly 0. A key
that no query sees gets a gradient of exactly 0. So do rows of packed tensors that belong to no sequence.
There is no row maximum, no exponential, no sum over the row, and so no log-sum-exp: functions that return one
return an empty float32 tensor, and asking for it is an error. Partial results over disjoint keys merge by
plain addition (split-KV, ring attention), as long as ``n`` below and the alignment c are those of the whole
sequence.

A sequence gives the same result alone, packed beside any other, with any max_seqlen that is long enough, with
any capacity of a cache, and on every backend, up to rounding (the mask of dropout excepted).

f is chosen by ``activation``:

    "identity"   s                                         linear attention with an explicit score matrix
    "relu"       max(s, 0)                                 Wortsman et al., arXiv 2309.08586 (with "1/n")
    "relu2"      max(s, 0)^2                               Hua et al., GAU / FLASH, arXiv 2202.10447
    "sigmoid"    1 / (1 + exp(-(s + sigmoid_bias)))        Ramapuram et al., arXiv 2409.04431 (with "-log n")
    "silu"       s / (1 + exp(-s))                         Zhai et al., HSTU, arXiv 2402.17152 (see below)
    "gelu"       s (1 + erf(s / sqrt 2)) / 2               Hendrycks and Gimpel, arXiv 1606.08415, the exact
                 form
    "softplus"   log(1 + exp(s))                           Dugas et al., NIPS 2000

``sigmoid_bias`` is a finite float, or "-log n" with n the number of keys of that sequence, or a float32
tensor (nheads,) or (batch, nheads), a bias for each query head.

norm_i is chosen by ``normalization``:

    None         1
    "1/n"        1 / n                                     arXiv 2309.08586
    "1/visible"  1 / number of keys that query i sees      by mask; dropped keys count
    "1/sqrt(n)"  1 / sqrt(n)                               Frobenius-norm argument of arXiv 2410.18613
    a number     the factor itself, at most 1e9            1 / 1024, not 1024: a constant n, such as the
                                                           longest length of a recommender's training set
    a tensor     the factors, float32                      (batch,) or (batch, seqlen_q) dense and with a
                                                           cache; (batch,) or (total_q,) packed, where
                                                           total_q = batch is read as (total_q,)

A number or a tensor makes pieces equal the whole: decoding step by step, prefill in chunks, and partial
results over disjoint keys, whose own n is not that of the sequence. Neither has a gradient, and a tensor that
requires one is refused.

n is the number of keys of that sequence, padding not counted: seqlen_k (dense), the length in cu_seqlens_k or
seqused_k less leftpad_k (varlen), the cache length with the appended keys less leftpad_k (KV cache). norm_i
multiplies the accumulated output (and, in the backward pass, the rows of dO) in float32; it is never folded
into P, which would lose bits of a 16-bit P. Scores grow with the number of keys unless the activation or the
normalization bounds them: the works above follow the attention by an RMSNorm or GroupNorm (arXiv 2104.07012,
2210.10340). Meta's HSTU divides all sequences of a batch by its longest length: pass None and divide the
output.

Backward, with dO'_i = norm_i dO_i, dP_ij = dO'_i . v_j and r = 1 / (1 - dropout_p):

    dV_j = r sum_i keep_ij P_ij dO'_i
    dS_ij = keep_ij dP_ij f'(s_ij) (1 - tanh^2(u / softcap))   if j is visible to i, else exactly 0
    dQ_i = r softmax_scale sum_j dS_ij k_j
    dK_j = r softmax_scale sum_i dS_ij q_i

The mask and the dropout act on dS as well: without softmax dS has no factor P that would do it, and a visible
score of exactly 0 still has a gradient. Neither O nor a log-sum-exp is needed.

Derivatives of any order, or an error: with the identity, without softcap and dropout, these formulas are
attention again, and can be differentiated any number of times, in either direction. Elsewhere a second
derivative raises.

What is not finite shows: a NaN or Inf in a visible q, k, v or dO makes every result that depends on it NaN or
Inf, and only f may end it (the sigmoid of +-Inf, relu of -Inf). NaN or Inf in a slot that no query may see
never reaches a result.

Forward saturates, backward does not. Finite in, finite out: for float16 tensors of any finite size and for
bfloat16 and float32 tensors up to 1e9 the output is finite, if no given factor is above 1. With float16, P
and the output saturate at +-65504; "relu2" takes scores above 2^40 as 2^40. In backward P saturates where it
is computed again, dS and the gradients never: what their dtype can't hold becomes Inf or NaN, as everywhere
in PyTorch, so that torch.amp.GradScaler sees it and backs off. A finite gradient is a right gradient.

The linear algorithm (backends/linear) gives the same sums in another order. It forms only few scores, or
none, so that float16 scores beyond 65504 are limited there only where it forms them.
"""

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional, Union

import torch

MINUS_LOG_N = "-log n"

# The square of a larger score would leave too little room for sums in float32 (see "Finite in, finite out").
_RELU2_MAX_SCORE = 2.0**40

Bias = Union[float, torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """One f. value(s, bias) is f(s); times_derivative(grad, s, bias) is grad * f'(s). Both elementwise, in
    the dtype of s.

    bias: a number or a tensor that broadcasts to s, for the f that takes_bias; the others don't look at it.
    linear: f is the identity. May overwrite none of its arguments; the identity returns them as they are.
    """

    value: Callable[[torch.Tensor, Bias], torch.Tensor]
    times_derivative: Callable[[torch.Tensor, torch.Tensor, Bias], torch.Tensor]
    linear: bool = False
    takes_bias: bool = False


def _relu2(s: torch.Tensor, bias: Bias) -> torch.Tensor:
    # The cap is for finite scores: NaN and Inf pass.
    return torch.where(s == torch.inf, s, torch.clamp(s, 0.0, _RELU2_MAX_SCORE)).square()


def _relu_derivative(grad: torch.Tensor, s: torch.Tensor, bias: Bias) -> torch.Tensor:
    # s * 0 in place of 0 would be NaN for -Inf, where relu ends: the NaN of a NaN alone is wanted.
    return torch.where(s > 0.0, grad, torch.where(s <= 0.0, 0.0, s))


def _sigmoid_derivative(grad: torch.Tensor, s: torch.Tensor, bias: Bias) -> torch.Tensor:
    # Not p - p^2: for a large score p is 1 up to rounding, and the difference would have lost everything.
    x = s + bias
    return torch.sigmoid(x).mul_(torch.sigmoid(-x)).mul_(grad)


def _gelu_derivative(grad: torch.Tensor, s: torch.Tensor, bias: Bias) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(grad, s)


ACTIVATIONS = {
    "identity": Activation(lambda s, bias: s, lambda grad, s, bias: grad, linear=True),
    "relu": Activation(lambda s, bias: torch.relu(s), _relu_derivative),
    "relu2": Activation(_relu2, lambda grad, s, bias: torch.relu(s).mul_(2.0).mul_(grad)),
    "sigmoid": Activation(lambda s, bias: torch.sigmoid(s + bias), _sigmoid_derivative, takes_bias=True),
    "silu": Activation(
        lambda s, bias: torch.nn.functional.silu(s),
        lambda grad, s, bias: torch.ops.aten.silu_backward(grad, s),
    ),
    "gelu": Activation(lambda s, bias: torch.nn.functional.gelu(s), _gelu_derivative),
    "softplus": Activation(
        lambda s, bias: torch.logaddexp(s, torch.zeros((), dtype=s.dtype, device=s.device)),
        lambda grad, s, bias: torch.sigmoid(s).mul_(grad),
    ),
}


@dataclass(frozen=True)
class Normalization:
    """One norm_i: factor(n, visible) for numbers or tensors of at least 1. by_row: whether it differs between
    the queries of a sequence."""

    factor: Callable
    by_row: bool = False


NORMALIZATIONS = {
    None: Normalization(lambda n, visible: 1.0),
    "1/n": Normalization(lambda n, visible: 1.0 / n),
    "1/visible": Normalization(lambda n, visible: 1.0 / visible, by_row=True),
    "1/sqrt(n)": Normalization(lambda n, visible: n**-0.5),
}


class Score(NamedTuple):
    """A checked score function. sigmoid_bias: None is -log n, as the operators take it. factor: a
    normalization that was given as a number; its name is None then.
    """

    activation: str = "identity"
    sigmoid_bias: Optional[float] = 0.0
    normalization: Optional[str] = None
    factor: float = 1.0


DEFAULT = Score()
_LARGEST_FACTOR = 1e9


def resolve(
    use_softmax: bool,
    activation: str = "identity",
    sigmoid_bias: Union[float, str] = 0.0,
    normalization: Union[None, str, float] = None,
) -> Score:
    """Check the public arguments, tensors excepted, and return them as Score.

    Raises ValueError if an argument is not one of its choices, or has no meaning beside the others, TypeError
    if use_softmax is no bool.
    """
    if use_softmax is not True and use_softmax is not False:
        raise TypeError(f"use_softmax={use_softmax!r}: give True or False")
    # A list, say, can't be looked up.
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {tuple(ACTIVATIONS)}")
    bias = _bias(sigmoid_bias)
    score = Score(activation, bias, *_normalization(normalization))
    if use_softmax and score != DEFAULT:
        raise ValueError(
            f"activation={activation!r}, sigmoid_bias={sigmoid_bias!r}, normalization={normalization!r} "
            "replace the softmax: pass use_softmax=False, or leave them at their defaults"
        )
    if bias != 0.0 and not ACTIVATIONS[activation].takes_bias:
        raise ValueError(
            f'sigmoid_bias={sigmoid_bias!r} needs activation="sigmoid", got activation={activation!r}'
        )
    return score


def _normalization(given: Union[None, str, float]) -> tuple[Optional[str], float]:
    """Its name and its factor."""
    if isinstance(given, (str, type(None))):
        if given in NORMALIZATIONS:
            return given, 1.0
    elif isinstance(given, torch.SymFloat):
        return None, given
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        if 0.0 < given <= _LARGEST_FACTOR:
            return None, float(given)
    raise ValueError(
        f"normalization={given!r} is not one of {tuple(NORMALIZATIONS)}, and no factor either: a number "
        f"above 0 and up to {_LARGEST_FACTOR:g} (1 / n, not n) or a float32 tensor"
    )


def _bias(sigmoid_bias: Union[float, str]) -> Optional[float]:
    if isinstance(sigmoid_bias, str) and sigmoid_bias == MINUS_LOG_N:
        return None
    if isinstance(sigmoid_bias, (int, float)) and not isinstance(sigmoid_bias, bool):
        bias = float(sigmoid_bias)
        if abs(bias) < math.inf:  # math.isfinite can't be traced with dynamic shapes
            return bias
    raise ValueError(
        f'sigmoid_bias={sigmoid_bias!r}: give a finite number, the string "{MINUS_LOG_N}" or a float32 tensor'
    )


def attention_weights(
    scores: torch.Tensor,
    visible: Optional[torch.Tensor],
    activation: str = "identity",
    sigmoid_bias: Union[float, str] = 0.0,
    normalization: Union[None, str, float] = None,
    n: Union[int, torch.Tensor, None] = None,
) -> torch.Tensor:
    """norm * (f(scores) where visible, else 0): the dense, differentiable weights for attention without a
    kernel.

    scores: (..., seqlen_q, seqlen_k), already scaled, capped and biased. visible: bool, broadcastable to
    scores; None sees all. sigmoid_bias: a float, or "-log n". normalization: a name or a number. n: the
    number of keys of the sequence, a number or a tensor broadcastable to scores, such as (batch, 1, 1, 1);
    seqlen_k by default. Returns the shape and dtype of scores. Raises ValueError as `resolve` does.
    """
    score = resolve(False, activation, sigmoid_bias, normalization)
    if n is None:
        n = scores.shape[-1]
    wide = torch.promote_types(scores.dtype, torch.float32)
    n = torch.as_tensor(n, dtype=wide, device=scores.device).clamp(min=1.0)
    bias = -torch.log(n).to(scores.dtype) if score.sigmoid_bias is None else score.sigmoid_bias
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=scores.device)
    f, norm = ACTIVATIONS[activation], NORMALIZATIONS[score.normalization]
    # Filled before f as well: a NaN in a hidden score would come back through the product rule (0 * NaN).
    weights = f.value(scores.masked_fill(~visible, 0.0), bias).masked_fill(~visible, 0.0)
    if (score.normalization, score.factor) == (None, 1.0):
        return weights
    seen = (
        visible.expand(scores.shape).sum(dim=-1, keepdim=True, dtype=wide).clamp(min=1.0)
        if norm.by_row
        else None
    )
    return (weights.to(wide) * (norm.factor(n, seen) * score.factor)).to(scores.dtype)


def saturate_(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, in a wide dtype and in place, within the range of `dtype`, which it is about to be converted to.

    Other dtypes than float16 have the range of float32 and need nothing. A clamp alone would turn Inf into
    65504.
    """
    if dtype != torch.float16 or x.dtype == torch.float16:
        return x
    limit = torch.finfo(dtype).max
    not_finite = x - x  # NaN for NaN and Inf, else 0
    return x.clamp_(-limit, limit).add_(not_finite)
