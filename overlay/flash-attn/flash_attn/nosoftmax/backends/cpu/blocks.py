"""Cut the score matrix into blocks, and compute the steps that the forward and the backward pass share.

Tensors of the interface are (batch, seqlen, nheads, head_dim). Tensors of the loops have the heads first.
"""

from dataclasses import dataclass, replace
from typing import Iterator, Optional

import torch

from ...score import saturate_
from .sequences import Sequences
from .visibility import Visibility

# A block of one head takes 1 MiB in float32, so that the few arrays of that size stay near the caches. Both
# sides are long enough for matrix products at full speed.
_ROWS = 256
_KEYS = 1024


@dataclass(frozen=True)
class Block:
    """Key heads (numbered through the batch), queries, and the range from the first to the last key that any
    of the queries sees.
    """

    heads: range
    rows: range
    keys: range

    def by_keys(self, visibility: Visibility) -> Iterator["Block"]:
        """Cut the keys that the queries see into parts, each with the same heads and queries."""
        for seen in visibility.ranges(self.rows):
            for first in range(seen.start, seen.stop, _KEYS):
                yield replace(self, keys=range(first, min(first + _KEYS, seen.stop)))

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """Picks this block's heads and queries from a tensor (batch * nheads_k, group, seqlen_q, …)."""
        return slice(self.heads.start, self.heads.stop), slice(None), slice(self.rows.start, self.rows.stop)

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """This block of x (batch * nheads_k, group, seqlen_q, head_dim), with the group folded into
        the rows.
        """
        return x[self.index].reshape(len(self.heads), -1, x.shape[-1])

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """This block of x (batch * nheads_k, seqlen_k, head_dim)."""
        return x[self.heads.start : self.heads.stop, self.keys.start : self.keys.stop]

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """View x (heads, group * rows, …) as (heads, group, rows, …)."""
        return x.view(len(self.heads), -1, len(self.rows), x.shape[-1])


def blocks(sequences: Sequences, heads: int, group: int) -> Iterator[Block]:
    """Cut `heads` key heads with `group` query heads each into blocks of rows, each with all keys that its
    rows see.

    No block contains a query before the first one that sees a key, so that a NaN in such a query spreads
    nowhere.
    """
    visibility = sequences.visibility
    rows = max(1, min(_ROWS // group, visibility.seqlen_q))
    keys = max(1, min(_KEYS, visibility.seqlen_k))
    heads_at_once = max(1, torch.get_num_threads() * _ROWS * _KEYS // (rows * group * keys))
    for first_head in range(0, heads, heads_at_once):
        block_heads = range(first_head, min(first_head + heads_at_once, heads))
        for first_row in range(visibility.first_seeing, visibility.stop_seeing, rows):
            block_rows = range(first_row, min(first_row + rows, visibility.stop_seeing))
            seen = visibility.seen_by_any(block_rows)
            if seen:
                yield Block(block_heads, block_rows, seen)


def zeroed(x: torch.Tensor, where: Optional[torch.Tensor]) -> torch.Tensor:
    """Assign 0 to the rows of x (..., seqlen, head_dim) that no other row may depend on, so that a NaN in
    them does not spread within a block. where: bool (seqlen,), or None.
    """
    return x if where is None else x.masked_fill(where[:, None], 0.0)


def query_scale(sequences: Sequences) -> float:
    """Return the factor on q that makes q.k the scaled score or, with softcap, the argument of tanh."""
    options = sequences.options
    return options.softmax_scale / options.softcap if options.softcap > 0.0 else options.softmax_scale


def products(sequences: Sequences, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the scaled q.k of a block, (heads, group * rows, keys); with softcap tanh(scaled q.k / softcap).

    q: (heads, group * rows, head_dim), scaled by query_scale; k: (heads, keys, head_dim).
    """
    u = torch.bmm(q, k.mT)
    return u.tanh_() if sequences.options.softcap > 0.0 else u


def scores(sequences: Sequences, block: Block, u: torch.Tensor) -> torch.Tensor:
    """Turn u, the result of `products`, into the scores s in place, hidden entries included."""
    if sequences.options.softcap > 0.0:
        u.mul_(sequences.options.softcap)
    if sequences.alibi_slopes is not None:
        slopes = sequences.alibi_slopes[block.heads.start : block.heads.stop, :, None, None]
        distances = sequences.visibility.distances(block.rows, block.keys, u.dtype)
        block.by_group(u).addcmul_(slopes, distances, value=-1)
    return u


def weights(sequences: Sequences, block: Block, s: torch.Tensor) -> torch.Tensor:
    """Return P without softmax: f(s) with its decay, and 0 assigned where hidden. Overwrites s only if f is
    the identity.

    P saturates as in the GPU kernels, which convert it to the dtype of the inputs.
    """
    bias = sequences.bias(block.heads, len(block.rows))
    p = saturate_(decay(sequences, block, sequences.f.value(s, bias)), sequences.dtype)
    sequences.visibility.fill_hidden(block.by_group(p), block.rows, block.keys, 0.0)
    return p


def decay(sequences: Sequences, block: Block, x: torch.Tensor) -> torch.Tensor:
    """Multiply a block of P or dP by exp(-slope * distance) in place, if there are decay_slopes."""
    if sequences.decay_slopes is not None:
        slopes = sequences.decay_slopes[block.heads.start : block.heads.stop, :, None, None]
        distances = sequences.visibility.distances(block.rows, block.keys, x.dtype)
        block.by_group(x).mul_(distances.mul(-slopes).exp_())
    return x


def kept(sequences: Sequences, block: Block, group: int) -> Optional[torch.Tensor]:
    """Return the mask (see visibility.py) of the weights that dropout keeps, (heads, group * rows, keys);
    None without dropout.
    """
    if sequences.dropout is None:
        return None
    query_heads = range(block.heads.start * group, block.heads.stop * group)
    mask = sequences.dropout.kept(query_heads, block.rows, block.keys)
    return mask.view(len(block.heads), -1, len(block.keys))


def heads_first(x: torch.Tensor, nheads_k: int, dtype: torch.dtype) -> torch.Tensor:
    """(batch, seqlen, nheads, head_dim) -> (batch * nheads_k, group, seqlen, head_dim) in dtype, a view where
    possible.
    """
    batch, seqlen, nheads, head_dim = x.shape
    x = x.unflatten(2, (nheads_k, nheads // nheads_k)).permute(0, 2, 3, 1, 4)
    x = x.to(dtype, memory_format=torch.contiguous_format)
    return x.reshape(batch * nheads_k, nheads // nheads_k, seqlen, head_dim)


def store(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write value (batch * nheads_k, group, seqlen, head_dim) into target (batch, seqlen, nheads, head_dim),
    in place.
    """
    batch, seqlen, nheads, head_dim = target.shape
    group = value.shape[1]
    value = value.unflatten(0, (batch, nheads // group))
    target.unflatten(2, (nheads // group, group)).permute(0, 2, 3, 1, 4).copy_(value)
