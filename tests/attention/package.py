"""Wrap the installed ``flash_attn`` in the methods of ``oracle.Oracle``, so that a check can run against
either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from flash_attn import explain, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, nosoftmax
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from torch import Tensor

EXTENSION = "flash_attn_2_cuda"
# Options of the public functions for each variant. The backend of "quadratic" also takes softmax.
VARIANTS = {
    ("cpu", "quadratic"): dict(algorithm="quadratic"),
    ("cuda", "quadratic"): dict(backend="fa2"),
    ("cpu", "linear"): dict(algorithm="linear"),
    ("cuda", "linear"): dict(algorithm="linear"),
    ("cuda", "fa4"): dict(backend="fa4"),
}


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def missing(device: str, variant: str = "quadratic") -> str | None:
    """Why a variant cannot be tested on this device, or None if it can."""
    if device not in devices():
        return "needs a GPU: torch sees none"
    if (device, variant) == ("cuda", "quadratic") and importlib.util.find_spec(EXTENSION) is None:
        return f"needs the CUDA extension: {EXTENSION} is not in this installation"
    if variant == "fa4":
        x = torch.zeros(1, 1, 1, 64, device=device, dtype=torch.bfloat16)
        try:
            explain(flash_attn_func, x, x, x, use_softmax=False, backend="fa4")
        except ValueError as error:
            return str(error)
    return None


def supports(device: str, dtype: torch.dtype) -> bool:
    """The CUDA kernels take 16-bit types alone; the CPU backend takes every floating type."""
    return device == "cpu" or dtype in (torch.float16, torch.bfloat16)


def not_in_this_build(error: BaseException) -> bool:
    """Whether a call failed because the CUDA build lacks its kernels: a mask, or kernels that HEAD_DIMS,
    DTYPES, PASSES or NO_SOFTMAX_ONLY left out. The CPU backend, which has all of them, runs the same test.
    """
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return str(error).startswith("This flash attention build has no kernels ")
    refused = f"{EXTENSION} has no kernels for mask"
    return isinstance(error, (NotImplementedError, ValueError)) and refused in str(error)


def cumulative(lengths: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class Package:
    """The public functions of flash_attn on one device, by one of VARIANTS. ``use_softmax`` is False unless
    given.

    A call that the variant does not take skips the test, with the package's own reason.
    """

    def __init__(self, device: str = "cpu", variant: str = "quadratic") -> None:
        self.device, self.variant, self.forced = device, variant, VARIANTS[device, variant]
        self.dtype = torch.float64 if supports(device, torch.float64) else torch.float16

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return self._call(flash_attn_func, q, k, v, **options)

    def _call(self, function, *arguments, **options):
        return self._refusable(
            lambda: function(*arguments, **{**self.forced, "use_softmax": False, **options})
        )

    def _refusable(self, call):
        ((name, value),) = self.forced.items()
        try:
            return call()
        except ValueError as error:
            if self.variant != "quadratic" and str(error).startswith(f'{name}="{value}" is not possible'):
                pytest.skip(str(error).splitlines()[0])
            raise

    def dropped(self, q, k, v, dropout_p: float, seed: int, **options) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        run, longest = self.dense, (q.shape[1], k.shape[1])
        if "lengths_q" in options:
            run, longest = self.varlen, (max(options["lengths_q"]), max(options["lengths_k"]))
        out, _, encoded = run(q, k, v, dropout_p=dropout_p, return_attn_probs=True, **options)
        return out, ~torch.signbit(encoded[:, :, : longest[0], : longest[1]].detach())

    def varlen(
        self, q, k, v, lengths_q, lengths_k, *, seqused_k=None, leftpad_k=None, block_table=None, **options
    ) -> Tensor:
        cu_q, cu_k = (cumulative(lengths, self.device) for lengths in (lengths_q, lengths_k))
        longest = max(lengths_q), max(lengths_k)
        if seqused_k is None and leftpad_k is None:
            return self._call(
                flash_attn_varlen_func, q, k, v, cu_q, cu_k, *longest, block_table=block_table, **options
            )
        options = {"use_softmax": False, **options}
        if options.pop("use_softmax"):
            return self._varlen_op(
                q, k, v, cu_q, cu_k, *longest, seqused_k, leftpad_k, block_table, **options
            )
        # nosoftmax.forward and backward take these two options.
        return self._refusable(
            lambda: nosoftmax.forward(
                q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest[0],
                max_seqlen_k=longest[1], block_table=block_table, seqused_k=seqused_k, leftpad_k=leftpad_k,
                **self.forced, **options,
            )[0]
        )  # fmt: skip

    def _varlen_op(
        self, q, k, v, cu_q, cu_k, max_q, max_k, seqused_k, leftpad_k, block_table, *, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, **options,
    ) -> Tensor:  # fmt: skip
        """Call the operator below the public function, which takes both options with softmax."""
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return _flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, *window_size, softcap,
            leftpad_k=leftpad_k, seqused_k=seqused_k, block_table=block_table, **{"alibi_slopes": None,
            **options},
        )[0]  # fmt: skip

    def kvcache(self, q, k_cache, v_cache, k=None, v=None, **options) -> Tensor:
        return self._call(flash_attn_with_kvcache, q, k_cache, v_cache, k, v, **options)
