"""The installed ``flash_attn`` behind the same methods as ``oracle.Oracle``, so that one check runs against both."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from torch import Tensor

EXTENSION = "flash_attn_2_cuda"
NOT_LINEAR = 'algorithm="linear" is not possible with '


def missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot be tested here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs a GPU: torch sees none"
    if importlib.util.find_spec(EXTENSION) is None:
        return f"needs the CUDA extension: {EXTENSION} is not in this installation"
    return None


def devices() -> list[str]:
    return ["cpu"] if missing_for_cuda() else ["cpu", "cuda"]


def supports(device: str, dtype: torch.dtype) -> bool:
    """The CUDA kernels take 16-bit types alone; the CPU backend takes every floating type."""
    return device == "cpu" or dtype in (torch.float16, torch.bfloat16)


def not_in_this_build(error: BaseException) -> bool:
    """Whether a call failed because the CUDA build lacks its kernels: another score function than the identity, or what HEAD_DIMS, DTYPES,
    PASSES or NO_SOFTMAX_ONLY left out. The same test runs on the CPU backend, which has all of it."""
    return (
        isinstance(error, NotImplementedError) and str(error).startswith(f"{EXTENSION} has no kernels for activation=")
        or isinstance(error, RuntimeError) and str(error).startswith("This flash attention build has no kernels ")
    )  # fmt: skip


def cumulative(lengths: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class Package:
    """Public functions of flash_attn on one device, by one algorithm; ``use_softmax`` is False unless given.

    With algorithm="linear" a call that has no linear algorithm skips the test, with the package's own reason.
    """

    def __init__(self, device: str = "cpu", algorithm: str = "quadratic") -> None:
        self.device, self.algorithm = device, algorithm
        self.dtype = torch.float64 if supports(device, torch.float64) else torch.float16

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return self._call(flash_attn_func, q, k, v, **options)

    def _call(self, function, *arguments, **options):
        """Anything that the linear algorithm refuses is skipped, except refusals that both algorithms share."""
        options = {"use_softmax": False, **options}
        try:
            return function(*arguments, **{"algorithm": self.algorithm, **options})
        except ValueError as error:
            if str(error).startswith(NOT_LINEAR):
                pytest.skip(str(error))
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
            return self._call(flash_attn_varlen_func, q, k, v, cu_q, cu_k, *longest, block_table=block_table, **options)
        if self.algorithm == "linear":
            pytest.skip("seqused_k and leftpad_k have no linear algorithm")
        return self._varlen_op(q, k, v, cu_q, cu_k, *longest, seqused_k, leftpad_k, block_table, **options)

    def _varlen_op(
        self, q, k, v, cu_q, cu_k, max_q, max_k, seqused_k, leftpad_k, block_table, *, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, use_softmax=False, activation="identity", sigmoid_bias=0.0, **options,
    ) -> Tensor:  # fmt: skip
        """seqused_k and leftpad_k have no public function, only the op beneath it takes them (forward)."""
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        bias = None if sigmoid_bias == "-log n" else sigmoid_bias
        return _flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, *window_size, softcap,
            leftpad_k=leftpad_k, seqused_k=seqused_k, block_table=block_table,
            use_softmax=use_softmax, activation=activation, sigmoid_bias=bias, **{"alibi_slopes": None, **options},
        )[0]  # fmt: skip

    def kvcache(self, q, k_cache, v_cache, k=None, v=None, **options) -> Tensor:
        if self.algorithm == "linear":
            pytest.skip("the linear algorithm has a state and no cache")
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **{"use_softmax": False, **options})
