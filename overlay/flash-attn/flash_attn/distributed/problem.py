"""Describe a call as the whole sequences see it, and its blocks: some queries against some keys.

A rank has its own queries, keys and values. What the options count, n, the visible keys and the distance
between a query and a key, is that of the whole sequences.
"""

import math
from copy import copy
from typing import NamedTuple, Optional

import torch

from ..nosoftmax import ops
from ..nosoftmax.call import TENSORS, Call, compute_dtype
from ..nosoftmax.choice import choose, wanted
from ..nosoftmax.score import NORMALIZATIONS
from .layout import Part
from .plan import ContextParallel

# What the methods know of a call. Another tensor or option is refused, rather than ignored.
_TENSORS = frozenset((
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "row_factors", "sigmoid_biases",
    "decay_slopes", "target_counts", "context_counts", "interval_starts", "interval_ends",
))  # fmt: skip
_OPTIONS = frozenset((
    "max_seqlen_q", "max_seqlen_k", "softmax_scale", "window_left", "window_right", "softcap",
    "deterministic", "activation", "sigmoid_bias", "normalization", "factor", "wide", "mask", "num_targets",
    "num_contexts", "max_attn_len", "min_full_attn_seq_len", "target_group_size",
))  # fmt: skip
_OFF = {"dropout_p": 0.0, "return_attn_probs": False}


class Keys(NamedTuple):
    """Keys and values that lie in order, and the range of each sequence that they are."""

    k: torch.Tensor
    v: torch.Tensor
    starts: tuple
    lengths: tuple


