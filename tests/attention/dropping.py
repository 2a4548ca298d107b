"""Check a call with dropout: the oracle gets the mask that the implementation drew."""

from __future__ import annotations

import torch

from measure import NAMES, assert_close, gradients, randn, reference

P = 0.17


def compare_dropped(attention, q, k, v, dropout_p: float = P, seed: int = 1, **options) -> torch.Tensor:
    """Compare output and gradients with the oracle under the same keep mask; returns the mask."""
    masks = []

    def run(*x):
        out, keep = attention.dropped(*x, dropout_p, seed, **options)
        masks.append(keep)
        return out

    dout = randn(*q.shape, seed=99).to(q)
    actual = gradients(run, q, k, v, dout=dout)
    options.update(keep=masks[0], dropout_p=dropout_p, method="varlen" if "lengths_q" in options else "dense")
    expected, baseline = (reference(q, k, v, dout, dtype, **options) for dtype in (torch.float64, q.dtype))
    for name, *three in zip(NAMES, actual, expected, baseline):
        assert_close(name, *three)
    return masks[0]
