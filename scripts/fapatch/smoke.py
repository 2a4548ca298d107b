"""One forward and backward without softmax through the installed package, against the same sum written out in float64.

The shape is causal, bottom-right aligned, with more queries than keys, so that some rows see no key and must come out exactly 0:
there a kernel that still divides by a softmax sum gives NaN. Two key heads serve four query heads.
"""
from __future__ import annotations

import argparse
import math
import time
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .project import Project

BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K, HEAD_DIM = 2, 160, 96, 4, 2, 64
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # relative; a few roundings of each dtype


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """out = (M * (scale q k^T)) v. q: (batch, seqlen_q, nheads, head_dim), k, v: (batch, seqlen_k, nheads_k, head_dim), all float64."""
    import torch

    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, 0), v)


def measure(device: str, dtype: torch.dtype) -> tuple[dict[str, float], int, float]:
    """(relative error of out, dq, dk, dv in the maximum norm; how many NaN or Inf; seconds for forward and backward)."""
    import torch
    from flash_attn import flash_attn_func

    torch.manual_seed(0)
    flash_attn_func(*[torch.zeros(1, 1, 1, 64, device=device, dtype=dtype)] * 3, use_softmax=False)  # first calls import and compile
    shapes = [(BATCH, SEQLEN_Q, NHEADS, HEAD_DIM), *[(BATCH, SEQLEN_K, NHEADS_K, HEAD_DIM)] * 2]
    inputs = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    start = time.perf_counter()
    out = flash_attn_func(*inputs, causal=True, use_softmax=False)
    g = torch.randn_like(out)
    results = [out.detach(), *torch.autograd.grad(out, inputs, g)]
    not_finite = sum(int((~t.isfinite()).sum()) for t in results)
    seconds = time.perf_counter() - start
    wide = [t.detach().double().requires_grad_() for t in inputs]  # leaves of their own, or their gradients would be rounded too
    exact = in_float64(*wide)
    expected = [exact.detach(), *torch.autograd.grad(exact, wide, g.double())]
    errors = [float((r.double() - e).abs().max() / e.abs().max()) for r, e in zip(results, expected)]
    return dict(zip(("out", "dq", "dk", "dv"), errors)), not_finite, seconds


def best_device() -> tuple[str, str]:
    """The fastest device on which the installed package runs without softmax, and a name for it."""
    import platform

    import torch
    from flash_attn import flash_attn_func

    if torch.cuda.is_available():
        try:
            flash_attn_func(*[torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.float16)] * 3, use_softmax=False)
            return "cuda", torch.cuda.get_device_name()
        except (ImportError, NotImplementedError) as e:
            print(f"not on the GPU: {e}")
    return "cpu", platform.machine()


def report() -> bool:
    """Print one line a dtype; returns whether all of them are right."""
    import torch

    device, name = best_device()
    version = metadata.version("flash_attn")
    print(f"smoke      flash_attn {version}, use_softmax=False, causal, forward and backward on {device} ({name}) against float64")
    good = True
    for dtype in (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.bfloat16, torch.float16):
        errors, not_finite, seconds = measure(device, dtype)
        kind = str(dtype).removeprefix("torch.")
        fine = not_finite == 0 and all(e <= TOLERANCE[kind] for e in errors.values())
        numbers = "  ".join(f"{n} {e:.1e}" for n, e in errors.items())
        verdict = "ok" if fine else "WRONG"
        print(f"           {kind:<9} relative error {numbers}  NaN or Inf: {not_finite}  {seconds * 1e3:.0f} ms  {verdict}")
        good &= fine
    return good


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    return 0 if report() else 1
