"""Attend over a cache whose keys lie on several ranks. For inference, on the CPU.

The plan is for the capacity of the whole cache: a rank holds the slots of the positions that the plan gives
it, and a new key goes to the rank that has its position. Queries and new keys are the same on all ranks. Each
rank attends to its own keys, with the positions and the n of the whole cache, and the outputs are added in
float32.
"""

import math

import torch
import torch.distributed as dist

from ..nosoftmax import checks, ops
from ..nosoftmax.backends.cpu.rotary import apply_rotary
from ..nosoftmax.call import Call, compute_dtype
from ..nosoftmax.choice import choose, wanted
from ..nosoftmax.score import NORMALIZATIONS, saturate_
from .plan import ContextParallel
from .problem import refuse_unknown


def prepared(call: Call, cp: ContextParallel, algorithm: str, backend: str) -> tuple:
    """Check the call, and return ((call with the capacity of the whole cache, None), facts)."""
    refuse_unknown(call, "leftpad_k")
    if cp.packed:
        raise ValueError(
            "context_parallel is a plan for packed tensors: for a cache give it seqlen, its capacity"
        )
    if not call.q.is_cpu:
        raise ValueError(f"q is on {call.q.device}: a cache over several ranks is for CPU tensors")
    if call.k.dim() == 4 and call.k.shape[1] != cp.tokens:
        raise ValueError(
            f"k_cache has shape {tuple(call.k.shape)}, but the plan gives rank {cp.rank} of {cp.world} "
            f"{cp.tokens} of {cp.plan.total} slots: make the plan with seqlen, the whole cache's capacity"
        )
    call = call._replace(options=call.options._replace(max_seqlen_k=cp.plan.total))
    checks.cache(call)
    choose(call, wanted(algorithm, backend))  # raises if the CPU is excluded
    checks.values(call)
    given = call.cache
    facts = {
        "layout": cp.plan.kind,
        "the capacity of the cache": cp.plan.total,
        "shape of q": tuple(call.q.shape),
        "dtype of q": call.q.dtype,
        "number of new keys": 0 if given.k is None else given.k.shape[1],
        "cache_seqlens": None if given.cache_seqlens is None else given.cache_seqlens.tolist(),
        **{name: getattr(call.options, name) for name in call.options._fields},
    }
    for name in ("alibi_slopes", "row_factors", "sigmoid_biases", "decay_slopes", "leftpad_k"):
        x = getattr(call, name)
        facts[name] = None if x is None else x.tolist()
    return (call, None), facts


def attend(call: Call, cp: ContextParallel) -> torch.Tensor:
    """Append new keys to this rank's slots in place, and return the output of the whole cache."""
    given = call.cache
    with torch.no_grad():
        out = _sums(call, cp)
        if cp.world > 1:
            dist.all_reduce(out, group=cp.group)
        out = saturate_(out, call.q.dtype).to(call.q.dtype)
    inputs = (call.q, given.k, given.v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return ops.WithoutBackward.apply(out, *inputs)
    return out


def _sums(call: Call, cp: ContextParallel) -> torch.Tensor:
    """Return what this rank's keys add to the output, in the dtype of sums."""
    q, given = call.q, call.cache
    batch, seqlen_q = q.shape[:2]
    seqlen_new = 0 if given.k is None else given.k.shape[1]
    filled = [cp.plan.total] * batch if given.cache_seqlens is None else given.cache_seqlens.tolist()
    rows = range(batch) if given.cache_batch_idx is None else given.cache_batch_idx.tolist()
    skipped = [0] * batch if call.leftpad_k is None else call.leftpad_k.tolist()
    out = q.new_zeros(*q.shape[:-1], call.v.shape[-1], dtype=compute_dtype(q.dtype))
    for b, row in enumerate(rows):
        q_b = _turned(call, q[b], torch.arange(seqlen_q) * int(given.steps) + filled[b])
        if seqlen_new:
            k_new = _turned(call, given.k[b], torch.arange(seqlen_new) + filled[b])
            _append(cp, (call.k[row], call.v[row]), (k_new, given.v[b]), filled[b])
        used = filled[b] + seqlen_new
        of_sequence = _of_sequence(call, b, q_b, used, skipped[b])
        for piece in cp.plan.pieces(cp.rank):
            start, stop = max(piece.start, skipped[b]), min(piece.stop, used)
            if start < stop:
                slots = slice(piece.rows.start + start - piece.start, piece.rows.start + stop - piece.start)
                diagonal = torch.tensor([used - seqlen_q - start], dtype=torch.int32)
                block = of_sequence._replace(
                    k=call.k[row, slots][None], v=call.v[row, slots][None], diagonal=diagonal,
                    options=of_sequence.options._replace(max_seqlen_k=stop - start),
                )  # fmt: skip
                out[b] += ops.run(block, "cpu").out[0]
    return out


def _turned(call: Call, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    given = call.cache
    if given.rotary_cos is None:
        return x
    return apply_rotary(
        x, given.rotary_cos, given.rotary_sin, positions, given.rotary_interleaved, saturate=True
    )


def _append(cp: ContextParallel, caches: tuple, new: tuple, filled: int) -> None:
    """Write those new keys and values whose positions this rank has."""
    for piece in cp.plan.pieces(cp.rank):
        start, stop = max(piece.start, filled), min(piece.stop, filled + new[0].shape[0])
        if start < stop:
            at = piece.rows.start + start - piece.start
            for cache, x in zip(caches, new):
                cache[at : at + stop - start] = x[start - filled : stop - filled]


def _of_sequence(call: Call, b: int, q: torch.Tensor, used: int, skipped: int) -> Call:
    """The call of one sequence, without its keys. used, skipped: where its keys end and begin."""
    o, n = call.options, max(used - skipped, 1)
    wide = compute_dtype(q.dtype)
    norm, factor, factors = NORMALIZATIONS[o.normalization], o.factor, call.row_factors
    if norm.by_row:
        at = torch.arange(q.shape[0]) + used - q.shape[0]
        start = torch.full_like(at, skipped)
        if o.window_left >= 0:
            start = torch.maximum(start, at - o.window_left)
        stop = torch.full_like(at, used)
        if o.window_right >= 0:
            stop = torch.minimum(stop, at + o.window_right + 1)
        factors = norm.factor(None, (stop - start).clamp(min=1).to(wide))[None]
    else:
        factor = factor * norm.factor(n, None)
        factors = None if factors is None else factors[b : b + 1]

    def own(x):
        return x if x is None or x.dim() == 1 else x[b : b + 1]

    options = o._replace(
        normalization=None, factor=factor, wide=True,
        sigmoid_bias=-math.log(n) if o.sigmoid_bias is None else o.sigmoid_bias,
    )  # fmt: skip
    return call._replace(
        q=q[None], leftpad_k=None, row_factors=factors, alibi_slopes=own(call.alibi_slopes),
        sigmoid_biases=own(call.sigmoid_biases), decay_slopes=own(call.decay_slopes), options=options,
        cache=None,
    )  # fmt: skip
