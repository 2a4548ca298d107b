"""Attention over a key/value cache, to which new keys and values may be appended first: inference only."""

from typing import Optional

import torch

from . import checks
from .entry import entry_point
from .forward import forward
from .options import Sequences
from .paged import gather_pages, write_pages
from .rotary import apply_rotary

_Q_AXES = "batch, seqlen_q, nheads, head_dim"
_NEW_AXES = "batch, seqlen_new, nheads_k, head_dim"
_CACHE_AXES = "batch_cache, seqlen_cache, nheads_k, head_dim"
_PAGED_AXES = "num_pages, page_size, nheads_k, head_dim"


@entry_point
def fwd_kvcache(
    q: torch.Tensor,
    kcache: torch.Tensor,
    vcache: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    seqlens_k: Optional[torch.Tensor],
    rotary_cos: Optional[torch.Tensor],
    rotary_sin: Optional[torch.Tensor],
    cache_batch_idx: Optional[torch.Tensor],
    leftpad_k: Optional[torch.Tensor],
    block_table: Optional[torch.Tensor],
    alibi_slopes: Optional[torch.Tensor],
    out: Optional[torch.Tensor],
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    use_softmax: bool = True,
    activation: str = "identity",
    sigmoid_bias: Optional[float] = 0.0,
    normalization: Optional[str] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append k, v to the cache in place, turn q and the new keys by their positions, and attend.

    q, out: (batch, seqlen_q, nheads, head_dim); kcache, vcache: (batch_cache, seqlen_cache, nheads_k, head_dim), or
    (num_pages, page_size, nheads_k, head_dim) with block_table, int32 (batch, pages); k, v: (batch, seqlen_new,
    nheads_k, head_dim). seqlens_k: int32 (batch,), the filled length of each cache (all of it if None);
    cache_batch_idx: int32 (batch,), the cache row of each sequence; leftpad_k: int32 (batch,), the rows at its start
    that do not count.
    rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2) in q's dtype. New keys take the positions after seqlens_k; so do
    the queries if the call is causal or has a window, else all of them take the position seqlens_k.
    num_splits changes nothing here. sigmoid_bias None is -log n; see flash_attn.score_function for the last four.
    Returns out and softmax_lse, float32 (batch, nheads, seqlen_q), or (0,) without softmax.
    Raises ValueError or TypeError for arguments that do not fit together, before the cache is touched.
    """
    checks.same_kind(
        q, kcache=kcache, vcache=vcache, k=k, v=v, out=out, rotary_cos=rotary_cos, rotary_sin=rotary_sin
    )
    paged = block_table is not None
    cache_axes = _PAGED_AXES if paged else _CACHE_AXES
    checks.rank("q", q, _Q_AXES)
    checks.rank("kcache", kcache, cache_axes)
    batch, seqlen_q, nheads, head_dim = q.shape
    nheads_k = kcache.shape[2]
    checks.shape("kcache", kcache, *kcache.shape[:3], head_dim, axes=cache_axes)
    checks.like(kcache, cache_axes, vcache=vcache)
    checks.like(q, _Q_AXES, out=out)
    checks.heads(nheads, nheads_k, head_dim)
    checks.alibi_slopes(alibi_slopes, batch, nheads)
    checks.int32("seqlens_k", seqlens_k, batch, axes="batch")
    checks.int32("cache_batch_idx", cache_batch_idx, batch, axes="batch")
    checks.int32("leftpad_k", leftpad_k, batch, axes="batch")
    if paged:
        checks.rank("block_table", block_table, "batch, pages")
        checks.int32("block_table", block_table, batch, block_table.shape[1], axes="batch, pages")
    seqlen_new = _check_new_keys(k, v, seqlens_k, batch, nheads_k, head_dim)
    capacity = block_table.shape[1] * kcache.shape[1] if paged else kcache.shape[1]
    filled = [capacity] * batch if seqlens_k is None else seqlens_k.tolist()
    used = [length + seqlen_new for length in filled]
    checks.cache_lengths(filled, seqlen_new, capacity)
    leftpad = checks.leftpad_k(leftpad_k, filled, paged)
    entries = checks.cache_entries(cache_batch_idx, batch, kcache.shape[0], paged, appending=seqlen_new > 0)
    if paged:
        checks.pages(block_table, used, page_size=kcache.shape[1], num_pages=kcache.shape[0])
        checks.pages_written_once(block_table, filled, seqlen_new, page_size=kcache.shape[1])
    options = checks.options(
        q, capacity, softmax_scale, causal, window_size_left, window_size_right, softcap, 0.0,
        alibi_slopes is not None, use_softmax, activation, sigmoid_bias, normalization,
    )
    steps = options.window.is_limited
    checks.rotary(rotary_cos, rotary_sin, head_dim, k is not None, capacity, filled, seqlen_q if steps else 1)

    out = torch.empty_like(q) if out is None else out
    softmax_lse = torch.empty((batch, nheads, seqlen_q) if use_softmax else (0,), dtype=torch.float32, device="cpu")
    for b in range(batch):
        q_b = q[b]
        if rotary_cos is not None:
            position = torch.arange(seqlen_q, device="cpu") * int(steps) + filled[b]
            q_b = apply_rotary(q_b, rotary_cos, rotary_sin, position, rotary_interleaved)
        if k is not None:
            k_new = k[b]
            if rotary_cos is not None:
                position = torch.arange(seqlen_new, device="cpu") + filled[b]
                k_new = apply_rotary(k_new, rotary_cos, rotary_sin, position, rotary_interleaved)
            for cache, new in ((kcache, k_new), (vcache, v[b])):
                if paged:
                    write_pages(cache, block_table[b], filled[b], new)
                else:
                    cache[entries[b], filled[b] : used[b]] = new
        if paged:
            k_b, v_b = (gather_pages(cache, block_table[b], used[b]) for cache in (kcache, vcache))
        else:
            k_b, v_b = (cache[entries[b], leftpad[b] : used[b]] for cache in (kcache, vcache))
        sequences = Sequences.of_batch(
            options, range(b, b + 1), (seqlen_q, k_b.shape[0]), (nheads, nheads_k), alibi_slopes
        )
        lse_b = softmax_lse[b : b + 1] if use_softmax else None
        forward(sequences, q_b[None], k_b[None], v_b[None], out[b : b + 1], lse_b)
    return out, softmax_lse


def _check_new_keys(
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    seqlens_k: Optional[torch.Tensor],
    batch: int,
    nheads_k: int,
    head_dim: int,
) -> int:
    """The number of keys to append to each sequence."""
    if (k is None) != (v is None):
        raise ValueError("only one of k and v is given: to append to the cache pass both, else neither")
    if k is None:
        return 0
    if seqlens_k is None:
        raise ValueError("k and v are given without cache_seqlens: pass the lengths at which they are appended")
    checks.rank("k", k, _NEW_AXES)
    checks.shape("k", k, batch, k.shape[1], nheads_k, head_dim, axes=_NEW_AXES)
    checks.like(k, _NEW_AXES, v=v)
    return k.shape[1]
