"""Run one forward and one backward of a call on Hopper, outside autograd.

`obstacle`, `forward` and `backward` take a checked call of flash_attn's functions or of flash_attn.cute's own
functions, whose additional arguments are in Extras.
"""

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from flash_attn.cute.nosoftmax import launch
from flash_attn.cute.nosoftmax.call import Call
from flash_attn.cute.nosoftmax.formulas import BY_HEAD
from flash_attn.cute.nosoftmax.marker import BY_NUMBER, BY_ROW, BY_SEQUENCE, HSTUKind, WindowKind
from flash_attn.cute.nosoftmax.score_mods import ScoreMods, of_activation
from flash_attn.cute.nosoftmax.serves import obstacle

__all__ = ["Extras", "backward", "forward", "obstacle"]

# A number of a mask that is larger means the same, and sums of two fit into int32.
_LARGEST = 2**30


class Extras(NamedTuple):
    """The arguments of flash_attn.cute's own functions beside a call. mods: the user's score_mod. longest:
    (max_seqlen_q, max_seqlen_k), None where not given. The rest is as in upstream."""

    longest: tuple[Optional[int], Optional[int]]
    mods: Optional[ScoreMods] = None
    seqused_q: Optional[torch.Tensor] = None
    pack_gqa: Optional[bool] = None
    mask_mod: Any = None
    aux_tensors: Optional[list] = None
    aux_scalars: Optional[tuple] = None
    block_sparse_tensors: Any = None
    block_sparse_tensors_bwd: Any = None

    @property
    def of_user(self) -> bool:
        """Whether it has user functions or block-sparse tensors, which no operator takes."""
        return self.mods is not None or self.mask_mod is not None or self.block_sparse_tensors is not None


def first_seen(seqlen_q: int, seqlen_k: int, left: Optional[int]) -> int:
    """Return the first key that any query sees with a window of `left` keys. Query i is aligned with key i +
    seqlen_k - seqlen_q.
    """
    return 0 if left is None else max(seqlen_k - seqlen_q - left, 0)


def first_seeing(seqlen_q: int, seqlen_k: int, right: Optional[int]) -> int:
    """Return the first query that sees any key with a window of `right` keys, 0 if causal."""
    return 0 if right is None else max(seqlen_q - seqlen_k - right, 0)


def _window(call: Call) -> tuple[Optional[int], Optional[int]]:
    o = call.options
    return None if o.window_left < 0 else o.window_left, None if o.window_right < 0 else o.window_right


def normalization(call: Call, of_user: bool) -> Optional[str]:
    """Return how the kernels normalize this call, as in marker.NoSoftmax. of_user: as in Extras."""
    o, factors = call.options, call.row_factors
    if factors is not None:
        # Packed factors that fit both readings are those of the rows.
        by_row = factors.dim() == 2 or (call.varlen and factors.shape[0] == call.q.shape[0])
        return BY_ROW if by_row else BY_SEQUENCE
    if o.factor != 1.0:
        # Functions of the user that have no aux_scalars take none.
        return BY_SEQUENCE if of_user else BY_NUMBER
    # If every query sees every key, "1/visible" equals "1/n".
    everything = _window(call) == (None, None) and o.mask is None and o.normalization == "1/visible"
    return "1/n" if everything else o.normalization


def _mask(call: Call) -> tuple[dict, tuple, tuple]:
    """Return the mask as in marker.NoSoftmax, its numbers, and its tensors (launch.Call). Causal and window
    are a mask if they are aligned by a diagonal."""
    o = call.options
    aligned = {} if call.counted_diagonal is None else {"has_diagonal": True}
    if o.mask is None:
        if not aligned:
            return {}, (), ()
        window = _window(call)
        kind = WindowKind(*(side is not None for side in window))
        return {**aligned, "window": kind}, tuple(min(x, _LARGEST) for x in window if x is not None), ()
    if o.mask == "intervals":
        parts = {**aligned, "intervals": call.interval_starts.shape[-1]}
        return parts, (), (call.interval_starts, call.interval_ends)
    tensors = call.target_counts, call.context_counts
    targets, contexts = (
        BY_SEQUENCE if x is not None else BY_NUMBER if count else None
        for x, count in zip(tensors, (o.num_targets, o.num_contexts))
    )
    window = o.max_attn_len > 0
    kind = HSTUKind(
        targets, contexts, window, window and o.min_full_attn_seq_len > 0,
        targets is not None and o.target_group_size > 1,
    )  # fmt: skip
    numbers = (
        o.num_targets, o.num_contexts, o.max_attn_len, o.min_full_attn_seq_len, o.target_group_size
    )  # fmt: skip
    numbers = tuple(min(x, _LARGEST) for x, part in zip(numbers, kind) if part in (True, BY_NUMBER))
    return {**aligned, "hstu": kind}, numbers, tuple(x for x in tensors if x is not None)


