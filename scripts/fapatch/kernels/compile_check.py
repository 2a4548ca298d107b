"""Compile the kernels of flash-attn-4 for Hopper, without a GPU, and check their machine code.

Without softmax, a kernel must have no exponential and no tanh instruction where f needs none, and spill no
more than the table ALLOWED_SPILLS says. The number of registers is printed. With softmax, the machine code
must equal that of pristine upstream.

Without options a small set is compiled. FULL=1 compiles every head size, dtype, activation, mask and layout.
--python names an interpreter with torch and nvidia-cutlass-dsl (default: the one of .venv). Exit code 0 if
all checks pass, else 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import workers
from ..base import env, git
from ..base.errors import FapError, UsageError
from ..base.process import CommandFailed, run
from ..base.project import Project
from ..series import apply, state
from ..wheel import build_copy, cuda_toolkit
from ..wheel.cuda_toolkit import Torch
from ..wheel.smoke import FOR_HOPPER
from .sass_identity import parse_listing

EXCLUSIVE = True
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
REGISTERS = re.compile(r"REG:(\d+)")
Cases = dict[str, dict[str, Any]]

# Backward kernels that may spill: (activation, head size of the tile) -> instructions. Their loops are not
# bound by these spills. P and dS share one tanh, which stays in registers beside the score.
ALLOWED_SPILLS = {
    ("silu", 64): 64,
    ("sigmoid", 64): 64,
    ("gelu", 64): 64,
    ("softplus", 64): 64,
    ("identity", 256): 2,
}
# How many more a backward with a factor for each row may have, or with a decay, by head size of the tile.
SPILLS_BY_ROW = {64: 36, 128: 8}
SPILLS_WITH_DECAY = {64: 4}
# And with a mask. Blocks that their rows see whole run without it.
SPILLS_WITH_HSTU = {64: 84, 96: 4, 128: 44, 192: 6}
SPILLS_WITH_INTERVALS = {64: 336, 96: 88, 128: 152, 192: 4}
# And with a diagonal, where the window is a mask too. The forward spills at 64 with a decay, and at 96 with
# "1/visible", whose keys it counts.
SPILLS_WITH_DIAGONAL = {64: 72, 128: 4, 192: 8}
FORWARD_SPILLS_WITH_DIAGONAL = {64: 24, 96: 4}
# Forward kernels that may spill: four registers in a loop of 720 instructions, and biases of the heads of a
# packed group.
ALLOWED_FORWARD_SPILLS = {("gelu", 256): 8, ("sigmoid", 96): 12}
TILE_HEAD_DIMS = (64, 96, 128, 192, 256)
# Masks flash_attn.masks.HSTU: the smallest, and one with every part.
TARGETS = {"targets": "sequence"}
EVERY_PART = {"targets": "sequence", "contexts": "sequence", "window": True, "full": True, "group": True}


def _named(cases: list[dict[str, Any]]) -> Cases:
    def name(case: dict[str, Any]) -> str:
        return "-".join(f"{k}_{v}" for k, v in case.items()).translate(
            str.maketrans({**dict.fromkeys(" ()/{}'"), ",": "_", ":": "_"})
        )

    return {name(case): case for case in cases}


SMALL = _named(
    [
        {"head_dim": 64},
        {"head_dim": 128, "activation": "relu", "causal": True, "dtype": "float16"},
        {
            "head_dim": 128,
            "activation": "silu",
            "causal": True,
            "group": 2,
            "varlen": True,
            "normalization": "1/visible",
        },
        {"head_dim": 64, "activation": "relu2", "window": (64, 0), "seqused": True},
        {"head_dim": 128, "activation": "sigmoid", "page_size": 64},
        {"head_dim": 64, "activation": "gelu", "causal": True, "dtype": "float16"},
        {"head_dim": 128, "activation": "softplus"},
        {"head_dim": 64, "normalization": "number"},
        {"head_dim": 64, "activation": "silu", "normalization": "row", "causal": True},
        {
            "head_dim": 128,
            "activation": "sigmoid",
            "bias": "by head",
            "causal": True,
            "group": 2,
            "varlen": True,
            "normalization": "row",
            "dtype": "float16",
        },
        {"head_dim": 128, "normalization": "sequence", "page_size": 64, "group": 4},
        {"head_dim": 64, "causal": True, "decay": True},
        {
            "head_dim": 128,
            "activation": "sigmoid",
            "bias": "by head",
            "group": 2,
            "varlen": True,
            "normalization": "row",
            "decay": True,
        },
        {"head_dim": 64, "activation": "silu", "varlen": True, "normalization": "number", "hstu": TARGETS},
        {
            "head_dim": 128,
            "activation": "silu",
            "varlen": True,
            "normalization": "number",
            "hstu": EVERY_PART,
        },
        {
            "head_dim": 128,
            "activation": "silu",
            "group": 2,
            "varlen": True,
            "normalization": "1/visible",
            "hstu": EVERY_PART,
        },
        {
            "head_dim": 64,
            "activation": "relu",
            "dtype": "float16",
            "group": 2,
            "deterministic": True,
            "hstu": {"targets": "number", "contexts": "number", "window": True},
        },
        {"head_dim": 128, "activation": "sigmoid", "page_size": 64, "hstu": TARGETS},
        {"head_dim": 128, "activation": "silu", "varlen": True, "normalization": "1/visible", "intervals": 2},
        {"head_dim": 64, "intervals": 3, "deterministic": True, "group": 2},
        {
            "head_dim": 64,
            "activation": "silu",
            "causal": True,
            "dtype": "float16",
            "diagonal": True,
            "wide": True,
        },
        {
            "head_dim": 128,
            "activation": "silu",
            "window": (100, 20),
            "group": 2,
            "varlen": True,
            "normalization": "1/visible",
            "diagonal": True,
            "wide": True,
        },
        {"head_dim": 192, "decay": True, "deterministic": True, "diagonal": True, "wide": True},
        {"head_dim": 128, "activation": "silu", "varlen": True, "hstu": TARGETS, "diagonal": True},
        {"head_dim": 64, "activation": "relu", "causal": True, "page_size": 64, "wide": True},
        {"head_dim": 256, "activation": "silu", "causal": True},
        {
            "head_dim": 256,
            "activation": "silu",
            "varlen": True,
            "hstu": {"targets": "sequence", "contexts": "number"},
        },
        # Sequences that are long enough for large tiles, and lengths that differ too much for the grid.
        {"head_dim": 128, "activation": "silu", "causal": True, "varlen": True, "seqlen": 5000},
        {"head_dim": 128, "activation": "silu", "varlen": True, "longest": 3000, "hstu": EVERY_PART},
        {"head_dim": 64, "activation": "silu", "varlen": True, "seqlen": 5000, "hstu": EVERY_PART},
        {
            "head_dim": 64,
            "activation": "silu",
            "causal": True,
            "dtype": "float16",
            "diagonal": True,
            "wide": True,
            "seqlen": 5000,
        },
    ]
)
SMALL_SOFTMAX = _named(
    [{"softmax": True, "head_dim": 64}, {"softmax": True, "head_dim": 128, "causal": True, "varlen": True}]
)


def full() -> tuple[Cases, Cases]:
    """Return (every configuration without softmax, every configuration with softmax)."""
    activations = ("identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus")
    cases = [
        {"head_dim": d, "activation": a, "dtype": t, "causal": c}
        for d, a, t, c in itertools.product(
            (64, 96, 128, 192, 256), activations, ("bfloat16", "float16"), (False, True)
        )
    ]
    cases += [
        {"head_dim": d, "activation": a, "window": (100, 20)}
        for d, a in itertools.product((64, 128, 256), activations)
    ]
    cases += [
        {"head_dim": d, "varlen": True, "causal": c, "group": g}
        for d, c, g in itertools.product((64, 128, 256), (False, True), (1, 4))
    ]
    cases += [
        {"head_dim": d, "activation": "silu", "causal": True}
        for d in range(8, 257, 8)
        if d not in (64, 96, 128, 192, 256)
    ]
    cases += [{"head_dim": d, "head_dim_v": v, "causal": True} for d, v in ((128, 64), (192, 128), (256, 64))]
    cases += [
        {"head_dim": d, "head_dim_v": v, "causal": c, "activation": a}
        for (d, v), c, a in itertools.product(
            ((64, 96), (64, 128), (96, 128), (40, 72)), (False, True), ("identity", "silu")
        )
    ]
    cases += [
        {"head_dim": 128, "normalization": n, "causal": c, "activation": a}
        for n, c, a in itertools.product(
            ("1/n", "1/sqrt(n)", "1/visible", "number", "sequence", "row"),
            (False, True),
            ("identity", "silu"),
        )
        if c or n != "1/visible"
    ]  # without a mask, "1/visible" is launched as "1/n"
    cases += [
        {"head_dim": d, "page_size": p, "group": g}
        for d, p, g in itertools.product((64, 128), (16, 64, 128), (1, 4))
    ]
    cases += [{"head_dim": 128, "activation": a, "softcap": 20.0} for a in activations]
    cases += [
        {"head_dim": 128, "activation": "sigmoid", "bias": b, "causal": True}
        for b in (None, -5.0, 1.0, "by head")
    ]
    cases += [
        {
            "head_dim": d,
            "activation": "sigmoid",
            "bias": "by head",
            "group": 4,
            "varlen": v,
            "normalization": "row",
        }
        for d, v in itertools.product((64, 96, 192, 256), (False, True))
    ]
    cases += [{"head_dim": 128, "activation": "silu", "seqused": True, "varlen": v} for v in (False, True)]
    cases += [
        {"head_dim": d, "activation": a, "causal": c, "decay": True}
        for d, a, c in itertools.product((64, 128, 192, 256), ("identity", "silu"), (False, True))
    ]
    cases += [
        {"head_dim": d, "activation": a, "varlen": True, "normalization": n, "hstu": m}
        for d, a, n, m in itertools.product(
            (64, 96, 128, 192, 256), ("identity", "silu"), ("number", "1/visible"), (TARGETS, EVERY_PART)
        )
    ]
    cases += [
        {"head_dim": d, "activation": a, "deterministic": True, "hstu": EVERY_PART}
        for d, a in itertools.product((64, 128, 256), activations)
    ]
    cases += [
        {"head_dim": d, "activation": a, "varlen": True, "normalization": n, "intervals": 2}
        for d, a, n in itertools.product(
            (64, 96, 128, 192, 256), ("identity", "silu"), ("number", "1/visible")
        )
    ]
    cases += [
        {
            "head_dim": d,
            "activation": a,
            "window": w,
            "normalization": n,
            "varlen": w[0] is None,
            "diagonal": True,
            "wide": g,
            "group": 1 + g,
        }
        for d, a, w, n, g in itertools.product(
            (64, 96, 128, 192, 256),
            ("identity", "silu"),
            ((None, 0), (100, 20)),
            ("number", "1/visible"),
            (False, True),
        )
    ]
    cases += [
        {"head_dim": d, "head_dim_v": v, "causal": True, "wide": True}
        for d, v in ((40, 72), (64, 64), (96, 96), (128, 64), (192, 128), (192, 192), (256, 256))
    ]
    cases += [
        {"head_dim": d, "activation": "silu", "causal": c, "varlen": v, "group": 1 + v, **more}
        for d, c, v, more in itertools.product(
            (64, 96, 128, 256), (False, True), (False, True), ({"seqlen": 9000}, {"longest": 3000})
        )
    ]
    softmax = [
        {"softmax": True, "head_dim": d, "causal": c, "varlen": v}
        for d, c, v in itertools.product((64, 96, 128, 192, 256), (False, True), (False, True))
    ]
    softmax += [
        {"softmax": True, "head_dim": 128, "window": (100, 20)},
        {"softmax": True, "head_dim": 128, "softcap": 20.0},
        {"softmax": True, "head_dim": 128, "group": 4},
        {"softmax": True, "head_dim": 128, "page_size": 64},
    ]
    return _named(cases), _named(softmax)


@dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel: how often each instruction occurs in it, and its registers."""

    instructions: Mapping[str, int]
    registers: int

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    @property
    def spills(self) -> int:
        return self.count("LDL") + self.count("STL")


