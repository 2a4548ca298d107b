"""Describe a call without softmax: tensors and options under the same names for every public function.

Both wheels have a copy of this module, so it imports only torch and its sibling modules, and no code may test
whether an object is an instance of Call.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, get_type_hints

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which calls with tensors of `dtype` are computed, and results are added up: float32 for 16
    bit, otherwise their own.
    """
    return torch.promote_types(dtype, torch.float32)


class Options(NamedTuple):
    """The checked options of a call, with all defaults filled in. Hashable.

    max_seqlen_q, max_seqlen_k: the longest lengths of a packed call; seqlen_q and seqlen_k of a dense call;
    with a cache, max_seqlen_k is its capacity. window_left, window_right: how many keys a query sees on each
    side of its aligned key; -1 is no limit, and causal is exactly window_right = 0. sigmoid_bias: None is
    -log n. factor: multiplies each row of the output, beside normalization and Call.row_factors.
    return_attn_probs: whether to return S_dmask. wide: whether the output and the gradients stay in the dtype
    of the computation, float32 or for float64 tensors float64, and do not saturate. mask: "hstu" or
    "intervals", the class of flash_attn.masks that was given; the numbers after it are the fields of HSTU.
    The other options are as in the public functions.
    """

    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    deterministic: bool
    return_attn_probs: bool
    activation: str
    sigmoid_bias: Optional[float]
    normalization: Optional[str]
    factor: float
    wide: bool = False
    mask: Optional[str] = None
    num_targets: int = 0
    num_contexts: int = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0
    target_group_size: int = 1

    @property
    def causal(self) -> bool:
        return self.window_right == 0


class Cache(NamedTuple):
    """The arguments that only flash_attn_with_kvcache has. Its Call holds the caches as k and v, and their
    capacity as max_seqlen_k.

    k, v: (batch, seqlen_new, nheads_k, head_dim), the keys and values to append, or None. cache_seqlens:
    int32 (batch,), the filled lengths; None is the whole capacity. cache_batch_idx: int32 (batch,).
    rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2). steps: True if the rotary positions of the queries go
    up from cache_seqlens (causal, or with a window as the caller gave it), False if all queries have the
    position cache_seqlens.
    """

    k: Optional[torch.Tensor]
    v: Optional[torch.Tensor]
    cache_seqlens: Optional[torch.Tensor]
    rotary_cos: Optional[torch.Tensor]
    rotary_sin: Optional[torch.Tensor]
    cache_batch_idx: Optional[torch.Tensor]
    rotary_interleaved: bool
    num_splits: int
    steps: bool


class Call(NamedTuple):
    """A checked, immutable call.

    q: (batch, seqlen_q, nheads, head_dim); k: (batch, seqlen_k, nheads_k, head_dim); v: (batch, seqlen_k,
    nheads_k, head_dim_v). Packed, with cu_seqlens_q and cu_seqlens_k int32 (batch + 1,): (total_q, nheads,
    head_dim), (total_k, nheads_k, head_dim) and (total_k, nheads_k, head_dim_v). Paged, with block_table
    int32 (batch, pages): k and v are (num_pages, page_size, nheads_k, …). seqused_k, leftpad_k: int32
    (batch,) or None, where the keys that count in a sequence end and begin. alibi_slopes, sigmoid_biases,
    decay_slopes: float32 (nheads,) or (batch, nheads). row_factors: float32 (batch,), or a factor for each
    query: (batch, seqlen_q), packed (total_q,). diagonal: int32 (batch,), the key that query 0 of a sequence
    is aligned with, counted from key 0; None is seqlen_k - seqlen_q. target_counts, context_counts: int32
    (batch,), in place of num_targets and num_contexts of the options. interval_starts, interval_ends: int32
    (batch, seqlen_q, k), packed (total_q, k). q, k and v may be views of a packed qkv or kv argument, so that
    gradients reach it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: Optional[torch.Tensor]
    cu_seqlens_k: Optional[torch.Tensor]
    seqused_k: Optional[torch.Tensor]
    leftpad_k: Optional[torch.Tensor]
    block_table: Optional[torch.Tensor]
    alibi_slopes: Optional[torch.Tensor]
    row_factors: Optional[torch.Tensor]
    sigmoid_biases: Optional[torch.Tensor]
    decay_slopes: Optional[torch.Tensor]
    diagonal: Optional[torch.Tensor]
    target_counts: Optional[torch.Tensor]
    context_counts: Optional[torch.Tensor]
    interval_starts: Optional[torch.Tensor]
    interval_ends: Optional[torch.Tensor]
    options: Options
    cache: Optional[Cache] = None

    @classmethod
    def of(cls, options: Options, cache: Optional[Cache] = None, **tensors: Any) -> "Call":
        """Make a call of the tensors that are given; the others are absent."""
        absent = dict.fromkeys(cls._fields[:TENSORS])
        return cls(**{**absent, **tensors}, options=options, cache=cache)

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the output and of the gradients: q's, or if wide that of the computation."""
        return compute_dtype(self.q.dtype) if self.options.wide else self.q.dtype

    @property
    def counted_diagonal(self) -> Optional[torch.Tensor]:
        """diagonal, or None if no position counts, so that kernels without one may run the call."""
        if self.diagonal is None:
            return None
        o = self.options
        limited = o.window_left >= 0 or o.window_right >= 0 or o.mask == "hstu"
        slopes = self.alibi_slopes is not None or self.decay_slopes is not None
        return self.diagonal if limited or slopes else None

    @property
    def tensors(self) -> tuple:
        """The tensor fields in order, None where a tensor is absent."""
        return self[:TENSORS]

    def apart(self) -> tuple[list, "Frame"]:
        """Return the tensors that are there, and the rest of a call that has no cache."""
        tensors = self[:TENSORS]
        given = [x for x in tensors if x is not None]
        if len(given) == len(_MAIN):
            return given, Frame(_MAIN, self.options)
        return given, Frame(tuple(i for i, x in enumerate(tensors) if x is not None), self.options)


