"""Define attention without softmax: the contract, and one entry for each activation and normalization.

This docstring specifies ``use_softmax=False``. The other docstrings refer to it.

For query i (i < seqlen_q) and key j (j < seqlen_k) of a sequence, with c = i + seqlen_k - seqlen_q the key
that query i is aligned with (bottom right):

    u = softmax_scale * q_i . k_j                          the scaled score
    u = softcap * tanh(u / softcap)                        only if softcap > 0
    s = u - slope * |c - j|                                only with alibi_slopes: the full bias, also when
                                                           causal
    P = exp(-decay * |c - j|) f(s)                         the factor only with decay_slopes
        if j is visible to i, else exactly 0               assigned after f, since f(0) may be non-zero
    O_i = norm_i / (1 - dropout_p) * sum_j keep_ij P_ij v_j

Key j is visible to query i if j < seqlen_k, j <= c + window_right and j >= c - window_left. Each side of the
window applies on its own and for any lengths, and a negative side sets no limit. causal sets window_right to
0. A ``mask`` of flash_attn.masks stands in their place and says itself which keys a query sees. A query that
sees no key outputs exactly 0. A key that no query sees gets a gradient of exactly 0. Rows of packed results
that belong to no sequence are exactly 0 too.

There is no row maximum, no exponential, no row sum, and so no log-sum-exp: return_attn_probs returns an empty
float32 tensor in its place, and return_softmax_lse=True is an error. Partial results over disjoint keys
(split-KV, ring attention) add up to the whole if each part uses ``n`` (below) and the alignment c of the
whole sequence, from which ALiBi and a decay count: nosoftmax.forward and backward take it as ``diagonal``.

A sequence gives the same result alone or packed beside others, with any sufficient max_seqlen, any cache
capacity and every backend, up to rounding and the dropout mask.

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

``decay_slopes`` is a float32 tensor (nheads,) or (batch, nheads) of finite numbers that are not negative, a
decay for each query head. It multiplies the weight where ALiBi adds to the score, and both may be given. With
gamma = exp(-decay) and the identity, causal attention is retention (Sun et al., arXiv 2307.08621) and
lightning attention (Qin et al., arXiv 2405.17381; MiniMax-01, arXiv 2501.08313), whose norm and gate come
after it. decay_slopes get no gradient, and ones that require it raise ValueError.

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

Pass a number or a tensor where a call holds a part of a sequence, whose own n is not that of the sequence:
decoding step by step, prefill in chunks, partial results over disjoint keys. The pieces then equal the whole.
Neither a number nor a tensor gets a gradient, and a tensor that requires one raises ValueError.

n is the number of keys of the sequence, without padding: seqlen_k (dense), the length in cu_seqlens_k or
seqused_k minus leftpad_k (varlen), the cache length with the appended keys minus leftpad_k (KV cache). norm_i
multiplies the accumulated output, and in the backward pass the rows of dO, in float32. It is never folded
into P, because a 16-bit P would lose bits. Outputs grow with the number of keys unless the activation or the
normalization bounds them: published models follow such attention by an RMSNorm or GroupNorm (arXiv
2104.07012, 2210.10340). Meta's HSTU divides every sequence of a batch by the longest length in it: pass None
and divide the output.

Backward, with dO'_i = norm_i dO_i, dP_ij = dO'_i . v_j and r = 1 / (1 - dropout_p):

    dV_j = r sum_i keep_ij P_ij dO'_i
    dS_ij = keep_ij dP_ij f'(s_ij) (1 - tanh^2(u / softcap))   if j is visible to i, else exactly 0; with
                                                               decay_slopes times exp(-decay * |c - j|)
    dQ_i = r softmax_scale sum_j dS_ij k_j
    dK_j = r softmax_scale sum_i dS_ij q_i

The mask and the dropout apply to dS as well as to P: without softmax, dS has no factor P that would apply
them, and a visible score of exactly 0 still has a gradient. The backward pass needs neither O nor a
log-sum-exp.

Higher derivatives are exact or an error. With the identity, without softcap and dropout, these formulas are
attention again, and can be differentiated any number of times, in forward and in reverse mode. Elsewhere a
second derivative raises RuntimeError.

Non-finite values propagate: a NaN or Inf in a visible q, k, v or dO makes every result that depends on it NaN
or Inf. Only f may stop it (the sigmoid of +-Inf, relu of -Inf). A NaN or Inf in a slot that no query may see
never reaches a result.

Forward saturates, backward does not. Finite in, finite out: the output is finite for any finite float16
tensors, and for bfloat16 and float32 tensors up to 1e9, if no given factor is above 1. In float16, P and the
output saturate at +-65504; "relu2" clamps its scores to 2^36. The backward pass saturates the P that it
recomputes, but never dS or the gradients: a value that their dtype can't hold becomes Inf or NaN, as
elsewhere in PyTorch, so that torch.amp.GradScaler sees it and backs off. A finite gradient is a correct
gradient.

The linear algorithm (backends/linear) computes the same sums in another order. It forms few scores or none,
and saturates only the float16 scores that it forms.
"""

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional, Union