def read(cubin: Path, cuobjdump: Path) -> Kernel:
    listing = run(cuobjdump, "-sass", cubin).stdout.decode()
    usage = run(cuobjdump, "-res-usage", cubin)
    registers = REGISTERS.search((usage.stdout + usage.stderr).decode())
    return Kernel(Counter(INSTRUCTION.findall(listing)), int(registers[1]) if registers else 0)


def allowed_spills(case: Mapping[str, Any], backward: bool) -> int:
    """The number of instructions of the kernel that may spill registers."""
    table = ALLOWED_SPILLS if backward else ALLOWED_FORWARD_SPILLS
    size = next(size for size in TILE_HEAD_DIMS if case["head_dim"] <= size)
    allowed = table.get((case.get("activation", "identity"), size), 0)
    if backward and case.get("normalization") in ("row", "1/visible"):
        allowed += SPILLS_BY_ROW.get(size, 0)
    if backward and case.get("decay"):
        allowed += SPILLS_WITH_DECAY.get(size, 0)
    if backward and case.get("hstu"):
        allowed += SPILLS_WITH_HSTU.get(size, 0)
    if backward and case.get("intervals"):
        allowed += SPILLS_WITH_INTERVALS.get(size, 0)
    if case.get("diagonal"):
        more = SPILLS_WITH_DIAGONAL if backward else FORWARD_SPILLS_WITH_DIAGONAL
        allowed += more.get(size, 0)
    return allowed


