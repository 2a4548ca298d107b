"""Wrap flash_attn.cute on a Hopper GPU in the methods of ``oracle.Oracle`` (tests/attention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def missing() -> str | None:
    """Say what this machine lacks for the tests on Hopper; None if they can run."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU: torch sees none"
    if (capability := torch.cuda.get_device_capability())[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.0), this one has {capability[0]}.{capability[1]}"
    try:
        import flash_attn.cute.nosoftmax.public  # noqa: F401
    except ImportError as error:
        return f"needs flash-attn-4 of this patch set and nvidia-cutlass-dsl: {error}"
    return None


@dataclass(frozen=True)
class Hopper:
    """``options`` are added to every call: those that the oracle does not know, such as pack_gqa or a
    score_mod.
    """

    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def given(self, **options) -> Hopper:
        return replace(self, options={**self.options, **options})

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        from flash_attn.cute import flash_attn_func

        return flash_attn_func(q, k, v, **{"use_softmax": False, **self.options, **options})[0]

    def varlen(self, q, k, v, lengths_q=None, lengths_k=None, *, block_table=None, **options) -> Tensor:
        """Call with packed sequences if there are lengths, else with a batch. Keys may lie in pages."""
        from flash_attn.cute import flash_attn_varlen_func

        given = {"use_softmax": False}
        if lengths_q is not None:
            given.update(cu_seqlens_q=self.cumulative(lengths_q), max_seqlen_q=max(lengths_q))
        if block_table is not None:
            given.update(page_table=block_table, seqused_k=self.integers(lengths_k))
        elif lengths_k is not None:
            given.update(cu_seqlens_k=self.cumulative(lengths_k), max_seqlen_k=max(lengths_k))
        return flash_attn_varlen_func(q, k, v, **{**given, **self.options, **options})[0]

    def integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def cumulative(self, lengths: Sequence[int]) -> Tensor:
        return self.integers([0, *accumulate(lengths)])
