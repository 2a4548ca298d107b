"""Run softmax attention on the CPU: the extension's five functions, with its positional arguments and
results.

As in the extension (csrc/flash_attn/flash_api.cpp), softmax_lse is float32, and +inf for a query that sees no
key. Backward is always deterministic.
"""

import functools
from collections.abc import Callable
from typing import Optional

import torch

from ... import checks
from ...call import Cache, Call, Options
from . import backward_loop, forward_loop, kvcache, s_dmask, torch_flash
from .dropout import new_rng_state, seed_of
from .sequences import Part, parts


def _entry_point(function: Callable) -> Callable:
    """Record no graph, and keep autocast from lowering the precision of the products within."""

    @functools.wraps(function)
    def wrapped(*args):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*args)

    return wrapped


def _options(
    q, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, left, right, softcap,
    return_softmax=False
) -> Options:  # fmt: skip
    """Apply the extension's window rules: a limit of max_seqlen_k or more is none, and a limit on one side
    limits the other side to max_seqlen_k. The latter matters only where seqlen_q > seqlen_k."""
    o = checks.options(
        q.shape[-1] if q.dim() else 1, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, (left,
        right), softcap, False, return_softmax, "identity", 0.0, None, use_softmax=True,
    )  # fmt: skip
    left = o.window_left if o.window_left < max_seqlen_k else -1
    right = o.window_right if o.window_right < max_seqlen_k else -1
    return o._replace(window_left=left, window_right=max_seqlen_k if left >= 0 > right else right)


def _check(call: Call) -> None:
    checks.tensors(call)
    _one_head_dim(call)
    checks.values(call)


def _one_head_dim(call: Call) -> None:
    if call.v.shape[-1] != call.q.shape[-1]:
        raise ValueError(
            f"v has shape {tuple(call.v.shape)}, expected head_dim={call.q.shape[-1]} as its last axis with "
            "softmax"
        )


def _like(name: str, x: Optional[torch.Tensor], like: torch.Tensor) -> None:
    if x is not None:
        checks.one_dtype(like, **{name: x})
        checks.shape(name, x, *like.shape, axes=(checks.DENSE if like.dim() == 4 else checks.PACKED)[0])


def _attend(part: Part, q, k, v, out, lse) -> None:
    run = torch_flash.forward if torch_flash.fits(part.sequences) else forward_loop.forward
    run(part.sequences, part.of_queries(q), k, v, part.of_queries(out), part.of_rows(lse))


def _forward(
    call: Call, out: Optional[torch.Tensor], softmax_lse: torch.Tensor, gen: Optional[torch.Generator]
) -> tuple:
    _check(call)
    q, k, v, o = *call.tensors[:3], call.options
    _like("out", out, q)
    out = torch.empty_like(q) if out is None else out
    if call.varlen:
        starts = call.cu_seqlens_q[[0, -1]].tolist()
        out[: starts[0]].zero_()
        out[starts[1] :].zero_()
    rng_state = new_rng_state(o.dropout_p, gen)
    mask = s_dmask.empty(call) if o.return_attn_probs and o.dropout_p > 0.0 else q.new_zeros(0)
    for part in parts(call, seed_of(rng_state), use_softmax=True):
        keys = part.of_keys(k)
        _attend(part, q, keys, part.of_keys(v), out, softmax_lse)
        if mask.numel() > 0:
            s_dmask.write(part.sequences, part.of_queries(q), keys, mask[part.batch.start : part.batch.stop])
    return out, softmax_lse, mask, rng_state


@_entry_point
def fwd(
    q, k, v, out, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, return_softmax, gen
) -> tuple:  # fmt: skip
    """q, k, v: (batch, seqlen, nheads, head_dim). Returns out; softmax_lse (batch, nheads, seqlen_q); S_dmask
    if return_softmax and dropout_p > 0, else (0,); and rng_state, int64 (2,). A given out is written in
    place."""
    checks.rank("q", q, checks.DENSE[0])
    checks.rank("k", k, checks.DENSE[1])
    options = _options(
        q, q.shape[1], k.shape[1], dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, return_softmax
    )  # fmt: skip
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device="cpu")
    call = Call.of(options, q=q, k=k, v=v, alibi_slopes=alibi_slopes)
    return _forward(call, out, lse, gen)


