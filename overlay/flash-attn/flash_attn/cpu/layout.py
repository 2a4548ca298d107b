"""Between the tensors of the interface, (batch, seqlen, nheads, head_dim), and those of the loops, heads first."""

import torch


def heads_first(x: torch.Tensor, nheads_k: int, dtype: torch.dtype) -> torch.Tensor:
    """(batch, seqlen, nheads, head_dim) -> (batch * nheads_k, group, seqlen, head_dim) in dtype, a view where it can."""
    batch, seqlen, nheads, head_dim = x.shape
    x = x.unflatten(2, (nheads_k, nheads // nheads_k)).permute(0, 2, 3, 1, 4)
    x = x.to(dtype, memory_format=torch.contiguous_format)
    return x.reshape(batch * nheads_k, nheads // nheads_k, seqlen, head_dim)


def store(target: torch.Tensor, value: torch.Tensor, saturate: bool) -> None:
    """Write value (batch * nheads_k, group, seqlen, head_dim) into target (batch, seqlen, nheads, head_dim), in place.

    With `saturate`, values beyond the range of target's dtype become its largest finite value; value is overwritten.
    """
    batch, seqlen, nheads, head_dim = target.shape
    group = value.shape[1]
    if saturate and target.dtype in (torch.float16, torch.bfloat16):
        limit = torch.finfo(target.dtype).max
        value = value.clamp_(-limit, limit)
    value = value.unflatten(0, (batch, nheads // group))
    target.unflatten(2, (nheads // group, group)).permute(0, 2, 3, 1, 4).copy_(value)
