"""The score function of attention without softmax: its contract, f itself, and f'.

This docstring is the one statement of what ``use_softmax=False`` means; the other docstrings refer to it.

With i a query of the sequence (i < seqlen_q), j a key of it (j < seqlen_k) and c = i + seqlen_k - seqlen_q the key
that the query is aligned with (bottom right):

    u = softmax_scale * q_i . k_j                          the scaled score
    u = softcap * tanh(u / softcap)                        only if softcap > 0
    s = u - slope * |c - j|                                only with alibi_slopes: the full bias, also when causal
    P = f(s) if j is visible to i, else exactly 0          assigned after f, since f(0) may be non-zero
    O_i = norm_i / (1 - dropout_p) * sum_j keep_ij P_ij v_j

Visible: j < seqlen_k, and j <= c + window_right and j >= c - window_left as far as these are limited; causal is
window_right = 0. A query that sees no key gives exactly 0. A key that no query sees gets a gradient of exactly 0.
There is no row maximum, no exponential, no sum over the row, and so no log-sum-exp: functions that return one return an
empty float32 tensor, and asking for it is an error. Partial results over disjoint keys merge by plain addition
(split-KV, ring attention), as long as ``n`` below and the alignment c are those of the whole sequence.

f is chosen by ``activation``:

    "identity"   s                                         linear attention with an explicit score matrix
    "relu"       max(s, 0)                                 Wortsman et al., arXiv 2309.08586 (with "1/n")
    "relu2"      max(s, 0)^2                               Hua et al., GAU / FLASH, arXiv 2202.10447
    "sigmoid"    1 / (1 + exp(-(s + sigmoid_bias)))        Ramapuram et al., arXiv 2409.04431 (with "-log n")
    "silu"       s / (1 + exp(-s))                         Zhai et al., HSTU, arXiv 2402.17152 (with "1/n")

``sigmoid_bias`` is a finite float, or "-log n" with n the number of keys of that sequence.

norm_i is chosen by ``normalization``:

    None         1
    "1/n"        1 / n                                     arXiv 2309.08586, 2402.17152
    "1/visible"  1 / number of keys that query i sees      by mask; dropped keys count
    "1/sqrt(n)"  1 / sqrt(n)                               Frobenius-norm argument of arXiv 2410.18613

n is the number of keys of that sequence, padding not counted: seqlen_k (dense), the length in cu_seqlens_k or seqused_k
less leftpad_k (varlen), the cache length with the appended keys less leftpad_k (KV cache). norm_i multiplies the
accumulated output (and, in the backward pass, the rows of dO) in float32; it is never folded into P, which would lose
bits of a 16-bit P. Scores grow with the number of keys unless the activation or the normalization bounds them: the
works above follow the attention by an RMSNorm or GroupNorm (arXiv 2104.07012, 2210.10340).

Backward, with dO'_i = norm_i dO_i, dP_ij = dO'_i . v_j and r = 1 / (1 - dropout_p):

    dV_j = r sum_i keep_ij P_ij dO'_i
    dS_ij = keep_ij dP_ij f'(s_ij) (1 - tanh^2(u / softcap))   if j is visible to i, else exactly 0
    dQ_i = r softmax_scale sum_j dS_ij k_j
    dK_j = r softmax_scale sum_i dS_ij q_i

The mask and the dropout act on dS as well: without softmax dS has no factor P that would do it, and a visible score of
exactly 0 still has a gradient. Neither O nor a log-sum-exp is needed.

Finite in, finite out: for float16 tensors of any finite size and bfloat16 tensors up to 1e9 no output or gradient is
NaN or Inf. With float16, P and dS saturate at +-65504 before they are used; "relu2" takes scores above 2^40 as 2^40,
and its dS saturates at +-2^80. Outputs and gradients in 16 bit saturate at the largest finite value of their dtype. NaN
or Inf in a slot that no query may see never reaches a result.

The linear algorithm (flash_attn/linear) gives the same sums in another order. It forms only few scores, or none, so that
float16 scores beyond 65504 are limited there only where it forms them.
"""

import math
from typing import Optional, Union

import torch

ACTIVATIONS = ("identity", "relu", "relu2", "sigmoid", "silu")
NORMALIZATIONS = (None, "1/n", "1/visible", "1/sqrt(n)")
MINUS_LOG_N = "-log n"

# The square of a larger score would leave too little room for sums in float32 (see "Finite in, finite out").
_RELU2_MAX_SCORE = 2.0**40


