"""Smoke-test the installed package against float64: one forward and backward without softmax, and one call of
every public function with softmax and without.

The mask is causal, aligned bottom-right, and there are more queries than keys. Some rows therefore see no key
and must be exactly 0, where a kernel that still divides by a softmax sum gives NaN. nheads is 4, nheads_k is
2.

For a package whose kernels are compiled when they are called, these calls need a Hopper GPU. On another
machine one kernel is compiled for Hopper without a GPU: upstream compiles for fake tensors if the
architecture is named. If the compiler is missing too, the installed files are only parsed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from types import ModuleType
from typing import TYPE_CHECKING

from ..base.errors import FapError
from ..base.lock import Family
from ..base.project import Project

if TYPE_CHECKING:
    import torch

BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K = 2, 160, 96, 4, 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # relative; a few roundings of each dtype

# flash_attn.cute and its compiler read these when imported: which kernels to take, the architecture, and the
# number of SMs (H100). The cache is off, because a kernel from an earlier run would show nothing.
FOR_HOPPER = {
    "FLASH_ATTENTION_ARCH": "sm_90",
    "CUTE_DSL_ARCH": "sm_90a",
    "FLASH_ATTENTION_NUM_SMS": "132",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
}
HOPPER = (9, 0)


@dataclass(frozen=True)
class Target:
    """A device, its name, and the calls that the installed build has kernels for on it.

    ``module``: the module of the public functions; ``cache`` and ``softmax``: whether the build has kernels
    for a KV cache and for softmax.
    """

    device: str
    name: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    head_dim: int = 64
    backward: bool = True
    module: str = "flash_attn"
    cache: bool = True
    softmax: bool = True

    @property
    def options(self) -> dict[str, str]:
        """Arguments that keep a call without softmax on this wheel's kernels if another wheel is installed
        too.
        """
        return {"backend": "fa2"} if (self.device, self.module) == ("cuda", "flash_attn") else {}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """Attend without softmax, by this wheel's kernels for the device and not another wheel's."""
        function = importlib.import_module(self.module).flash_attn_func
        return _first(function(q, k, v, causal=causal, use_softmax=False, **self.options))

    @property
    def passes(self) -> str:
        return "forward and backward" if self.backward else "forward"


def _first(out: torch.Tensor | tuple) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out  # flash_attn.cute also returns an empty log-sum-exp


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, use_softmax: bool = False) -> torch.Tensor:
    """Compute out = (M * (scale q k^T)) v, or with the softmax of the visible scores in place of M * (...).

    q: (batch, seqlen_q, nheads, head_dim), k, v: (batch, seqlen_k, nheads_k, head_dim), all float64.
    """
    import torch

    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    hidden = scores.masked_fill(~visible, float("-inf") if use_softmax else 0)
    return torch.einsum("bhij,bjhd->bihd", hidden.softmax(-1) if use_softmax else hidden, v)


def calls(target: Target, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, tuple]:
    """Make a call for every public function of ``target`` that attends from q to k and v, all of one shape:
    name -> (positional, keyword arguments).
    """
    import torch

    batch, seqlen = q.shape[:2]
    ends = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=q.device)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    both = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
    one = {"cu_seqlens": ends, "max_seqlen": seqlen}
    found = {
        "flash_attn_func": ((q, k, v), {}),
        "flash_attn_kvpacked_func": ((q, torch.stack((k, v), 2)), {}),
        "flash_attn_qkvpacked_func": ((torch.stack((q, k, v), 2),), {}),
        "flash_attn_varlen_func": (flat, both),
        "flash_attn_varlen_kvpacked_func": ((flat[0], torch.stack(flat[1:], 1)), both),
        "flash_attn_varlen_qkvpacked_func": ((torch.stack(flat, 1),), one),
    }
    if target.cache:
        found["flash_attn_with_kvcache"] = ((q, k, v), {"cache_seqlens": seqlen})
    module = importlib.import_module(target.module)
    return {name: arguments for name, arguments in found.items() if hasattr(module, name)}


def wrong_functions(target: Target) -> tuple[int, list[str]]:
    """Call the public functions; returns (number of calls, a line for each that failed or gave a wrong
    result).
    """
    import torch

    dtype, wrong, made = getattr(torch, target.dtypes[0]), [], 0
    torch.manual_seed(0)
    shape = (BATCH, SEQLEN_K, NHEADS, target.head_dim)
    q, k, v = (torch.randn(shape, device=target.device, dtype=dtype) for _ in range(3))
    module = importlib.import_module(target.module)
    for use_softmax in (True, False) if target.softmax else (False,):
        expected = in_float64(*(t.double() for t in (q, k, v)), use_softmax)
        options = {"causal": True, "use_softmax": use_softmax, **({} if use_softmax else target.options)}
        for name, (args, keywords) in calls(target, q, k, v).items():
            made += 1
            try:
                with torch.no_grad():
                    out = _first(getattr(module, name)(*args, **keywords, **options))
                error = float((out.view(shape).double() - expected).abs().max() / expected.abs().max())
                said = f"relative error {error:.1e}"
                fine = error <= TOLERANCE[target.dtypes[0]]
            except Exception as e:  # any exception counts as a fault of that function
                said, fine = f"{type(e).__name__}: {e}", False
            if not fine:
                wrong.append(f"{name}, use_softmax={use_softmax}: {said}")
    return made, wrong


def measure(target: Target, dtype: torch.dtype) -> tuple[dict[str, float], int, float]:
    """Return (relative error of out, dq, dk, dv in the maximum norm; number of NaN or Inf; seconds for the
    passes of ``target``).
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
    # Separate leaves in float64, or their gradients would be rounded too.
    expected = passes(
        in_float64, *[t.detach().double().requires_grad_(target.backward) for t in inputs], dout.double()
    )
    errors = [float((r.double() - e).abs().max() / e.abs().max()) for r, e in zip(results, expected)]
    return dict(zip(("out", "dq", "dk", "dv"), errors)), not_finite, seconds


