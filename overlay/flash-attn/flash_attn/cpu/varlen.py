"""Attention over sequences of unequal length, packed one after the other: forward and backward."""

from typing import Optional

import torch

from . import checks
from .backward import backward
from .dropout import new_rng_state, seed_of
from .entry import entry_point, round128
from .forward import forward
from .options import Sequences
from .paged import gather_pages
from .s_dmask import write_s_dmask

_Q_AXES = "total_q, nheads, head_dim"
_K_AXES = "total_k, nheads_k, head_dim"
_PAGED_AXES = "num_pages, page_size, nheads_k, head_dim"


def _check_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    alibi_slopes: Optional[torch.Tensor],
    paged: bool,
) -> None:
    k_axes = _PAGED_AXES if paged else _K_AXES
    checks.rank("q", q, _Q_AXES)
    checks.rank("k", k, k_axes)
    checks.shape("k", k, *k.shape[:-1], q.shape[-1], axes=k_axes)
    checks.shape("v", v, *k.shape, axes=k_axes)
    checks.heads(q.shape[1], k.shape[-2], q.shape[2])
    checks.rank("cu_seqlens_q", cu_seqlens_q, "batch + 1")
    if cu_seqlens_q.numel() == 0:
        raise ValueError("cu_seqlens_q is empty: it has batch + 1 entries, the first of them 0")
    batch = cu_seqlens_q.numel() - 1
    checks.int32("cu_seqlens_q", cu_seqlens_q, batch + 1, axes="batch + 1")
    checks.int32("cu_seqlens_k", cu_seqlens_k, batch + 1, axes="batch + 1")
    checks.alibi_slopes(alibi_slopes, batch, q.shape[1])


