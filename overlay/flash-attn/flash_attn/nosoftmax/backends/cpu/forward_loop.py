"""The forward pass over sequences of one length."""

from typing import Optional

import torch

from ...score import saturate_
from .blocks import blocks, heads_first, kept, products, query_scale, scores, store, weights, zeroed
from .sequences import Sequences
from .visibility import keep_where


def forward(
    sequences: Sequences,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: Optional[torch.Tensor],
) -> None:
    """Attend and write the results into out and softmax_lse.

    q: (batch, seqlen_q, nheads, head_dim); k: (batch, seqlen_k, nheads_k, head_dim); v: (batch, seqlen_k,
    nheads_k, head_dim_v); out: (batch, seqlen_q, nheads, head_dim_v); any strides. softmax_lse: (batch,
    nheads, seqlen_q), or None without softmax; +inf for a query that sees no key.
    """
    nheads_k, dtype, unseen = k.shape[2], sequences.compute_dtype, sequences.visibility.unseen_keys
    q = heads_first(q, nheads_k, dtype) * query_scale(sequences)
    k, v = (zeroed(heads_first(x, nheads_k, dtype).squeeze(1), unseen) for x in (k, v))
    heads, group = q.shape[:2]
    result = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], torch.inf)

    for block in blocks(sequences, heads, group):
        q_block = block.of_queries(q)
        o = q_block.new_zeros(*q_block.shape[:2], v.shape[-1])
        softmax = _RunningSoftmax(o) if sequences.use_softmax else None
        for part in block.by_keys(sequences.visibility):
            s = scores(sequences, part, products(sequences, q_block, part.of_keys(k)))
            if softmax is not None:
                sequences.visibility.fill_hidden(part.by_group(s), part.rows, part.keys, -torch.inf)
                p = softmax.next_weights(s)
            else:
                p = weights(sequences, part, s)
            if (mask := kept(sequences, part, group)) is not None:
                keep_where(p, mask)
            o.baddbmm_(p, part.of_keys(v))
        if softmax is not None:
            o.div_(softmax.divisor())
            lse[block.index] = block.by_group(softmax.log_sum_exp()).squeeze(-1)
        o = block.by_group(o)
        if (norm := sequences.norm(block.heads, block.rows)) is not None:
            o.mul_(norm)
        result[block.index] = o

    if sequences.dropout is not None:
        result.mul_(1.0 / (1.0 - sequences.dropout.p))
    store(out, result if sequences.use_softmax else saturate_(result, out.dtype))
    if softmax_lse is not None:
        softmax_lse.copy_(lse.view(softmax_lse.shape))


class _RunningSoftmax:
    """Softmax over keys that come part by part (Milakov and Gimelshein, arXiv 1805.02867).

    The weights are relative to the maximum so far. When the maximum grows, the accumulated output is scaled
    down.
    """

    def __init__(self, output: torch.Tensor) -> None:
        """output: (heads, rows, head_dim), zeros; the caller adds the product of the weights and V to it."""
        self._output = output
        self._maximum = output.new_full((*output.shape[:-1], 1), -torch.inf)
        self._sum = torch.zeros_like(self._maximum)

    def next_weights(self, s: torch.Tensor) -> torch.Tensor:
        """Return exp(s - maximum), which overwrites s (heads, rows, keys). Hidden entries of s are -inf."""
        maximum = torch.maximum(self._maximum, s.amax(dim=-1, keepdim=True))
        # A row that has seen no key yet has the maximum -inf, and -inf - -inf would be NaN.
        reference = maximum.masked_fill(maximum == -torch.inf, 0.0)
        shrink = self._maximum.sub_(reference).exp_()
        self._maximum = maximum
        self._output.mul_(shrink)
        p = s.sub_(reference).exp_()
        self._sum.mul_(shrink).add_(p.sum(dim=-1, keepdim=True))
        return p

    def divisor(self) -> torch.Tensor:
        """The row sums; 1 where no key was seen. Other rows sum to 1 at least, as their maximum
        gives exp(0).
        """
        return self._sum.clamp(min=1.0)

    def log_sum_exp(self) -> torch.Tensor:
        """+inf where no key was seen, as in the extension."""
        return self._sum.log().add_(self._maximum).masked_fill_(self._sum == 0.0, torch.inf)