def probe(target: Target, dtype: torch.dtype) -> None:
    """Attend once, to one key. Raises any error of the package."""
    import torch

    target.attend(*[torch.zeros(1, 1, 1, target.head_dim, device=target.device, dtype=dtype)] * 3)


def on_gpu() -> Target:
    """The GPU, with a head dimension and the dtypes that the extension was built for (kernel_build.py).

    Raises ValueError or RuntimeError, which say why the GPU cannot be used.
    """
    import torch

    built = {}
    try:
        import flash_attn_2_cuda as extension
    except ImportError:
        pass  # the call below gives a better message
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
        built["cache"] = "splitkv" in getattr(extension, "built_passes", ("splitkv",))
        built["softmax"] = getattr(extension, "built_with_softmax", True)
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
    """Print a line for each dtype for the installed ``package``; returns whether all are right."""
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
    made, wrong = wrong_functions(target)
    print(f"           every public function, {made} calls: {f'{len(wrong)} WRONG' if wrong else 'ok'}")
    for line in wrong:
        print(f"           {line}")
    return good and not wrong


def step_past_base(family: Family) -> None:
    """Import the package's code, one folder of flash_attn, from where it is installed. If the packages that
    .venv shares with its base hold a flash_attn with an __init__.py, Python would look only there.
    """
    top = family.code.partition("/")[0]
    own = str(metadata.distribution(family.package).locate_file(top))
    found = util.find_spec(top)
    if found is None or own in map(str, found.submodule_search_locations or ()):
        return
    sys.modules[top] = module = ModuleType(top)
    module.__path__ = [own]
    print(f"note       {found.origin} hides {own}; `make wheel` puts this project's {top} before it")


def parsed(family: Family) -> int:
    """Parse the installed Python files of the package and return their number. Raises FapError if one is
    missing or does not parse, or if Python imports others.
    """
    files = [file.locate() for file in metadata.files(family.package) or () if file.suffix == ".py"]
    try:
        for file in files:
            ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError) as e:
        raise FapError(
            f"the installed {family.package} cannot be read: {e}", f"make wheel FAMILY={family.name}"
        ) from e
    module = family.code.replace("/", ".")
    spec = util.find_spec(module)
    if spec is None or spec.origin not in map(str, files):
        raise FapError(
            f"{module} is {spec and spec.origin}, which is not of {family.package}",
            "uninstall whatever brought that file",
        )
    return len(files)


def lacking(family: Family) -> list[str]:
    """List the dependencies of the installed package, declared or not and at any depth, that this environment
    lacks.
    """
    from ..workers.missing import unmet

    return unmet([*(metadata.requires(family.package) or ()), *family.undeclared], {})


def compile_one() -> float:
    """Compile a causal bf16 forward kernel without softmax for Hopper; returns the seconds of import and
    call.
    """
    os.environ.update(FOR_HOPPER)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    start = time.perf_counter()
    from flash_attn.cute import flash_attn_func

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if a fake tensor is asked for its address
        shapes = [(BATCH, SEQLEN_Q, NHEADS, 128), *[(BATCH, SEQLEN_K, NHEADS_K, 128)] * 2]
        flash_attn_func(
            *[torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes],
            causal=True,
            use_softmax=False,
        )
    return time.perf_counter() - start


def report_compiled(family: Family) -> bool:
    """Print what was checked and what was not; returns whether all checks passed."""
    step_past_base(family)
    if missing := lacking(family):
        print(
            f"smoke      {family.package} {metadata.version(family.package)}: {parsed(family)} Python files "
            "are installed and parse"
        )
        print(
            f"           not compiled and not run: .venv lacks {', '.join(missing)} (make toolchain "
            f"FAMILY={family.name} installs them)"
        )
        return True
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER:
        target = Target(
            "cuda",
            torch.cuda.get_device_name(),
            ("bfloat16", "float16"),
            module=family.code.replace("/", "."),
        )
        return report(target, family.package)
    print(
        f"smoke      {family.package} {metadata.version(family.package)}: {parsed(family)} Python files are "
        "installed and parse"
    )
    print(
        f"           a causal forward kernel without softmax compiles for Hopper in {compile_one():.1f} s; "
        "not run: no Hopper GPU here"
    )
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    if project.family.smoke == "compile":
        return 0 if report_compiled(project.family) else 1
    return 0 if report(best_target(), project.family.package) else 1
