"""Rotary position embedding of one tensor: upstream's Triton kernel for CUDA tensors, PyTorch for
all others.
"""

from typing import Optional, Union

import torch
from flash_attn.nosoftmax.backends.cpu import rotary as cpu_rotary

try:
    from flash_attn.ops.triton.rotary import apply_rotary as _apply_rotary_triton
except ImportError:  # no triton on this machine, as on most without a GPU
    _apply_rotary_triton = None


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: Union[int, torch.Tensor] = 0,
    cu_seqlens: Optional[torch.Tensor] = None,
    max_seqlen: Optional[int] = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Rotate the first rotary_dim channels of x by the angles of its positions, with upstream's arguments.

    x: (batch, seqlen, nheads, headdim), or (total_seqlen, nheads, headdim) with cu_seqlens (batch + 1,).
    cos, sin: (seqlen_ro, rotary_dim / 2). Row i of sequence b has position i + seqlen_offsets, an int or
    (batch,). interleaved: the pairs are dimensions (0, 1), (2, 3), ... and not (0, rotary_dim / 2), ....
    conjugate: rotate back.
    Returns x's shape and dtype, x itself with inplace=True. Raises IndexError for a position of seqlen_ro or
    more (not with Triton, which leaves such a row as it is), ImportError for a CUDA tensor without triton.
    """
    if x.is_cuda:
        if _apply_rotary_triton is None:
            raise ImportError(f"rotary embedding of a tensor on {x.device} needs triton: pip install triton")
        return _apply_rotary_triton(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )
    turned = cpu_rotary.apply_rotary(
        x, cos, -sin if conjugate else sin, _positions(x, seqlen_offsets, cu_seqlens), interleaved
    )
    if not inplace:
        return turned
    # Hide the write from autograd, as the kernel does: upstream's autograd.Functions rely on that.
    x.data.copy_(turned)
    return x


def _positions(
    x: torch.Tensor, seqlen_offsets: Union[int, torch.Tensor], cu_seqlens: Optional[torch.Tensor]
) -> torch.Tensor:
    """The position of each row of x: (batch, seqlen) or (1, seqlen), packed (total_seqlen,)."""
    offsets = torch.as_tensor(seqlen_offsets, dtype=torch.long, device=x.device)
    if cu_seqlens is None:
        return torch.arange(x.shape[1], device=x.device) + offsets.reshape(-1, 1)
    shift = (offsets - cu_seqlens[:-1].long()).repeat_interleave(cu_seqlens.diff().long())
    return torch.arange(len(shift), device=x.device) + shift
