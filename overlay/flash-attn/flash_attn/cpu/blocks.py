"""Cutting the score matrix into blocks, and the steps on a block that the forward and the backward pass share."""

from dataclasses import dataclass
from typing import Iterator, Optional

import torch

from ..score_function import activate
from .options import Sequences

# 1 MiB of scores in float32 for each thread: the few arrays of that size stay near the caches, and calls are few.
# Where the keys are many, the queries of a block become fewer, but not so few that the matrix products suffer.
_ELEMENTS_PER_THREAD = 2**18
_MAX_ROWS = 256
_MIN_ROWS = 64


@dataclass(frozen=True)
class Block:
    """Key heads (numbered through the batch), queries, and the keys that at least one of the queries sees."""

    heads: range
    rows: range
    keys: range

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """Picks this block's heads and queries from a tensor (batch * nheads_k, group, seqlen_q, …)."""
        return slice(self.heads.start, self.heads.stop), slice(None), slice(self.rows.start, self.rows.stop)

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """This block of x (batch * nheads_k, group, seqlen_q, head_dim), with the group folded into the rows."""
        return x[self.index].reshape(len(self.heads), -1, x.shape[-1])

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """This block of x (batch * nheads_k, seqlen_k, head_dim)."""
        return x[self.heads.start : self.heads.stop, self.keys.start : self.keys.stop]

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """View x (heads, group * rows, …) as (heads, group, rows, …)."""
        return x.view(len(self.heads), -1, len(self.rows), x.shape[-1])


def blocks(sequences: Sequences, heads: int, group: int) -> Iterator[Block]:
    """All blocks of `heads` key heads with `group` query heads each; queries that see no key are in none."""
    visibility = sequences.visibility
    elements = _ELEMENTS_PER_THREAD * torch.get_num_threads()
    rows = max(1, min(_MAX_ROWS, visibility.seqlen_q))
    while rows > 1 and rows * group > _MIN_ROWS and rows * group * visibility.widest(rows) > elements:
        rows //= 2
    heads_at_once = max(1, elements // max(1, rows * group * visibility.widest(rows)))
    for first_head in range(0, heads, heads_at_once):
        block_heads = range(first_head, min(first_head + heads_at_once, heads))
        for first_row in range(0, visibility.seqlen_q, rows):
            block_rows = range(first_row, min(first_row + rows, visibility.seqlen_q))
            keys = visibility.seen_by_any(block_rows)
            if keys:
                yield Block(block_heads, block_rows, keys)


def query_scale(sequences: Sequences) -> float:
    """The factor that is put on q before the loop, so that q.k needs no further pass: tanh's argument with softcap."""
    options = sequences.options
    return options.softmax_scale / options.softcap if options.softcap > 0.0 else options.softmax_scale


def scores(
    sequences: Sequences, block: Block, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """s of a block (heads, group * rows, keys), hidden entries included, and 1 - tanh^2 of the softcap or None.

    q: (heads, group * rows, head_dim), scaled by query_scale; k: (heads, keys, head_dim).
    """
    s = torch.bmm(q, k.transpose(1, 2))
    softcap, slope_of_cap = sequences.options.softcap, None
    if softcap > 0.0:
        s.tanh_()
        slope_of_cap = s.square().neg_().add_(1.0)
        s.mul_(softcap)
    if sequences.alibi_slopes is not None:
        slopes = sequences.alibi_slopes[block.heads.start : block.heads.stop, :, None, None]
        distances = sequences.visibility.distances(block.rows, block.keys, s.dtype)
        block.by_group(s).addcmul_(slopes, distances, value=-1)
    return s, slope_of_cap


def weights(sequences: Sequences, block: Block, s: torch.Tensor) -> torch.Tensor:
    """P without softmax: f(s), and 0 by assignment where hidden. May overwrite s only where f is the identity."""
    p = activate(s, sequences.options.activation, sequences.sigmoid_bias)
    if (limit := sequences.options.weight_limit) is not None:
        p = p.clamp_(-limit, limit)
    sequences.visibility.fill_hidden(block.by_group(p), block.rows, block.keys, 0.0)
    return p


def dropped(sequences: Sequences, block: Block, group: int, keys: range) -> torch.Tensor:
    """Bool (heads, group * rows, keys), true where dropout drops the weight of one of `keys`."""
    query_heads = range(block.heads.start * group, block.heads.stop * group)
    return sequences.dropout.dropped(query_heads, block.rows, keys).view(len(block.heads), -1, len(keys))
