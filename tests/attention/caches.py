"""Make key-value caches and the tensors of a decoding step, and check the step against the oracle."""

from __future__ import annotations

import torch

from measure import assert_close, compare_output, on_cpu, randn
from oracle import Oracle

CAPACITY = 64
LENGTHS = (11, 0, 50)


def caches(attention, slots: int = 3, capacity: int = CAPACITY, nheads_k: int = 2, head_dim: int = 32):
    return tuple(randn(slots, capacity, nheads_k, head_dim, seed=i, like=attention) for i in (11, 12))


def step(attention, seqlen: int = 1, nheads: int = 4, nheads_k: int = 2, head_dim: int = 32, batch: int = 3):
    """Return q and the new k and v of one decoding step."""
    return tuple(
        randn(batch, seqlen, h, head_dim, seed=20 + h, like=attention) for h in (nheads, nheads_k, nheads_k)
    )


def rotary(attention, positions: int = CAPACITY, rotary_dim: int = 16) -> dict[str, torch.Tensor]:
    angles = torch.arange(positions)[:, None] / 100 ** (torch.arange(rotary_dim // 2) / 8)
    return {
        f"rotary_{f.__name__}": f(angles).to(attention.device, attention.dtype)
        for f in (torch.cos, torch.sin)
    }


def check(attention, q, k_cache, v_cache, *new, **arguments) -> None:
    """Compare the output and both caches with the oracle, which appends to copies of its own."""
    copies = [on_cpu(x, torch.float64) for x in (q, k_cache, v_cache, *new)]
    Oracle().kvcache(*copies, **{name: on_cpu(value) for name, value in arguments.items()})
    compare_output(attention, q, k_cache, v_cache, *new, method="kvcache", **arguments)
    for name, actual, expected in zip(("k_cache", "v_cache"), (k_cache, v_cache), copies[1:3]):
        assert_close(name, actual, expected)