import torch

MINUS_LOG_N = "-log n"

# The square of a larger score would leave too little room for sums in float32 (see "Finite in, finite out").
_RELU2_MAX_SCORE = 2.0**36

Bias = Union[float, torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """An activation f. value(s, bias) returns f(s), and times_derivative(grad, s, bias) returns grad * f'(s),
    elementwise in the dtype of s.

    bias: a number or a tensor that broadcasts to s; an f without takes_bias ignores it. linear: f is the
    identity. Neither function may overwrite its arguments; the identity returns them unchanged.
    """

    value: Callable[[torch.Tensor, Bias], torch.Tensor]
    times_derivative: Callable[[torch.Tensor, torch.Tensor, Bias], torch.Tensor]
    linear: bool = False
    takes_bias: bool = False


def _relu2(s: torch.Tensor, bias: Bias) -> torch.Tensor:
    # Cap finite scores only: NaN and Inf pass.
    return torch.where(s == torch.inf, s, torch.clamp(s, 0.0, _RELU2_MAX_SCORE)).square()


def _relu_derivative(grad: torch.Tensor, s: torch.Tensor, bias: Bias) -> torch.Tensor:
    # Return NaN only for NaN. With s * 0 in place of 0, -Inf would give NaN as well, although relu stops it.
    return torch.where(s > 0.0, grad, torch.where(s <= 0.0, 0.0, s))


def _sigmoid_derivative(grad: torch.Tensor, s: torch.Tensor, bias: Bias) -> torch.Tensor:
    # Not p - p^2: for a large score p rounds to 1, and the difference would lose every bit.
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
    """A normalization norm_i. factor(n, visible) takes numbers or tensors of at least 1. by_row: whether
    norm_i differs between the queries of a sequence."""

    factor: Callable
    by_row: bool = False


NORMALIZATIONS = {
    None: Normalization(lambda n, visible: 1.0),
    "1/n": Normalization(lambda n, visible: 1.0 / n),
    "1/visible": Normalization(lambda n, visible: 1.0 / visible, by_row=True),
    "1/sqrt(n)": Normalization(lambda n, visible: n**-0.5),
}


class Score(NamedTuple):
    """A checked score function. sigmoid_bias: None stands for -log n, as in the operators. factor: the
    normalization if it was given as a number; normalization is None then.
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

    Raises ValueError if an argument is not one of its choices or does not fit the others, TypeError if
    use_softmax is not a bool.
    """
    if use_softmax is not True and use_softmax is not False:
        raise TypeError(f"use_softmax={use_softmax!r}: give True or False")
    # A list, for example, is not hashable.
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
    """Return the name and the factor of a normalization."""
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
    """Compute dense, differentiable attention weights without a kernel: norm * (f(scores) where visible, else
    0).

    scores: (..., seqlen_q, seqlen_k), already scaled, capped and biased. visible: bool, broadcastable to
    scores; None means all. sigmoid_bias: a float, or "-log n". normalization: a name or a number. n: the
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
    # Fill before f as well: the backward pass would multiply a NaN in a hidden score by 0, which gives NaN.
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
    """Clamp finite values of x, in place, to the range of `dtype`, to which the caller will convert x.

    Only float16 has a smaller range than float32. NaN and Inf become NaN: a clamp alone would turn Inf into
    65504.
    """
    if dtype != torch.float16 or x.dtype == torch.float16:
        return x
    limit = torch.finfo(dtype).max
    not_finite = x - x  # NaN for NaN and Inf, else 0
    return x.clamp_(-limit, limit).add_(not_finite)
