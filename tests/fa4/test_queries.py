"""Test that queries of a tile stay in registers where there are enough (nosoftmax/queries.py)."""

import re

import pytest

from fapatch.base.process import run
from fapatch.kernels import compile_check

pytestmark = pytest.mark.source
REGISTERS_FOR_Q = re.compile(r"HGMMA\.64x64x16\S* R\d+, R\d+, gdesc")
PRODUCTS_OF_Q = re.compile(r"HGMMA\.64x64x16")


def test_as_many_steps_as_registers(forked):
    kept = forked.run(
        """
import json
from types import SimpleNamespace
from flash_attn.cute.nosoftmax.queries import kept_steps
def kept(d, tile_m, tile_n, registers, d_v=0, **options):
    kernel = dict(no_softmax=True, use_block_sparsity=False, mma_pv_is_rs=True, num_mma_regs=registers)
    kernel.update(tile_hdim=d, tile_hdimv=d_v or d, tile_m=tile_m, tile_n=tile_n, **options)
    return kept_steps(SimpleNamespace(**kernel))
print(json.dumps([
    [kept(64, 64, 64, 136), kept(128, 64, 64, 208), kept(256, 128, 64, 240)],
    [kept(64, 192, 128, 160), kept(128, 128, 128, 240), kept(128, 128, 176, 240), kept(256, 128, 80, 240)],
    [kept(64, 64, 64, 208, 128), kept(128, 128, 128, 240, 256)],
    [kept(d, 128, 64, 240) for d in (48, 80, 96, 192, 208)],
    [kept(128, 64, 64, 208, no_softmax=None), kept(128, 64, 64, 208, use_block_sparsity=True),
     kept(128, 64, 64, 208, mma_pv_is_rs=False)],
]))
"""
    )
    assert kept == [[4, 8, 4], [0, 8, 0, 0], [4, 0], [0] * 5, [0] * 3]


@pytest.mark.slow
def test_the_machine_code_reads_them_there(compiler, trees, tmp_path):
    """The products of P have another shape at head size 128."""
    python, cuobjdump = compiler
    compile_check.compile_cases(python, trees[1], {"case": {"head_dim": 128, "causal": True}}, tmp_path / "c")
    listing = run(cuobjdump, "-sass", tmp_path / "c" / "case.fwd.cubin").stdout.decode()
    products = len(PRODUCTS_OF_Q.findall(listing))
    assert products >= 24
    assert len(REGISTERS_FOR_Q.findall(listing)) == products