TENSORS = Call._fields.index("options")
_MAIN = (0, 1, 2)  # q, k and v, which every call has
_NOTHING_ELSE = (None,) * (TENSORS - len(_MAIN))


class Frame(NamedTuple):
    """A call without its tensors and without a cache. places: the indices of the fields that hold a
    tensor.
    """

    places: tuple
    options: Options

    def call(self, tensors: Sequence[torch.Tensor]) -> Call:
        """Return the call with these tensors, in the order of the fields."""
        if self.places == _MAIN:
            # Call(...) would take the host three times as long.
            return tuple.__new__(Call, (*tensors, *_NOTHING_ELSE, self.options, None))
        there = dict(zip(self.places, tensors))
        return Call(*(there.get(i) for i in range(TENSORS)), self.options)


# The public arguments that become tensors of a call, by field, where the names differ.
ARGUMENTS = {
    "row_factors": "normalization", "sigmoid_biases": "sigmoid_bias", "target_counts": "num_targets",
    "context_counts": "num_contexts", "interval_starts": "starts", "interval_ends": "ends",
}  # fmt: skip
_IN_A_SCHEMA = {
    torch.Tensor: "Tensor", Optional[torch.Tensor]: "Tensor?", int: "SymInt", float: "float",
    Optional[float]: "float?", bool: "bool", str: "str", Optional[str]: "str?",
}  # fmt: skip


def declared(fields: type, names: tuple = ()) -> str:
    """Return the fields of a NamedTuple, those in `names` or all, as arguments of an operator's schema."""
    hints = get_type_hints(fields)
    return ", ".join(f"{_IN_A_SCHEMA[hints[name]]} {name}" for name in names or fields._fields)


def needs_grad(call: Any) -> bool:
    """Whether autograd may ask for gradients of this call."""
    return torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad or call.v.requires_grad)


def forward_work(call: Any) -> float:
    """Estimate the floating-point operations of a forward pass: two matrix products over the visible scores.

    Takes the mean length for all packed sequences, and the longest length for paged keys, because reading the
    lengths would synchronize the GPU.
    """
    q, k, options = call.q, call.k, call.options
    seqlen_q, seqlen_k, queries = (
        q.shape[-3],
        k.shape[-3],
        q.shape[0] if call.varlen else q.shape[0] * q.shape[1],
    )
    if call.varlen:
        sequences = max(call.batch, 1)
        seqlen_q /= sequences
        seqlen_k = seqlen_k / sequences if call.block_table is None else options.max_seqlen_k
    left, right = options.window_left, options.window_right
    keys = seqlen_k - min(seqlen_q, seqlen_k) / 2 if right == 0 else seqlen_k  # per query, on average
    if left >= 0 and right >= 0:
        keys = min(keys, left + 1 + right)
    return 2.0 * queries * q.shape[-2] * keys * (q.shape[-1] + call.v.shape[-1])