@_entry_point
def varlen_fwd(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right,
    softcap, return_softmax, gen,
) -> tuple:  # fmt: skip
    """q: (total_q, nheads, head_dim); k, v: packed, or pages with block_table. Returns what fwd returns, but
    softmax_lse is (nheads, total_q). zero_tensors has no effect: every result is written."""
    checks.rank("q", q, checks.PACKED[0])
    options = _options(
        q, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, return_softmax
    )  # fmt: skip
    lse = torch.full((q.shape[1], q.shape[0]), torch.inf, dtype=torch.float32, device="cpu")
    call = Call.of(
        options, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        leftpad_k=leftpad_k, block_table=block_table, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return _forward(call, out, lse, gen)


def _backward(call: Call, dout, out, softmax_lse, dq, dk, dv, softmax_d, rng_state) -> tuple:
    _check(call)
    q, k, v = call.tensors[:3]
    checks.one_device(q=q, dout=dout, out=out, softmax_lse=softmax_lse, dq=dq, dk=dk, dv=dv)
    checks.rng_state(rng_state, call)
    for name, x, like in (("dout", dout, q), ("out", out, q), ("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        _like(name, x, like)
    lse_axes = "nheads, total_q" if call.varlen else "batch, nheads, seqlen_q"
    shape = (q.shape[1], q.shape[0]) if call.varlen else (q.shape[0], q.shape[2], q.shape[1])
    checks.shape("softmax_lse", softmax_lse, *shape, axes=lse_axes)
    dq, dk, dv = (torch.empty_like(x) if grad is None else grad for x, grad in ((q, dq), (k, dk), (v, dv)))
    if call.varlen:
        for grad, starts in ((dq, call.cu_seqlens_q), (dk, call.cu_seqlens_k), (dv, call.cu_seqlens_k)):
            grad[: int(starts[0])].zero_()
            grad[int(starts[-1]) :].zero_()
    seed = 0 if call.options.dropout_p == 0.0 else seed_of(rng_state)
    for part in parts(call, seed, use_softmax=True):
        run = torch_flash.backward if torch_flash.fits(part.sequences) else backward_loop.backward
        run(
            part.sequences, part.of_queries(dout), part.of_queries(q), part.of_keys(k), part.of_keys(v),
            part.of_queries(out),
            part.of_rows(softmax_lse), part.of_queries(dq), part.of_keys(dk), part.of_keys(dv),
            softmax_d[..., : q.shape[1]] if part.rows is None else part.of_rows(softmax_d),
        )  # fmt: skip
    return dq, dk, dv, softmax_d


@_entry_point
def bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, deterministic, gen, rng_state,
) -> tuple:  # fmt: skip
    """dout, out and dq are shaped as q, dk and dv as k. dq, dk and dv may be strided views, and are written
    in place if given.
    Returns dq, dk, dv and softmax_d, float32 (batch, nheads, seqlen_q rounded up to 128)."""
    checks.rank("q", q, checks.DENSE[0])
    checks.rank("k", k, checks.DENSE[1])
    options = _options(
        q, q.shape[1], k.shape[1], dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap
    )  # fmt: skip
    softmax_d = torch.zeros(
        q.shape[0], q.shape[2], -(-q.shape[1] // 128) * 128, dtype=torch.float32, device="cpu"
    )
    call = Call.of(options, q=q, k=k, v=v, alibi_slopes=alibi_slopes)
    return _backward(call, dout, out, softmax_lse, dq, dk, dv, softmax_d, rng_state)


@_entry_point
def varlen_bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right,
    softcap, deterministic, gen, rng_state,
) -> tuple:  # fmt: skip
    """Does what bwd does over packed sequences. softmax_d is float32 (nheads, total_q + 128 * batch), of
    which the first total_q columns are used."""
    checks.rank("q", q, checks.PACKED[0])
    options = _options(
        q, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap
    )  # fmt: skip
    call = Call.of(
        options, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    softmax_d = torch.zeros(q.shape[1], q.shape[0] + 128 * call.batch, dtype=torch.float32, device="cpu")
    return _backward(call, dout, out, softmax_lse, dq, dk, dv, softmax_d, rng_state)


@_entry_point
def fwd_kvcache(
    q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k, block_table,
    alibi_slopes, out, softmax_scale, causal, window_size_left, window_size_right, softcap,
    rotary_interleaved, num_splits,
) -> tuple:  # fmt: skip
    """Append k, v to the caches in place, rotate q and the new keys by their positions, and attend.
    num_splits has no effect.
    Returns out and softmax_lse (batch, nheads, seqlen_q)."""
    checks.rank("q", q, checks.DENSE[0])
    checks.rank("k_cache", kcache, (checks.CACHED if block_table is None else checks.PAGED)[1])
    capacity = kcache.shape[1] * (
        1 if block_table is None or block_table.dim() != 2 else block_table.shape[1]
    )
    options = _options(
        q, q.shape[1], capacity, 0.0, softmax_scale, causal, window_size_left, window_size_right, softcap
    )
    steps = options.window_left >= 0 or options.window_right >= 0
    cache = Cache(
        k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, rotary_interleaved, num_splits, steps
    )
    call = Call.of(
        options, cache, q=q, k=kcache, v=vcache, leftpad_k=leftpad_k, block_table=block_table,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    checks.cache(call)
    _one_head_dim(call)
    checks.values(call)
    _like("out", out, q)
    softmax_lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device="cpu")
    result = kvcache.forward(call, use_softmax=True, softmax_lse=softmax_lse)
    return (result if out is None else out.copy_(result)), softmax_lse
