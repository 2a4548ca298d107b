"""Attend over a KV cache, after appending new keys and values if there are any. For inference only."""

from typing import Optional

import torch

from ...call import Call
from .forward_loop import forward as attend
from .paged import gather_pages, write_pages
from .rotary import apply_rotary
from .sequences import Sequences


def forward(
    call: Call, use_softmax: bool = False, softmax_lse: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Append to the caches in place, rotate q and the new keys by their positions, and attend. Returns the
    output, shaped as q.

    New keys have the positions from cache_seqlens on. So have the queries if cache.steps; else all of them
    have the position cache_seqlens. softmax_lse: (batch, nheads, seqlen_q), written with softmax.
    """
    q, given, table = call.q, call.cache, call.block_table
    batch, seqlen_q = q.shape[:2]
    seqlen_new = 0 if given.k is None else given.k.shape[1]
    filled = (
        [call.options.max_seqlen_k] * batch if given.cache_seqlens is None else given.cache_seqlens.tolist()
    )
    rows = range(batch) if given.cache_batch_idx is None else given.cache_batch_idx.tolist()
    skipped = [0] * batch if call.leftpad_k is None else call.leftpad_k.tolist()

    def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if given.rotary_cos is None:
            return x
        # Without softmax, finite keys stay finite in the cache.
        return apply_rotary(
            x,
            given.rotary_cos,
            given.rotary_sin,
            positions,
            given.rotary_interleaved,
            saturate=not use_softmax,
        )

    out = q.new_empty(*q.shape[:-1], call.v.shape[-1])
    for b in range(batch):
        used = filled[b] + seqlen_new
        q_b = turned(q[b], torch.arange(seqlen_q, device="cpu") * int(given.steps) + filled[b])
        if given.k is not None:
            k_new = turned(given.k[b], torch.arange(seqlen_new, device="cpu") + filled[b])
            for cache, new in ((call.k, k_new), (call.v, given.v[b])):
                if table is not None:
                    write_pages(cache, table[b], filled[b], new)
                else:
                    cache[rows[b], filled[b] : used] = new
        if table is not None:
            k_b, v_b = (gather_pages(cache, table[b], used) for cache in (call.k, call.v))
        else:
            k_b, v_b = (cache[rows[b], skipped[b] : used] for cache in (call.k, call.v))
        sequences = Sequences.of(call, range(b, b + 1), (seqlen_q, k_b.shape[0]), 0, use_softmax)
        lse_b = None if softmax_lse is None else softmax_lse[b : b + 1]
        attend(sequences, q_b[None], k_b[None], v_b[None], out[b : b + 1], lse_b)
    return out
