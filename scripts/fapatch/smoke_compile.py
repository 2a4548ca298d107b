"""What can be shown of a wheel whose kernels are compiled when they are called: the most that this machine
allows, said plainly.

On a Hopper GPU the calls of smoke.py. Elsewhere one kernel is compiled for Hopper, without a GPU: upstream
compiles for fake tensors when the architecture is named. Where the compiler is not installed either, the
installed files are parsed.
"""

from __future__ import annotations

import ast
import os
import time
import warnings
from importlib import metadata, util

from . import smoke
from .errors import FapError
from .lock import Family

# Read when flash_attn.cute and its compiler are imported: which kernels to take, what to compile them for,
# and for how many SMs (H100). A kernel that an earlier run left on the disk would show nothing.
FOR_HOPPER = {
    "FLASH_ATTENTION_ARCH": "sm_90",
    "CUTE_DSL_ARCH": "sm_90a",
    "FLASH_ATTENTION_NUM_SMS": "132",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
}
HOPPER = (9, 0)


def parsed(family: Family) -> int:
    """How many Python files of the package are installed. Raises FapError when one is gone or does not parse,
    or Python finds others.
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
    """The requirements of the installed package, declared or not, that this environment does not meet."""
    from packaging.requirements import Requirement

    from .missing import is_met

    wanted = [Requirement(line) for line in [*(metadata.requires(family.package) or ()), *family.undeclared]]
    return [str(r) for r in wanted if not is_met(r)]


def compile_one() -> float:
    """Compile a causal bf16 forward kernel without softmax for Hopper; returns the seconds of the import and
    the call.
    """
    os.environ.update(FOR_HOPPER)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    start = time.perf_counter()
    from flash_attn.cute import flash_attn_func

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a fake tensor is asked for its address
        shapes = [
            (smoke.BATCH, smoke.SEQLEN_Q, smoke.NHEADS, 128),
            *[(smoke.BATCH, smoke.SEQLEN_K, smoke.NHEADS_K, 128)] * 2,
        ]
        flash_attn_func(
            *[torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes],
            causal=True,
            use_softmax=False,
        )
    return time.perf_counter() - start


def report(family: Family) -> bool:
    """Print what was checked and what was not; returns whether all that was checked is right."""
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
        target = smoke.Target(
            "cuda",
            torch.cuda.get_device_name(),
            ("bfloat16", "float16"),
            module=family.code.replace("/", "."),
        )
        return smoke.report(target, family.package)
    print(
        f"smoke      {family.package} {metadata.version(family.package)}: {parsed(family)} Python files are "
        "installed and parse"
    )
    print(
        f"           a causal forward kernel without softmax compiles for Hopper in {compile_one():.1f} s; "
        "not run: no Hopper GPU here"
    )
    return True
