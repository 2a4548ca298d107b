"""Compute S_dmask, the dropout mask as signs, for tests. No other result has seqlen_q * seqlen_k entries."""

import torch

from ...call import Call
from .blocks import Block, blocks, heads_first, kept, products, query_scale, scores
from .sequences import Sequences


def empty(call: Call) -> torch.Tensor:
    """Return zeros (batch, nheads, max_seqlen_q, max_seqlen_k), with both lengths rounded up to multiples of
    128.
    """
    o = call.options
    return call.q.new_zeros(
        call.batch,
        call.q.shape[-2],
        *(-(-length // 128) * 128 for length in (o.max_seqlen_q, o.max_seqlen_k)),
    )


def write(sequences: Sequences, q: torch.Tensor, k: torch.Tensor, s_dmask: torch.Tensor) -> None:
    """Fill the (seqlen_q, seqlen_k) corner of s_dmask (batch, nheads, …), which holds zeros.

    Without softmax: 1 where dropout keeps, -1 where it drops, for hidden entries as well. With softmax: exp(s
    - maximum of the row) with that sign, upstream's encoding for a single block of keys.
    """
    nheads_k, visibility = k.shape[2], sequences.visibility
    if visibility.seqlen_q == 0 or visibility.seqlen_k == 0:
        return
    group = q.shape[2] // nheads_k
    s_dmask = s_dmask.view(-1, group, *s_dmask.shape[2:])
    if not sequences.use_softmax:
        all_keys = range(visibility.seqlen_k)
        for head in range(s_dmask.shape[0]):
            block = Block(range(head, head + 1), range(visibility.seqlen_q), all_keys)
            mask = block.by_group(kept(sequences, block, group))
            s_dmask[block.index + (slice(visibility.seqlen_k),)] = torch.where(mask != 0, 1.0, -1.0).to(
                s_dmask.dtype
            )
        return
    q = heads_first(q, nheads_k, sequences.compute_dtype) * query_scale(sequences)
    k = heads_first(k, nheads_k, sequences.compute_dtype).squeeze(1)
    for block in blocks(sequences, *q.shape[:2]):
        s = scores(sequences, block, products(sequences, block.of_queries(q), block.of_keys(k)))
        visibility.fill_hidden(block.by_group(s), block.rows, block.keys, -torch.inf)
        row_max = s.amax(dim=-1, keepdim=True)
        p = s.sub_(row_max.masked_fill_(row_max == -torch.inf, 0.0)).exp_()
        p = torch.where(kept(sequences, block, group) != 0, p, -p)
        s_dmask[block.index + (slice(block.keys.start, block.keys.stop),)] = block.by_group(p).to(
            s_dmask.dtype
        )