def faults(case: Mapping[str, Any], kernel: Kernel, backward: bool = False) -> list[str]:
    """List the faults of a kernel without softmax."""
    activation = case.get("activation", "identity")
    wrong = []
    bias = case.get("bias", 0.0)
    small_sigmoid = activation == "sigmoid" and (not isinstance(bias, float) or bias < -2.0)
    exponential = small_sigmoid or activation in ("gelu", "softplus") or case.get("decay")
    if not exponential and kernel.count("MUFU.EX2"):
        wrong.append(f"{kernel.count('MUFU.EX2')} MUFU.EX2, and {activation} needs none")
    if (
        activation in ("identity", "relu", "relu2", "gelu", "softplus")
        and not case.get("softcap")
        and kernel.count("MUFU.TANH")
    ):
        wrong.append(f"{kernel.count('MUFU.TANH')} MUFU.TANH, and {activation} needs none")
    allowed = allowed_spills(case, backward)
    if kernel.spills > allowed:
        wrong.append(f"{kernel.spills} instructions spill registers, at most {allowed} may")
    if not kernel.count("HGMMA"):
        wrong.append("no HGMMA: that is no attention kernel")
    return wrong


def compile_cases(python: Path, tree: Path, cases: Cases, folder: Path) -> None:
    """Write folder/<case>.<fwd|bwd>.cubin for each case. Raises FapError with the last line of the compiler's
    output.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    variables = {**FOR_HOPPER, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    worker = workers.HERE / "compile_worker.py"
    try:
        run(python, worker, folder, env=variables, stdin=json.dumps(cases).encode())
    except CommandFailed as e:
        said = e.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise FapError(
            f"a kernel of {tree} does not compile: {''.join(said)}", f"the interpreter is {python}"
        ) from e


def has_dsl(python: Path) -> bool:
    """Whether ``python`` has the packages that compile flash_attn.cute."""
    try:
        run(python, "-c", "import cutlass, quack, tvm_ffi, torch")
    except CommandFailed:
        return False
    return True


def check_kernels(python: Path, tree: Path, cases: Cases, folder: Path, cuobjdump: Path) -> bool:
    """Compile kernels without softmax and print a line for each; returns whether none has a fault."""
    compile_cases(python, tree, cases, folder)
    good = True
    for name, case in cases.items():
        for cubin in sorted(folder.glob(f"{name}.?wd.cubin")):
            kernel = read(cubin, cuobjdump)
            wrong = faults(case, kernel, backward=cubin.stem.endswith(".bwd"))
            good &= not wrong
            print(
                f"{cubin.stem:<72} {kernel.registers:3} registers {sum(kernel.instructions.values()):5} "
                f"instructions {kernel.spills:2} spills  {'; '.join(wrong) or 'ok'}",
                flush=True,
            )
    return good


def check_identity(
    python: Path, pristine: Path, patched: Path, cases: Cases, folder: Path, cuobjdump: Path
) -> bool:
    """Compile kernels with softmax in both trees; returns whether there are any and their machine code is the
    same.
    """
    for side, tree in (("pristine", pristine), ("patched", patched)):
        compile_cases(python, tree, cases, folder / side)
    cubins = sorted((folder / "pristine").glob("*.cubin"))
    good = bool(cubins)
    for cubin in cubins:
        # Compare without names: they hold addresses and counters of the run that traced the kernels.
        before, after = (
            sorted(parse_listing(run(cuobjdump, "-sass", path).stdout.decode()).values())
            for path in (cubin, folder / "patched" / cubin.name)
        )
        same = before == after and bool(before)
        good &= same
        print(f"{cubin.stem:<72} {'identical' if same else 'DIFFERENT'}", flush=True)
    return good


def importable(folder: Path) -> Path:
    """Make flash_attn in ``folder`` a package. This family leaves its __init__.py to FA2's wheel, and without
    it Python would import an installed flash_attn first.
    """
    (folder / "flash_attn" / "__init__.py").touch()
    return folder


def export(project: Project, tree: str, folder: Path) -> Path:
    """Write the Python files of ``tree``, in the store, to ``folder``, outside of git and ready to be
    imported.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in git.read_tree(tree, lambda path: path.endswith(".py"), repo=project.store):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return importable(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full",
        action="store_true",
        default=os.environ.get("FULL") == "1",
        help="compile every configuration (FULL=1)",
    )
    parser.add_argument(
        "--python",
        type=Path,
        help="an interpreter with torch and nvidia-cutlass-dsl (default: the one of .venv)",
    )


