"""Apply rotary position embedding (Su et al., RoFormer, arXiv 2104.09864), in its two layouts."""

import torch

from ...call import compute_dtype
from ...score import saturate_


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    saturate: bool = False,
) -> torch.Tensor:
    """Rotate the first rotary_dim channels of x (..., seqlen, nheads, head_dim) by the angles at `positions`.

    positions: (seqlen,) or (batch, seqlen), indices into the rows of cos and sin.
    cos, sin: (seqlen_ro, rotary_dim / 2). interleaved: channel 2i is paired with 2i + 1 (GPT-J), else channel
    i with i + rotary_dim / 2 (GPT-NeoX). Computed in float32 at least, returned in the dtype of x; with
    `saturate`, numbers beyond float16's range become its largest.
    """
    half = cos.shape[1]
    wide = compute_dtype(x.dtype)
    cos, sin = (table[positions].to(wide).unsqueeze(-2) for table in (cos, sin))
    turned = x[..., : 2 * half].to(wide)
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    if saturate:
        turned = saturate_(turned, x.dtype)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)