class Problem:
    """A checked call with this rank's q, k and v, and the plan.

    whole: the call with the lengths of the whole sequences and the options as they were given. call: the same
    with numbers and tensors in the places of the names that count keys, which holds for any part of the call;
    under a mask for any rows against all keys. dim: the axis of the tokens. positional: whether a block must
    know where its queries lie.
    """

    def __init__(self, whole: Call, cp: ContextParallel, algorithm: str, backend: str) -> None:
        self.cp, self.dim = cp, 0 if whole.varlen else 1
        self.among = wanted(algorithm, backend)
        self.algorithm, self.backend = algorithm, backend
        self.whole, self.call = whole, _counted(whole, cp)
        self.positional = (
            whole.alibi_slopes is not None or whole.decay_slopes is not None or whole.options.mask == "hstu"
        )

    def replaced(self, **tensors: Optional[torch.Tensor]) -> "Problem":
        """The same problem with other tensors, or None, as fields of the call. So autograd alone keeps q,
        k and v, and a call that looks like an earlier one has tensors of its own.
        """
        other = copy(self)
        other.whole, other.call = (call._replace(**tensors) for call in (self.whole, self.call))
        return other

    def of_heads(self, heads: slice) -> "Problem":
        """The problem of some of the key heads, with the query heads that have these. q, k, v are views."""
        other = copy(self)
        other.whole, other.call = (_of_heads(call, heads) for call in (self.whole, self.call))
        return other

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return compute_dtype(self.call.q.dtype)

    @property
    def parts(self) -> tuple:
        return self.cp.plan.parts[self.cp.rank]

    @property
    def by_row(self) -> dict:
        """The tensors beside q, by field, that have an entry for each of this rank's queries."""
        factors = self.call.row_factors
        has_rows = factors is not None and (self.dim == 0 or factors.dim() == 2)
        given = {"row_factors": factors} if has_rows else {}
        if self.call.options.mask == "intervals":
            given |= {name: getattr(self.call, name) for name in ("interval_starts", "interval_ends")}
        return given

    def cut(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Some of the tokens of x, as a view."""
        return x[rows] if self.dim == 0 else x[:, rows]

    def shapes_of_keys(self, tokens: int) -> list:
        """The shapes of k and v with so many tokens."""
        return [(*x.shape[: self.dim], tokens, *x.shape[self.dim + 1 :]) for x in self.call.tensors[1:3]]

    def sees(self, part: Part, starts: tuple, lengths: tuple) -> bool:
        """Whether a query of the part may see one of the keys."""
        left, right = self.call.options.window_left, self.call.options.window_right
        for first_q, count_q, first_k, count_k in zip(part.starts, part.lengths, starts, lengths):
            if not count_q or not count_k:
                continue
            behind = 0 <= right and first_k > first_q + count_q - 1 + right
            before = 0 <= left and first_k + count_k - 1 < first_q - left
            if not (behind or before):
                return True
        return False

    def window(self, part: Part, keys: Keys) -> tuple[int, int]:
        """The window of a block, whose sides are open if they hide no key: such a block has the fastest
        kernels, and needs no diagonal.
        """
        left, right = self.call.options.window_left, self.call.options.window_right
        hides = [False, False]
        for first_q, count_q, first_k, count_k in zip(part.starts, part.lengths, keys.starts, keys.lengths):
            if count_q and count_k:
                hides[0] |= 0 <= left and first_k < first_q + count_q - 1 - left
                hides[1] |= 0 <= right and first_k + count_k - 1 > first_q + right
        return left if hides[0] else -1, right if hides[1] else -1

    def block(self, part: Part, keys: Keys, q: torch.Tensor, wide: bool) -> Call:
        """The call of the part's queries against the keys. q: all of this rank's queries."""
        call, cp = self.call, self.cp
        of_rows = {name: self.cut(x, part.rows).contiguous() for name, x in self.by_row.items()}
        cu_q = cu_k = diagonal = None
        if self.dim == 0:
            cu_q, cu_k = (cp.on(q.device, "cumulative", x) for x in (part.lengths, keys.lengths))
        offsets = tuple(x - y for x, y in zip(part.starts, keys.starts))
        ends = tuple(y - x for x, y in zip(part.lengths, keys.lengths))
        left, right = self.window(part, keys)
        if (self.positional or left >= 0 or right >= 0) and offsets != ends:
            if self.dim == 1:
                offsets = offsets * q.shape[0]
            diagonal = cp.on(q.device, "numbers", offsets)
        options = call.options._replace(
            max_seqlen_q=max(part.lengths, default=0), max_seqlen_k=max(keys.lengths, default=0), wide=wide,
            window_left=left, window_right=right,
        )  # fmt: skip
        return call._replace(
            q=self.cut(q, part.rows), k=keys.k, v=keys.v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            diagonal=diagonal, options=options, **of_rows,
        )  # fmt: skip

    def forward(self, block: Call) -> torch.Tensor:
        return ops.run(block, choose(block, self.among).backend).out

    def backward(self, block: Call, dout: torch.Tensor) -> tuple:
        return ops.run_backward(block, choose(block, self.among).backend, dout, None)


def refuse_unknown(call: Call, *known: str) -> None:
    """Raise ValueError for an option that no method knows. known: further tensors that the caller knows."""
    option = unknown(call, *known)
    if option is not None:
        raise ValueError(f"{option} is not there with context_parallel: leave it out")


def unknown(call: Call, *known: str) -> Optional[str]:
    """Name an option that is set and that this package does not know; None if there is none."""
    o = call.options
    for name, off in _OFF.items():
        if getattr(o, name) != off:
            return f"{name}={getattr(o, name)}"
    for name in call._fields[:TENSORS]:
        if name not in _TENSORS and name not in known and getattr(call, name) is not None:
            return name
    for name in o._fields:
        if name not in _OPTIONS and name not in _OFF and getattr(o, name) != o._field_defaults.get(name):
            return f"{name}={getattr(o, name)!r}"
    return None


def _of_heads(call: Call, heads: slice) -> Call:
    group = call.q.shape[-2] // call.k.shape[-2]
    of_q = slice(heads.start * group, heads.stop * group)

    def share(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        return x if x is None else x[..., of_q].contiguous()

    return call._replace(
        q=call.q[..., of_q, :], k=call.k[..., heads, :], v=call.v[..., heads, :],
        alibi_slopes=share(call.alibi_slopes), sigmoid_biases=share(call.sigmoid_biases),
        decay_slopes=share(call.decay_slopes),
    )  # fmt: skip


def _counted(call: Call, cp: ContextParallel) -> Call:
    """Replace the names that count keys by numbers for dense calls, and by tensors where sequences or rows
    differ. Tensors have the dtype of sums, so that float64 calls lose nothing."""
    o, q = call.options, call.q
    wide = compute_dtype(q.dtype)
    factors, biases, factor, bias = call.row_factors, call.sigmoid_biases, o.factor, o.sigmoid_bias
    norm = NORMALIZATIONS[o.normalization]
    if norm.by_row and o.mask is not None:
        return call  # blocks under a mask have all keys of their sequences, and count those that it leaves
    if norm.by_row:
        counts = _visible(call, cp)
        rows = norm.factor(None, counts.clamp(min=1).to(wide))
        factors = rows if call.varlen else rows.expand(q.shape[0], -1)
    elif call.varlen and o.normalization is not None:
        factors = norm.factor(_lengths(cp, q.device, wide), None)[cp.on(q.device, "sequences")]
    elif o.normalization is not None:
        factor = factor * norm.factor(max(cp.plan.total, 1), None)
    elif call.varlen and factors is not None and not _by_row(call):
        factors = factors[cp.on(q.device, "sequences")]
    if bias is None and biases is None:
        if call.varlen:
            biases = -torch.log(_lengths(cp, q.device, wide))[:, None].expand(-1, q.shape[-2])
        bias = 0.0 if call.varlen else -math.log(max(cp.plan.total, 1))
    options = o._replace(normalization=None, factor=factor, sigmoid_bias=bias)
    return call._replace(row_factors=factors, sigmoid_biases=biases, options=options)


def _by_row(call: Call) -> bool:
    return call.row_factors.shape[0] == call.q.shape[0]


def ambiguous_factors(call: Call) -> bool:
    """Whether packed factors may be of sequences or of this rank's rows."""
    return call.varlen and call.row_factors is not None and call.q.shape[0] == call.batch


def _lengths(cp: ContextParallel, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return cp.on(device, "numbers", cp.plan.lengths).to(dtype).clamp(min=1)


def _visible(call: Call, cp: ContextParallel) -> torch.Tensor:
    """The number of keys that each of this rank's queries sees, int64 (tokens,)."""
    o, device = call.options, call.q.device
    at = cp.on(device, "positions")
    if call.varlen:
        stop = cp.on(device, "numbers", cp.plan.lengths).long()[cp.on(device, "sequences")]
    else:
        stop = torch.full_like(at, cp.plan.total)
    start = torch.zeros_like(at) if o.window_left < 0 else (at - o.window_left).clamp(min=0)
    if o.window_right >= 0:
        stop = torch.minimum(stop, at + o.window_right + 1)
    return stop - start
