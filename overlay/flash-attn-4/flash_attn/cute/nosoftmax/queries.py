"""Keep queries of a tile in registers, for the product with its keys.

A matrix unit reads both operands of S = Q K^T from shared memory, where 64 rows of Q take as many cycles as
64 keys do. With the keys and values that arrive there, a tile of 64 x 64 needs 1.25 times the cycles of its
products by count, and 1.0 times with Q in registers. The products are the same, bit for bit. docs/fa4.md has
what it saves.
"""

from typing import Any, Callable, Optional

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90_utils_basic
from cutlass import Float32
from cutlass.cute.nvgpu import warpgroup
from quack import copy_utils

_HEAD_DIMS = (64, 128, 256)  # others were not timed, lie otherwise in shared memory, or spill registers
_STEP = 16  # head dimensions of one instruction
_STEPS_OF_ROW = 4  # in 128 bytes
_REGISTERS_OF_STEP = 4  # of a thread, for 64 rows of a warp group in 16 bits
_OTHER_REGISTERS = 40  # what a kernel needs beside Q, S, P and O


def kept_steps(kernel: Any) -> int:
    """Return how many steps of Q, from the first on, stay in registers: as many as there are for them, in
    whole rows of shared memory.
    """
    if kernel.no_softmax is None or kernel.use_block_sparsity or not kernel.mma_pv_is_rs:
        return 0
    if kernel.tile_hdim not in _HEAD_DIMS:
        return 0
    accumulated = kernel.tile_hdimv // 2 + kernel.tile_n // 2 + kernel.tile_n // 4  # O, S and P
    free = kernel.num_mma_regs - _OTHER_REGISTERS - accumulated
    fit = max(free // _REGISTERS_OF_STEP, 0)
    return min(fit - fit % _STEPS_OF_ROW, kernel.tile_hdim // _STEP)


def scores(
    kernel: Any, upstreams: Callable, tiled_mma: Any, group: int, sQ: cute.Tensor, tSrQ: cute.Tensor,
    tSrK: cute.Tensor, tidx: Any,
) -> tuple[Callable, Callable]:  # fmt: skip
    """Return the function that multiplies Q by a block of keys, with the arguments of upstream's, and one to
    call when Q has arrived. group: the first thread of the warp group.
    """
    kept, steps = kept_steps(kernel), kernel.tile_hdim // _STEP
    if kept == 0:
        return upstreams, lambda: None
    from_registers = sm90_utils_basic.make_trivial_tiled_mma(
        kernel.dtype,
        kernel.dtype,
        warpgroup.OperandMajorMode.K,
        warpgroup.OperandMajorMode.K,
        Float32,
        atom_layout_mnk=(kernel.tile_m // 64, 1, 1),
        tiler_mn=(64, kernel.tile_n),
        a_source=warpgroup.OperandSource.RMEM,
    )
    of_group = from_registers.get_slice(group)
    rQ = of_group.make_fragment_A(of_group.partition_shape_A((kernel.tile_m, kept * _STEP)))
    load = cute.make_tiled_copy_A(copy_utils.get_smem_load_atom(kernel.dtype, False), from_registers)
    thread_load = load.get_slice(tidx)
    source, target = thread_load.partition_S(sQ), thread_load.retile(rQ)

    def keep() -> None:
        for k in range(kept):
            cute.copy(load, source[None, None, k], target[None, None, k])

    def multiply(B_idx: Optional[Any] = None, wg_wait: int = -1) -> cute.Tensor:
        acc = cute.make_rmem_tensor(tiled_mma.partition_shape_C((kernel.tile_m, kernel.tile_n)), Float32)
        keys = tSrK[None, None, None, B_idx]
        warpgroup.fence()
        for k in range(steps):
            mma, queries = (from_registers, rQ) if k < kept else (tiled_mma, tSrQ)
            atom = cute.make_mma_atom(mma.op)
            atom.set(warpgroup.Field.ACCUMULATE, k > 0)
            cute.gemm(atom, acc, queries[None, None, k], keys[None, None, k], acc)
        warpgroup.commit_group()
        if wg_wait >= 0:
            warpgroup.wait_group(wg_wait)
        return acc

    return multiply, keep
