"""The backward pass over sequences of one length."""

from typing import Optional

import torch

from .blocks import (
    Block,
    blocks,
    decay,
    heads_first,
    kept,
    products,
    query_scale,
    scores,
    store,
    weights,
    zeroed,
)
from .sequences import Sequences
from .visibility import keep_where


def backward(
    sequences: Sequences,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional[torch.Tensor],
    softmax_lse: Optional[torch.Tensor],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_d: Optional[torch.Tensor],
) -> None:
    """Write the gradients into dq, dk, dv, and rowsum(dout * out) into softmax_d.

    q, dq: (batch, seqlen_q, nheads, head_dim); dout, out: the same with head_dim_v; k, dk: (batch, seqlen_k,
    nheads_k, head_dim); v, dv: the same with head_dim_v; any strides. softmax_lse, softmax_d: (batch, nheads,
    seqlen_q). out, softmax_lse and softmax_d are None without softmax. The gradients of the query heads that
    share a key head are summed in the compute dtype. Only P saturates.
    """
    options = sequences.options
    nheads_k, dtype = k.shape[2], sequences.compute_dtype
    keep_prob = 1.0 - options.dropout_p
    unseen, blind = sequences.visibility.unseen_keys, sequences.visibility.blind_queries
    q, dout = (zeroed(heads_first(x, nheads_k, dtype), blind) for x in (q, dout))
    q = q * query_scale(sequences)
    k, v = (zeroed(heads_first(x, nheads_k, dtype).squeeze(1), unseen) for x in (k, v))
    heads, group = q.shape[:2]
    if sequences.use_softmax:
        lse = softmax_lse.to(dtype).reshape(*q.shape[:3], 1)
        # dS is divided by keep_prob only at the end, so the row sum is multiplied by keep_prob here.
        row_dot = (dout * heads_first(out, nheads_k, dtype)).sum(dim=-1, keepdim=True)
        softmax_d.copy_(row_dot.view(softmax_d.shape))
        row_dot.mul_(keep_prob)
    grad_q = torch.zeros_like(q)
    # (heads, head_dim, seqlen_k): the products that add to these are faster in this layout.
    grad_k, grad_v = (x.new_zeros(x.mT.shape) for x in (k, v))

    for block in blocks(sequences, heads, group):
        q_block, dout_block = block.of_queries(q), block.of_queries(dout)
        if (norm := sequences.norm(block.heads, block.rows)) is not None:
            dout_block = block.by_group(dout_block).mul(norm).view_as(dout_block)
        grad_q_block = torch.zeros_like(q_block)
        for part in block.by_keys(sequences.visibility):
            k_part = part.of_keys(k)
            u = products(sequences, q_block, k_part)
            # u is a tanh, whose derivative is 1 - tanh^2. Take it before `scores` overwrites u.
            slope_of_cap = u.square().neg_().add_(1.0) if options.softcap > 0.0 else None
            s = scores(sequences, part, u)
            dp = torch.bmm(dout_block, part.of_keys(v).mT)
            mask = kept(sequences, part, group)
            if mask is not None:
                keep_where(dp, mask)
            if sequences.use_softmax:
                p, ds = _softmax(sequences, part, s, dp, block.of_queries(lse), block.of_queries(row_dot))
            else:
                p, ds = _activation(sequences, part, s, dp)
            if slope_of_cap is not None:
                ds.mul_(slope_of_cap)
            if mask is not None:
                keep_where(p, mask)
            grad_q_block.baddbmm_(ds, k_part)
            part.of_keys(grad_k.mT).mT.baddbmm_(q_block.mT, ds)
            part.of_keys(grad_v.mT).mT.baddbmm_(dout_block.mT, p)
        grad_q[block.index] = block.by_group(grad_q_block)

    grad_q.mul_(options.softmax_scale / keep_prob)
    grad_k.mul_((options.softcap if options.softcap > 0.0 else 1.0) / keep_prob)
    grad_v.mul_(1.0 / keep_prob)
    for target, grad in ((dq, grad_q), (dk, grad_k.mT.unsqueeze(1)), (dv, grad_v.mT.unsqueeze(1))):
        store(target, grad)


def _softmax(
    sequences: Sequences,
    part: Block,
    s: torch.Tensor,
    dp: torch.Tensor,
    lse: torch.Tensor,
    row_dot: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P and dS = P * (dP - rowsum(dO * O)), which overwrite s and dp."""
    sequences.visibility.fill_hidden(part.by_group(s), part.rows, part.keys, -torch.inf)
    p = s.sub_(lse).exp_()
    return p, dp.sub_(row_dot).mul_(p)


def _activation(
    sequences: Sequences, part: Block, s: torch.Tensor, dp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P and dS = dP * f'(s), which may overwrite s and dp."""
    decay(sequences, part, dp)
    ds = sequences.f.times_derivative(dp, s, sequences.bias(part.heads, len(part.rows)))
    # Mask dS as well: without softmax it has no factor P, and a P of 0 does not mean hidden.
    sequences.visibility.fill_hidden(part.by_group(ds), part.rows, part.keys, 0.0)
    return weights(sequences, part, s), ds