@entry_point
def varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional[torch.Tensor],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: Optional[torch.Tensor],
    leftpad_k: Optional[torch.Tensor],
    block_table: Optional[torch.Tensor],
    alibi_slopes: Optional[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
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
    """Attention forward over packed sequences. sigmoid_bias None is -log n; see flash_attn.score_function.

    q, out: (total_q, nheads, head_dim); k, v: (total_k, nheads_k, head_dim), or (num_pages, page_size, nheads_k,
    head_dim) with block_table, int32 (batch, pages). Sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of
    q, and so of k, or that number of keys in its pages; of these the first seqused_k[b], if given, less the first
    leftpad_k[b], if given. cu_seqlens: int32 (batch + 1,); seqused_k, leftpad_k: int32 (batch,).
    Rows of out that belong to no sequence are 0. zero_tensors changes nothing: every result is written.
    Returns out; softmax_lse, float32 (nheads, total_q), or (0,) without softmax; S_dmask (batch, nheads,
    round128(max_seqlen_q), round128(max_seqlen_k)) if return_softmax and dropout_p > 0, else (0,); rng_state.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    checks.same_kind(q, k=k, v=v, out=out)
    paged = block_table is not None
    _check_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, paged)
    checks.like(q, _Q_AXES, out=out)
    batch, (total_q, nheads, _), nheads_k = cu_seqlens_q.numel() - 1, q.shape, k.shape[-2]
    checks.int32("seqused_k", seqused_k, batch, axes="batch")
    checks.int32("leftpad_k", leftpad_k, batch, axes="batch")
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    checks.cu_seqlens("cu_seqlens_q", starts_q, total_q, max_seqlen_q)
    checks.cu_seqlens("cu_seqlens_k", starts_k, None if paged else k.shape[0])
    lengths = [stop - start for start, stop in zip(starts_k, starts_k[1:])]
    used = checks.seqused_k(seqused_k, lengths, paged)
    leftpad = checks.leftpad_k(leftpad_k, used, paged)
    checks.max_seqlen_k(max_seqlen_k, [stop - start for start, stop in zip(leftpad, used)])
    if paged:
        checks.rank("block_table", block_table, "batch, pages")
        checks.int32("block_table", block_table, batch, block_table.shape[1], axes="batch, pages")
        checks.pages(block_table, used, page_size=k.shape[1], num_pages=k.shape[0])
    options = checks.options(
        q, max_seqlen_k, softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p,
        alibi_slopes is not None, use_softmax, activation, sigmoid_bias, normalization,
    )
    rng_state = new_rng_state(dropout_p, gen)
    out = torch.empty_like(q) if out is None else out
    softmax_lse = torch.full((nheads, total_q) if use_softmax else (0,), torch.inf, dtype=torch.float32, device="cpu")
    s_dmask = q.new_zeros(0)
    if return_softmax and dropout_p > 0.0:
        s_dmask = q.new_zeros(batch, nheads, round128(max_seqlen_q), round128(max_seqlen_k))
    out[: starts_q[0]].zero_()
    out[starts_q[-1] :].zero_()
    for b in range(batch):
        rows = slice(starts_q[b], starts_q[b + 1])
        if paged:
            k_b, v_b = (gather_pages(x, block_table[b], used[b]) for x in (k, v))
        else:
            keys = slice(starts_k[b] + leftpad[b], starts_k[b] + used[b])
            k_b, v_b = k[keys], v[keys]
        sequences = Sequences.of_batch(
            options, range(b, b + 1), (rows.stop - rows.start, k_b.shape[0]), (nheads, nheads_k), alibi_slopes,
            seed_of(rng_state),
        )
        q_b, k_b, v_b, out_b = q[None, rows], k_b[None], v_b[None], out[None, rows]
        forward(sequences, q_b, k_b, v_b, out_b, softmax_lse[None, :, rows] if use_softmax else None)
        if s_dmask.numel() > 0:
            write_s_dmask(sequences, q_b, k_b, s_dmask[b : b + 1])
    return out, softmax_lse, s_dmask, rng_state


@entry_point
def varlen_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: Optional[torch.Tensor],
    dk: Optional[torch.Tensor],
    dv: Optional[torch.Tensor],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    alibi_slopes: Optional[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
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
    """Attention backward over packed sequences; gradients of rows that belong to no sequence are 0.

    Arguments as those of varlen_fwd and bwd. Returns dq, dk, dv and softmax_d, float32 (nheads, total_q + 128 * batch)
    of which the first total_q columns are used, or (0,) without softmax.
    """
    checks.same_kind(q, dout=dout, k=k, v=v, dq=dq, dk=dk, dv=dv)
    _check_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, paged=False)
    checks.like(q, _Q_AXES, dout=dout, dq=dq)
    checks.like(k, _K_AXES, dk=dk, dv=dv)
    batch, (total_q, nheads, _), nheads_k = cu_seqlens_q.numel() - 1, q.shape, k.shape[1]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    checks.cu_seqlens("cu_seqlens_q", starts_q, total_q, max_seqlen_q)
    checks.cu_seqlens("cu_seqlens_k", starts_k, k.shape[0], max_seqlen_k)
    options = checks.options(
        q, max_seqlen_k, softmax_scale, causal, window_size_left, window_size_right, softcap, dropout_p,
        alibi_slopes is not None, use_softmax, activation, sigmoid_bias, normalization,
    )
    if use_softmax:
        checks.same_kind(q, out=out)
        checks.on_cpu(softmax_lse=softmax_lse)
        checks.like(q, _Q_AXES, out=out)
        checks.shape("softmax_lse", softmax_lse, nheads, total_q, axes="nheads, total_q")
    seed = checks.seed(rng_state, dropout_p)
    dq, dk, dv = (torch.empty_like(x) if grad is None else grad for x, grad in ((q, dq), (k, dk), (v, dv)))
    softmax_d = torch.zeros((nheads, total_q + 128 * batch) if use_softmax else (0,), dtype=torch.float32, device="cpu")
    for grad, starts in ((dq, starts_q), (dk, starts_k), (dv, starts_k)):
        grad[: starts[0]].zero_()
        grad[starts[-1] :].zero_()
    for b in range(batch):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        sequences = Sequences.of_batch(
            options, range(b, b + 1), (rows.stop - rows.start, keys.stop - keys.start), (nheads, nheads_k),
            alibi_slopes, seed,
        )
        row_terms = (out[None, rows], softmax_lse[None, :, rows]) if use_softmax else (None, None)
        backward(
            sequences, dout[None, rows], q[None, rows], k[None, keys], v[None, keys], *row_terms,
            dq[None, rows], dk[None, keys], dv[None, keys], softmax_d[None, :, rows] if use_softmax else None,
        )
    return dq, dk, dv, softmax_d