def main(project: Project, args: argparse.Namespace) -> int:
    if project.family.smoke != "compile":
        raise UsageError(
            f"the kernels of FAMILY={project.family.name} are compiled by nvcc",
            "FAMILY=flash-attn-4 fap.py compile-check",
        )
    python = args.python or env.venv_python(project.venv)
    if not has_dsl(python):
        raise FapError(
            f"{python} has no nvidia-cutlass-dsl, with which flash_attn.cute is compiled",
            f"make toolchain FAMILY={project.family.name}",
        )
    cuobjdump = cuda_toolkit.find_program("cuobjdump", project.venv, Torch.of(python), None)
    if cuobjdump is None:
        raise FapError(
            "cuobjdump, which reads the machine code, is not installed",
            ".venv/bin/pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
        )
    tree = apply.ensure(project)
    folder = project.build / "compile-check" / project.release.version
    pristine, patched = (
        export(project, id, folder / name)
        for name, id in (
            ("upstream", state.read(project).base_tree),
            ("patched", build_copy.verified(project, tree).tree),
        )
    )
    cases, softmax = full() if args.full else (SMALL, SMALL_SOFTMAX)
    good = check_kernels(python, patched, cases, folder / "without-softmax", cuobjdump)
    good &= check_identity(python, pristine, patched, softmax, folder / "with-softmax", cuobjdump)
    return 0 if good else 1
