"""Attention over a batch of sequences of equal length: forward and backward."""

from typing import Optional

import torch

from . import checks
from .backward import backward
from .dropout import new_rng_state, seed_of
from .entry import entry_point, round128
from .forward import forward
from .options import Sequences
from .s_dmask import write_s_dmask

_Q_AXES = "batch, seqlen_q, nheads, head_dim"
_K_AXES = "batch, seqlen_k, nheads_k, head_dim"


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alibi_slopes: Optional[torch.Tensor]) -> None:
    checks.rank("q", q, _Q_AXES)
    checks.rank("k", k, _K_AXES)
    batch, _, nheads, head_dim = q.shape
    _, seqlen_k, nheads_k, _ = k.shape
    checks.shape("k", k, batch, seqlen_k, nheads_k, head_dim, axes=_K_AXES)
    checks.shape("v", v, batch, seqlen_k, nheads_k, head_dim, axes=_K_AXES)
    checks.heads(nheads, nheads_k, head_dim)
    checks.alibi_slopes(alibi_slopes, batch, nheads)


@entry_point
def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional[torch.Tensor],
    alibi_slopes: Optional[torch.Tensor],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: Optional[torch.Generator],
    use_softmax: bool = True,
    activation: str = "identity",
    sigmoid_bias: Optional[float] = 0.0,
    normalization: Optional[str] = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention forward. sigmoid_bias None is -log n; see flash_attn.score_function for the last four.

    q: (batch, seqlen_q, nheads, head_dim); k, v: (batch, seqlen_k, nheads_k, head_dim); out as q, written in place if
    it is given; float16, bfloat16, float32 or float64. alibi_slopes: float32 (nheads,) or (batch, nheads).
    Returns out; softmax_lse, float32 (batch, nheads, seqlen_q), or (0,) without softmax; S_dmask (batch, nheads,
    round128(seqlen_q), round128(seqlen_k)) in q's dtype if return_softmax and dropout_p > 0, else (0,); and rng_state,
    int64 (2,), for the backward pass.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    checks.same_kind(q, k=k, v=v, out=out)
    _check_shapes(q, k, v, alibi_slopes)
    checks.like(q, _Q_AXES, out=out)
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    options = checks.options(
        q, seqlen_k, softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p,
        alibi_slopes is not None, use_softmax, activation, sigmoid_bias, normalization,
    )
    rng_state = new_rng_state(dropout_p, gen)
    sequences = Sequences.of_batch(
        options, range(batch), (seqlen_q, seqlen_k), (nheads, nheads_k), alibi_slopes, seed_of(rng_state)
    )
    out = torch.empty_like(q) if out is None else out
    lse_shape = (batch, nheads, seqlen_q) if use_softmax else (0,)
    softmax_lse = torch.empty(lse_shape, dtype=torch.float32, device="cpu")
    forward(sequences, q, k, v, out, softmax_lse if use_softmax else None)
    s_dmask = q.new_zeros(0)
    if return_softmax and dropout_p > 0.0:
        s_dmask = q.new_zeros(batch, nheads, round128(seqlen_q), round128(seqlen_k))
        write_s_dmask(sequences, q, k, s_dmask)
    return out, softmax_lse, s_dmask, rng_state


@entry_point
def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: Optional[torch.Tensor],
    dk: Optional[torch.Tensor],
    dv: Optional[torch.Tensor],
    alibi_slopes: Optional[torch.Tensor],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: Optional[torch.Generator],
    rng_state: Optional[torch.Tensor],
    use_softmax: bool = True,
    activation: str = "identity",
    sigmoid_bias: Optional[float] = 0.0,
    normalization: Optional[str] = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention backward, always deterministic. Without softmax, out and softmax_lse are not read.

    dout, out, dq as q, dk and dv as k; dq, dk, dv may be strided views, and are written in place if they are given.
    rng_state is that of the forward pass; dropout needs it. The other arguments are those of the forward pass.
    Returns dq, dk, dv and softmax_d, float32 (batch, nheads, round128(seqlen_q)), or (0,) without softmax.
    """
    checks.same_kind(q, dout=dout, k=k, v=v, dq=dq, dk=dk, dv=dv)
    _check_shapes(q, k, v, alibi_slopes)
    checks.like(q, _Q_AXES, dout=dout, dq=dq)
    checks.like(k, _K_AXES, dk=dk, dv=dv)
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    options = checks.options(
        q, seqlen_k, softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p,
        alibi_slopes is not None, use_softmax, activation, sigmoid_bias, normalization,
    )
    if use_softmax:
        checks.same_kind(q, out=out)
        checks.on_cpu(softmax_lse=softmax_lse)
        checks.like(q, _Q_AXES, out=out)
        checks.shape("softmax_lse", softmax_lse, batch, nheads, seqlen_q, axes="batch, nheads, seqlen_q")
    sequences = Sequences.of_batch(
        options, range(batch), (seqlen_q, seqlen_k), (nheads, nheads_k), alibi_slopes, checks.seed(rng_state, dropout_p)
    )
    dq, dk, dv = (torch.empty_like(x) if grad is None else grad for x, grad in ((q, dq), (k, dk), (v, dv)))
    d_shape = (batch, nheads, round128(seqlen_q)) if use_softmax else (0,)
    softmax_d = torch.zeros(d_shape, dtype=torch.float32, device="cpu")
    if use_softmax:
        backward(sequences, dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_d[..., :seqlen_q])
    else:
        backward(sequences, dout, q, k, v, None, None, dq, dk, dv, None)
    return dq, dk, dv, softmax_d
