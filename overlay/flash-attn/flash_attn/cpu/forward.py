"""The forward pass over sequences of one length."""

from typing import Optional

import torch

from . import torch_flash
from .blocks import Block, blocks, dropped, query_scale, scores, weights
from .layout import heads_first, store
from .options import Sequences


def forward(
    sequences: Sequences,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: Optional[torch.Tensor],
) -> None:
    """Attend and write the results into out and softmax_lse.

    q, out: (batch, seqlen_q, nheads, head_dim); k, v: (batch, seqlen_k, nheads_k, head_dim); any strides.
    softmax_lse: (batch, nheads, seqlen_q), or None without softmax; +inf for a query that sees no key.
    """
    if torch_flash.fits(sequences):
        torch_flash.forward(sequences, q, k, v, out, softmax_lse)
        return
    options = sequences.options
    nheads_k, dtype = k.shape[2], options.compute_dtype
    q = heads_first(q, nheads_k, dtype) * query_scale(sequences)
    k, v = (heads_first(x, nheads_k, dtype).squeeze(1) for x in (k, v))
    heads, group = q.shape[:2]
    result = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], torch.inf, dtype=dtype)

    for block in blocks(sequences, heads, group):
        s, _ = scores(sequences, block, block.of_queries(q), block.of_keys(k))
        if options.use_softmax:
            p, row_sum, row_lse = _softmax(sequences, block, s)
            lse[block.index] = block.by_group(row_lse).squeeze(-1)
        else:
            p = weights(sequences, block, s)
        if sequences.dropout is not None:
            p.masked_fill_(dropped(sequences, block, group, block.keys), 0.0)
        o = torch.bmm(p, block.of_keys(v))
        if options.use_softmax:
            o.div_(row_sum)
        o = block.by_group(o)
        if (norm := sequences.norm(block.rows)) is not None:
            o.mul_(norm)
        result[block.index] = o

    if sequences.dropout is not None:
        result.mul_(1.0 / (1.0 - sequences.dropout.p))
    store(out, result, saturate=not options.use_softmax)
    if softmax_lse is not None:
        softmax_lse.copy_(lse.view(softmax_lse.shape))


def _softmax(
    sequences: Sequences, block: Block, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(s - row maximum) in the place of s, the sum of each row, and its log-sum-exp; +inf where no key is seen."""
    sequences.visibility.fill_hidden(block.by_group(s), block.rows, block.keys, -torch.inf)
    row_max = s.amax(dim=-1, keepdim=True)
    row_max.masked_fill_(row_max == -torch.inf, 0.0)
    p = s.sub_(row_max).exp_()
    row_sum = p.sum(dim=-1, keepdim=True)
    lse = row_sum.log().add_(row_max).masked_fill_(row_sum == 0.0, torch.inf)
    # A row that sees a key sums to 1 at least, since its maximum gives exp(0).
    return p, row_sum.clamp_(min=1.0), lse
