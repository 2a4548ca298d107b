"""Call each public function that has a gradient: its arguments, its result, and the tolerance between two
results.
"""

from __future__ import annotations

import flash_attn
import torch

from package import cumulative

DIFFERENTIABLE = (
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
)  # fmt: skip
LENGTHS = (3, 5)


def sample(device: str, *shape: int) -> torch.Tensor:
    """Normal numbers in the widest dtype that the device's kernels take."""
    dtype = torch.float64 if device == "cpu" else torch.float16
    return torch.randn(
        *shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(sum(shape))
    )


def inputs(
    name: str, device: str, seqlen: int = sum(LENGTHS), nheads: int = 2, head_dim: int = 8
) -> tuple[list, list]:
    """Return (tensors, lengths), the first arguments of a function, all cut from one packed qkv. varlen has
    two sequences.
    """
    qkv = sample(device, 2, seqlen, 3, nheads, head_dim)
    cu_seqlens, longest = [], []
    if "varlen" in name:
        qkv, copies = qkv[0], 1 if "qkvpacked" in name else 2
        # Two tensors: torch.compile does not trace an autograd.Function that gets one tensor twice.
        cu_seqlens, longest = [cumulative(LENGTHS, device) for _ in range(copies)], [max(LENGTHS)] * copies
    if "qkvpacked" in name:
        tensors = [qkv]
    elif "kvpacked" in name:
        tensors = [qkv.select(-3, 0), qkv.narrow(-3, 1, 2)]
    else:
        tensors = list(qkv.unbind(-3))
    return [t.detach().requires_grad_() for t in tensors], [*cu_seqlens, *longest]


def run(name: str, device: str, dout=None, **options):
    """Call a public function; returns (out, gradients of the three parts of the packed qkv), without
    packing.
    """
    tensors, lengths = inputs(name, device)
    out = getattr(flash_attn, name)(*tensors, *lengths, **options)
    gradients = torch.autograd.grad(out, tensors, sample(device, *out.shape) if dout is None else dout)
    parts = [part for g in gradients for part in (g.unbind(-3) if g.dim() == out.dim() + 1 else [g])]
    return out.detach(), *parts


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-12 if actual.dtype == torch.float64 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
