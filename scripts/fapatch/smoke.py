"""One forward and backward without softmax through the installed package, against the same sum written out in
float64.

The shape is causal, bottom-right aligned, with more queries than keys, so that some rows see no key and must
come out exactly 0: there a kernel that still divides by a softmax sum gives NaN. Two key heads serve four
query heads.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .project import Project

BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K = 2, 160, 96, 4, 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # relative; a few roundings of each dtype


@dataclass(frozen=True)
class Target:
    """Where the package runs, what that is called, and with what it is called there: the kernels that the
    installed build has.

    ``module`` has the function that is called.
    """

    device: str
    name: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    head_dim: int = 64
    backward: bool = True
    module: str = "flash_attn"

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """Without softmax, by what this wheel has for the device and not by another wheel beside it."""
        options = {"backend": "fa2"} if (self.device, self.module) == ("cuda", "flash_attn") else {}
        out = importlib.import_module(self.module).flash_attn_func(
            q, k, v, causal=causal, use_softmax=False, **options
        )
        return out[0] if isinstance(out, tuple) else out  # flash_attn.cute also returns an empty log-sum-exp

    @property
    def passes(self) -> str:
        return "forward and backward" if self.backward else "forward"


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """out = (M * (scale q k^T)) v. q: (batch, seqlen_q, nheads, head_dim), k, v: (batch, seqlen_k, nheads_k,
    head_dim), all float64.
    """
    import torch

    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, 0), v)


def measure(target: Target, dtype: torch.dtype) -> tuple[dict[str, float], int, float]:
    """(relative error of out, dq, dk, dv in the maximum norm; how many NaN or Inf; seconds for the passes of
    ``target``).
    """
    import torch

    def passes(attend, q, k, v, dout):
        out = attend(q, k, v)
        return [out.detach(), *(torch.autograd.grad(out, (q, k, v), dout) if target.backward else ())]

    torch.manual_seed(0)
    probe(target, dtype)  # first calls import and compile
    d = target.head_dim
    shapes = [(BATCH, SEQLEN_Q, NHEADS, d), *[(BATCH, SEQLEN_K, NHEADS_K, d)] * 2]
    *inputs, dout = [torch.randn(s, device=target.device, dtype=dtype) for s in (*shapes, shapes[0])]
    start = time.perf_counter()
    leaves = [t.requires_grad_(target.backward) for t in inputs]
    results = passes(partial(target.attend, causal=True), *leaves, dout)
    not_finite = sum(int((~t.isfinite()).sum()) for t in results)
    seconds = time.perf_counter() - start
    # Leaves of their own, or their gradients would be rounded too.
    expected = passes(
        in_float64, *[t.detach().double().requires_grad_(target.backward) for t in inputs], dout.double()
    )
    errors = [float((r.double() - e).abs().max() / e.abs().max()) for r, e in zip(results, expected)]
    return dict(zip(("out", "dq", "dk", "dv"), errors)), not_finite, seconds


def probe(target: Target, dtype: torch.dtype) -> None:
    """Attend once, to one key. Raises what the package raises."""
    import torch

    target.attend(*[torch.zeros(1, 1, 1, target.head_dim, device=target.device, dtype=dtype)] * 3)


def on_gpu() -> Target:
    """The GPU, with one of the head dimensions and the dtypes that the extension was built for
    (kernel_build.py).

    Raises ValueError or RuntimeError, which say why it cannot be the GPU.
    """
    import torch

    built = {}
    try:
        import flash_attn_2_cuda as extension
    except ImportError:
        pass  # the call below says it better
    else:
        kinds = {"fp16": "float16", "bf16": "bfloat16"}
        built = {"dtypes": tuple(kinds[x] for x in getattr(extension, "built_dtypes", kinds))}
        passes = getattr(extension, "built_passes", ("fwd", "bwd"))
        if "fwd" not in passes:
            raise RuntimeError(
                f"this build has no forward kernels (PASSES={','.join(passes)}), and nothing to show without "
                "a cache"
            )
        head_dims = getattr(extension, "built_head_dims", (Target.head_dim,))
        head_dim = Target.head_dim if Target.head_dim in head_dims else head_dims[0]
        built |= {"head_dim": head_dim, "backward": "bwd" in passes}
    target = Target("cuda", torch.cuda.get_device_name(), **built)
    probe(target, getattr(torch, target.dtypes[0] if built else "float16"))
    return target


def best_target() -> Target:
    """The fastest device on which the installed package runs without softmax."""
    import platform

    import torch

    if torch.cuda.is_available():
        try:
            return on_gpu()
        except (ValueError, RuntimeError) as e:
            print(f"not on the GPU: {e}")
    return Target("cpu", platform.machine())


def report(target: Target, package: str) -> bool:
    """Print one line a dtype for the installed ``package``; returns whether all of them are right."""
    import torch

    print(
        f"smoke      {package} {metadata.version(package)}, use_softmax=False, causal, {target.passes} on "
        f"{target.device} ({target.name}) against float64"
    )
    good = True
    for kind in target.dtypes:
        errors, not_finite, seconds = measure(target, getattr(torch, kind))
        fine = not_finite == 0 and all(e <= TOLERANCE[kind] for e in errors.values())
        numbers = "  ".join(f"{n} {e:.1e}" for n, e in errors.items())
        verdict = "ok" if fine else "WRONG"
        print(
            f"           {kind:<9} relative error {numbers}  NaN or Inf: {not_finite}  {seconds * 1e3:.0f} "
            f"ms  {verdict}"
        )
        good &= fine
    return good


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    if project.family.smoke == "compile":
        from . import smoke_compile

        return 0 if smoke_compile.report(project.family) else 1
    return 0 if report(best_target(), project.family.package) else 1