def _launched(call: Call, extras: Extras) -> launch.Call:
    o, kind = call.options, normalization(call, extras.of_user)
    mask, numbers, tensors = _mask(call)
    causal, window = (False, (None, None)) if "window" in mask else (o.causal, _window(call))
    bias = o.sigmoid_bias if call.sigmoid_biases is None else BY_HEAD
    has_decay = call.decay_slopes is not None
    mods = extras.mods or of_activation(o.activation, bias, o.softcap, kind, has_decay, wide=o.wide, **mask)
    factors = call.row_factors
    if kind == BY_SEQUENCE and factors is None:
        factors = torch.full((call.batch,), o.factor, dtype=torch.float32, device=call.q.device)
    cu_seqlens_k, seqused_k = call.cu_seqlens_k, call.seqused_k
    if call.block_table is not None and cu_seqlens_k is not None:
        # Pages are not contiguous: the kernels take the lengths of their sequences and no offsets.
        cu_seqlens_k, seqused_k = None, cu_seqlens_k.diff() if seqused_k is None else seqused_k
    return launch.Call(
        mods, o.softmax_scale, causal, window, call.cu_seqlens_q, cu_seqlens_k, extras.seqused_q, seqused_k,
        *extras.longest, extras.mask_mod, extras.aux_tensors, extras.aux_scalars,
        mask_numbers=numbers,
        mask_tensors=tensors,
        diagonal=call.counted_diagonal,
        factor=o.factor if kind == BY_NUMBER else None,
        sequence_factors=factors if kind == BY_SEQUENCE else None,
        row_factors=factors if kind == BY_ROW else None,
        sigmoid_biases=call.sigmoid_biases,
        decay_slopes=call.decay_slopes,
    )  # fmt: skip


def _extras(call: Call, extras: Optional[Extras]) -> Extras:
    if extras is not None:
        return extras
    return Extras((call.options.max_seqlen_q, call.options.max_seqlen_k) if call.varlen else (None, None))


def _first_key(call: Call, extras: Extras) -> int:
    """Return the first key to pass to the kernels. Keys before all windows may share a tile with visible
    keys, and a NaN in them would then reach results. They stay where n counts them, or where only the GPU
    knows the lengths or the diagonal."""
    o = call.options
    counted = o.sigmoid_bias is None or o.normalization in ("1/n", "1/sqrt(n)")
    return (
        0
        if counted or _indexed(call, extras)
        else first_seen(call.q.shape[1], call.k.shape[1], _window(call)[0])
    )


def _first_query(call: Call, extras: Extras) -> int:
    """Return the first query that sees a key. Earlier queries may share a tile with it, and a NaN in them or
    their dout would then reach dk and dv.
    """
    right = 0 if call.options.mask == "hstu" else _window(call)[1]
    return 0 if _indexed(call, extras) else first_seeing(call.q.shape[1], call.k.shape[1], right)


def _indexed(call: Call, extras: Extras) -> bool:
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k, call.block_table, extras.seqused_q)
    return (
        call.counted_diagonal is not None
        or extras.mods is not None
        or extras.block_sparse_tensors is not None
        or any(x is not None for x in lengths)
    )


def forward(call: Call, extras: Optional[Extras] = None) -> torch.Tensor:
    """Return the output, shaped as q with head_dim_v."""
    extras, q, k, v = _extras(call, extras), call.q, call.k, call.v
    launched = _launched(call, extras)
    if first := _first_key(call, extras):
        k, v = k[:, first:], v[:, first:]
    out = launch.forward(
        launched, q, k, v, pack_gqa=extras.pack_gqa, page_table=call.block_table,
        block_sparse_tensors=extras.block_sparse_tensors,
    )  # fmt: skip
    if query := _first_query(call, extras):
        out.narrow(1, 0, query).zero_()  # they hold 0 * NaN if another query of the tile sees a NaN in v
    return out


def backward(
    call: Call, dout: torch.Tensor, extras: Optional[Extras] = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv, shaped as q, k and v."""
    extras, q, k, v = _extras(call, extras), call.q, call.k, call.v
    launched = _launched(call, extras)
    key, query = _first_key(call, extras), _first_query(call, extras)
    if key:
        k, v = k[:, key:], v[:, key:]
    if query:
        q, dout = q[:, query:], dout[:, query:]
        if launched.row_factors is not None:
            launched = launched._replace(row_factors=launched.row_factors[:, query:])
    dq, dk, dv = launch.backward(
        launched,
        dout,
        q,
        k,
        v,
        deterministic=call.options.deterministic,
        block_sparse_tensors=extras.block_sparse_tensors_bwd,
    )
    if query:
        dq = F.pad(dq, (0, 0, 0, 0, query, 0))
    if key:
        dk, dv = (F.pad(x, (0, 0, 0, 0, key, 0)) for x in (dk, dv))
    return dq, dk, dv
