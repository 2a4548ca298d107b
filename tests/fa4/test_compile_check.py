"""Test that the kernels compile for Hopper without a GPU, and that the check of their machine code finds
faults.
"""

import json
import struct
import subprocess
from collections import Counter

import pytest

from fapatch.kernels import compile_check
from fapatch.kernels.compile_check import Kernel
from fapatch.wheel.smoke import FOR_HOPPER
from fapatch.workers import compile_worker


@pytest.mark.slow
@pytest.mark.source
def test_kernels_without_softmax(compiler, trees, tmp_path):
    python, cuobjdump = compiler
    assert compile_check.check_kernels(python, trees[1], compile_check.SMALL, tmp_path, cuobjdump)


@pytest.mark.slow
@pytest.mark.source
def test_softmax_kernels_are_unchanged(compiler, trees, tmp_path):
    python, cuobjdump = compiler
    assert compile_check.check_identity(python, *trees, compile_check.SMALL_SOFTMAX, tmp_path, cuobjdump)


def said(python, tree, program, **variables):
    """Run a program that imports flash_attn.cute from a tree, and return the JSON that it prints."""
    environment = {**FOR_HOPPER, "PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.source
def test_mark_is_part_of_the_compile_key(forked):
    program = """
import json
from flash_attn.cute.nosoftmax.marker import NoSoftmax, marked, with_grid
from flash_attn.cute.nosoftmax.score_mods import of_activation
from flash_attn.cute.utils import hash_callable
def mod(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors): return score
keys = [hash_callable(mod), *(hash_callable(marked(mod, NoSoftmax(n))) for n in (None, "1/n"))]
keys += [hash_callable(of_activation(a, b, c, None, False).score_mod)
         for a, b, c in (("silu", 0.0, 0.0), ("silu", 0.0, 5.0), ("sigmoid", 0.0, 0.0), ("sigmoid", None,
             0.0), ("sigmoid", "by head", 0.0))]
keys += [hash_callable(of_activation("silu", 0.0, 0.0, n, decays).score_mod)
         for n in ("1/n", "number", "sequence", "row") for decays in (False, True)]
keys += [hash_callable(of_activation("silu", 0.0, 0.0, None, False, has_diagonal=True, window=w).score_mod)
         for w in ((False, False), (False, True), (True, False), (True, True), None)]
keys += [hash_callable(of_activation("relu", 0.0, 0.0, None, False, wide=w).score_mod) for w in (False, True)]
keys += [hash_callable(with_grid(of_activation("relu", 0.0, 0.0, None, False, wide=w).score_mod))
         for w in (False, True)]
print(json.dumps([len(keys), len(set(keys))]))
"""
    total, different = forked.run(program)
    assert total == different


@pytest.mark.source
@pytest.mark.slow
def test_cache_is_on_by_default(compiler, trees, tmp_path):
    program = (
        "import json; from flash_attn.cute.cache_utils import CUTE_DSL_CACHE_ENABLED as on; "
        "print(json.dumps(on))"
    )
    folder = {"FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(tmp_path)}
    assert said(compiler[0], trees[1], program, **folder, FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=None) is True
    assert said(compiler[0], trees[1], program, **folder, FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="0") is False


@pytest.mark.source
def test_what_the_compiler_says_of_every_kernel_is_kept_from_users(forked):
    """One warning of the compiler is hidden. Other warnings, and the same warning about another argument,
    appear.
    """
    program = """
import json, warnings
import flash_attn.cute.cache_utils
with warnings.catch_warnings(record=True) as caught:
    warnings.filters.remove(("ignore", None, Warning, None, 0))  # that of -W ignore
    for name in ("aux_data", "mQ"):
        warnings.warn(
            f"Argument {name} (position 17) cannot be converted to a JitArgument for function 'f'.", UserWarning
        )
print(json.dumps([str(w.message).split()[1] for w in caught]))
"""  # noqa: E501
    assert forked.run(program) == ["mQ"]


def kernel(**instructions: int) -> Kernel:
    return Kernel(
        Counter({"HGMMA.64x64x16.F32.BF16": 8, **{k.replace("_", "."): v for k, v in instructions.items()}}),
        168,
    )


def test_a_good_kernel_has_no_faults():
    assert compile_check.faults({"head_dim": 128}, kernel(FMUL=9)) == []
    assert compile_check.faults({"head_dim": 128, "activation": "silu"}, kernel(MUFU_TANH=64)) == []
    assert (
        compile_check.faults({"head_dim": 128, "activation": "sigmoid", "bias": None}, kernel(MUFU_EX2=64))
        == []
    )
    assert (
        compile_check.faults(
            {"head_dim": 128, "activation": "sigmoid", "bias": "by head"}, kernel(MUFU_EX2=64)
        )
        == []
    )
    assert compile_check.faults({"head_dim": 128, "activation": "gelu"}, kernel(MUFU_EX2=64)) == []
    assert compile_check.faults({"head_dim": 128, "decay": True}, kernel(MUFU_EX2=64)) == []


@pytest.mark.parametrize(
    "case, instructions, words",
    [
        ({}, {"MUFU_EX2": 64}, "MUFU.EX2"),
        ({"activation": "silu"}, {"MUFU_EX2": 64}, "MUFU.EX2"),
        ({"activation": "relu2"}, {"MUFU_TANH": 64}, "MUFU.TANH"),
        ({}, {"LDL": 1}, "spill"),
        ({"activation": "silu"}, {"STL_64": 1}, "spill"),
    ],
)
def test_faults(case, instructions, words):
    (fault,) = compile_check.faults({"head_dim": 128, **case}, kernel(**instructions))
    assert words in fault


@pytest.mark.parametrize(
    "case, most",
    [
        ({"head_dim": 128, "activation": "silu"}, 0),
        ({"head_dim": 232}, 2),
        ({"head_dim": 256, "activation": "silu"}, 0),
        ({"head_dim": 48, "activation": "silu"}, 64),
        ({"head_dim": 96, "activation": "silu"}, 0),
        ({"head_dim": 64}, 0),
        ({"head_dim": 64, "decay": True}, 4),
        ({"head_dim": 128, "decay": True}, 0),
        ({"head_dim": 128, "activation": "silu", "hstu": compile_check.TARGETS}, 44),
        ({"head_dim": 256, "activation": "silu", "hstu": compile_check.EVERY_PART}, 0),
        ({"head_dim": 128, "intervals": 2}, 152),
        ({"head_dim": 64, "activation": "silu", "diagonal": True, "normalization": "1/visible"}, 172),
    ],
)
def test_some_backward_kernels_may_spill(case, most):
    """A head size between two tiles has the limit of the next larger tile."""
    spilling = [kernel(LDL=n) for n in (most, most + 1)]
    assert [bool(compile_check.faults(case, k, backward=True)) for k in spilling] == [False, True]
    assert [bool(compile_check.faults(case, k)) for k in spilling] == [most > 0, True]


def test_one_forward_kernel_may_spill():
    case = {"head_dim": 256, "activation": "gelu"}
    spilling = [kernel(LDL=n) for n in (8, 9)]
    assert [bool(compile_check.faults(case, k)) for k in spilling] == [False, True]
    assert compile_check.faults({**case, "head_dim": 128}, kernel(LDL=1))


def test_what_is_no_attention_kernel_is_noticed():
    assert compile_check.faults({"head_dim": 128}, Kernel(Counter(FMUL=3), 32)) == [
        "no HGMMA: that is no attention kernel"
    ]


def elf(machine: int, body: bytes) -> bytes:
    """Make an ELF file with a valid header only, and one section header behind the body."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<H", header, 18, machine)
    struct.pack_into("<QQ", header, 32, 0, 64 + len(body))
    struct.pack_into("<4H", header, 54, 0, 0, 64, 1)
    return bytes(header) + body + bytes(64)


def test_cubins_are_cut_out_of_an_object_file():
    inner = elf(compile_worker.EM_CUDA, b"machine code")
    assert list(compile_worker.cubins(elf(62, b"host" + inner + b"more"))) == [inner]
    assert list(compile_worker.cubins(elf(62, b"host alone"))) == []