def resolve(
    use_softmax: bool,
    activation: str = "identity",
    sigmoid_bias: Union[float, str] = 0.0,
    normalization: Optional[str] = None,
) -> tuple[bool, str, Optional[float], Optional[str]]:
    """Check the public arguments and return them as the operators take them: sigmoid_bias "-log n" becomes None.

    Raises ValueError if an argument is not one of its choices, or has no meaning beside the others.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {ACTIVATIONS}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r} is not one of {NORMALIZATIONS}")
    if isinstance(sigmoid_bias, str):
        if sigmoid_bias != MINUS_LOG_N:
            raise ValueError(f'sigmoid_bias={sigmoid_bias!r}: give a finite number or the string "{MINUS_LOG_N}"')
        bias = None
    elif isinstance(sigmoid_bias, (int, float)) and not isinstance(sigmoid_bias, bool):
        bias = float(sigmoid_bias)
        if not abs(bias) < math.inf:  # math.isfinite can't be traced with dynamic shapes
            raise ValueError(f'sigmoid_bias={sigmoid_bias!r}: give a finite number or the string "{MINUS_LOG_N}"')
    else:
        raise ValueError(f'sigmoid_bias={sigmoid_bias!r}: give a finite number or the string "{MINUS_LOG_N}"')
    if use_softmax and (activation != "identity" or bias != 0.0 or normalization is not None):
        raise ValueError(
            f"activation={activation!r}, sigmoid_bias={sigmoid_bias!r}, normalization={normalization!r} replace the "
            "softmax: pass use_softmax=False, or leave them at their defaults"
        )
    if bias != 0.0 and activation != "sigmoid":
        raise ValueError(f'sigmoid_bias={sigmoid_bias!r} needs activation="sigmoid", got activation={activation!r}')
    return bool(use_softmax), activation, bias, normalization


def activate(s: torch.Tensor, activation: str, bias: Union[float, torch.Tensor] = 0.0) -> torch.Tensor:
    """f(s), elementwise; "identity" returns s itself. `bias` (number or broadcastable tensor) is used by "sigmoid"."""
    if activation == "identity":
        return s
    if activation == "relu":
        return torch.relu(s)
    if activation == "relu2":
        return torch.clamp(s, 0.0, _RELU2_MAX_SCORE).square()
    if activation == "sigmoid":
        return torch.sigmoid(s + bias)
    if activation == "silu":
        return torch.nn.functional.silu(s)
    raise ValueError(f"activation={activation!r} is not one of {ACTIVATIONS}")


def activate_backward(
    grad: torch.Tensor, s: torch.Tensor, activation: str, bias: Union[float, torch.Tensor] = 0.0
) -> torch.Tensor:
    """grad * f'(s), elementwise; "identity" returns grad itself. f' is 0 at the kink of "relu"."""
    if activation == "identity":
        return grad
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, s, 0)
    if activation == "relu2":
        return torch.clamp(s, 0.0, _RELU2_MAX_SCORE).mul_(2.0).mul_(grad)
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(s + bias))
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, s)
    raise ValueError(f"activation={activation!r} is not one of {ACTIVATIONS}")


def activate_grad(s: torch.Tensor, activation: str, bias: Union[float, torch.Tensor] = 0.0) -> torch.Tensor:
    """f'(s), elementwise, as a new tensor."""
    return activate_backward(torch.ones_like(s), s, activation, bias)


def attention_weights(
    scores: torch.Tensor,
    visible: Optional[torch.Tensor],
    activation: str = "identity",
    sigmoid_bias: Union[float, str, None] = 0.0,
    normalization: Optional[str] = None,
    n: Union[int, torch.Tensor, None] = None,
) -> torch.Tensor:
    """norm * (f(scores) where visible, else 0): the dense, differentiable weights for attention without a kernel.

    scores: (..., seqlen_q, seqlen_k), already scaled, capped and biased. visible: bool, broadcastable to scores; None
    sees all. sigmoid_bias: a float, or None or "-log n" for -log n. n: the number of keys of the sequence, a number or
    a tensor broadcastable to scores, such as (batch, 1, 1, 1); seqlen_k by default. Returns the shape and dtype of
    scores.
    """
    if n is None:
        n = scores.shape[-1]
    wide = torch.promote_types(scores.dtype, torch.float32)
    n = torch.as_tensor(n, dtype=wide, device=scores.device).clamp(min=1.0)
    if sigmoid_bias is None or sigmoid_bias == MINUS_LOG_N:
        sigmoid_bias = -torch.log(n).to(scores.dtype)
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=scores.device)
    # Filled before f as well: a NaN in a hidden score would come back through the product rule (0 * NaN).
    weights = activate(scores.masked_fill(~visible, 0.0), activation, sigmoid_bias).masked_fill(~visible, 0.0)
    if normalization is None:
        return weights
    if normalization == "1/n":
        norm = 1.0 / n
    elif normalization == "1/sqrt(n)":
        norm = torch.rsqrt(n)
    elif normalization == "1/visible":
        norm = 1.0 / visible.expand(scores.shape).sum(dim=-1, keepdim=True, dtype=wide).clamp(min=1.0)
    else:
        raise ValueError(f"normalization={normalization!r} is not one of {NORMALIZATIONS}")
    return (weights.to(wide) * norm).to(scores.dtype)
