"""Find the bounds of blocks under flash_attn.masks.Intervals: those of the rows of each block of queries, and
the blocks of queries that each block of keys meets.

One warp works on a block, so the host waits for nothing. Both tables are small: a few integers a block.
"""

from collections.abc import Sequence
from typing import Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, const_expr
from flash_attn.cute import utils
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.nosoftmax import plan
from flash_attn.cute.nosoftmax.ranges import clamped, first_slot, slots
from flash_attn.cute.nosoftmax.registers import Registers
from flash_attn.cute.testing import is_fake_mode
from quack.compile_utils import make_fake_tensor

_FAR = 2**30


class _Sequence:
    """The side of the queries or of the keys of one sequence."""

    def __init__(self, mCuSeqlens, mSeqused, batch_idx: Int32, static: Int32, tile: int) -> None:
        self.packed = mCuSeqlens is not None
        self.offset = mCuSeqlens[batch_idx] if self.packed else Int32(0)
        self.seqlen = mCuSeqlens[batch_idx + 1] - self.offset if self.packed else static
        if mSeqused is not None:
            self.seqlen = mSeqused[batch_idx]
        self.slot = first_slot(self.offset, batch_idx, self.seqlen, tile, self.packed)


class _Hulls:
    def __init__(self, k: int, tile_m: int) -> None:
        self.k, self.tile_m = k, tile_m

    @cute.jit
    def __call__(
        self,
        mStarts: cute.Tensor,
        mEnds: cute.Tensor,
        mHulls: cute.Tensor,
        mCuSeqlensQ: Optional[cute.Tensor],
        mCuSeqlensK: Optional[cute.Tensor],
        mSeqUsedK: Optional[cute.Tensor],
        seqlen_q: Int32,
        seqlen_k: Int32,
        blocks: Int32,
        batch: Int32,
        # Must be last: TVM FFI fills it in.
        stream: cuda.CUstream = None,
    ):
        self.kernel(
            mStarts, mEnds, mHulls, mCuSeqlensQ, mCuSeqlensK, mSeqUsedK, seqlen_q, seqlen_k, batch
        ).launch(grid=[blocks * batch, 1, 1], block=[cute.arch.WARP_SIZE * self.k, 1, 1], stream=stream)

    @cute.kernel
    def kernel(
        self,
        mStarts: cute.Tensor,
        mEnds: cute.Tensor,
        mHulls: cute.Tensor,
        mCuSeqlensQ: Optional[cute.Tensor],
        mCuSeqlensK: Optional[cute.Tensor],
        mSeqUsedK: Optional[cute.Tensor],
        seqlen_q: Int32,
        seqlen_k: Int32,
        batch: Int32,
    ):
        index, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        slot, lane = thread // cute.arch.WARP_SIZE, thread % cute.arch.WARP_SIZE
        m_block, batch_idx = index // batch, index % batch
        rows = _Sequence(mCuSeqlensQ, None, batch_idx, seqlen_q, self.tile_m)
        keys = _Sequence(mCuSeqlensK, mSeqUsedK, batch_idx, seqlen_k, 1)
        if const_expr(rows.packed):
            starts, ends = [cute.domain_offset((rows.offset, 0), x) for x in (mStarts, mEnds)]
        else:
            starts, ends = mStarts[batch_idx, None, None], mEnds[batch_idx, None, None]
        first, end, inner_first, inner_end = Int32(_FAR), Int32(0), Int32(0), Int32(_FAR)
        stop = cutlass.min((m_block + 1) * self.tile_m, rows.seqlen)
        for row in cutlass.range(m_block * self.tile_m + lane, stop, cute.arch.WARP_SIZE, unroll=1):
            start, behind = clamped(Registers, starts[row, slot], ends[row, slot], keys.seqlen)
            used = start < behind
            first = cutlass.min(first, Registers.where(used, start, _FAR))
            end = cutlass.max(end, Registers.where(used, behind, 0))
            inner_first = cutlass.max(inner_first, start)
            inner_end = cutlass.min(inner_end, Registers.where(used, behind, 0))
        first, inner_end = [utils.warp_reduce(x, cutlass.min) for x in (first, inner_end)]
        end, inner_first = [utils.warp_reduce(x, cutlass.max) for x in (end, inner_first)]
        if lane == 0 and m_block * self.tile_m < rows.seqlen:
            place = rows.slot + m_block
            mHulls[place, slot, 0] = first
            mHulls[place, slot, 1] = end
            mHulls[place, slot, 2] = inner_first
            mHulls[place, slot, 3] = inner_end


class _Visits:
    """ordered: every block of keys visits all queries, so that their turns are known."""

    def __init__(self, k: int, tile_m: int, tile_n: int, ordered: bool) -> None:
        self.k, self.tile_m, self.tile_n, self.ordered = k, tile_m, tile_n, ordered

    @cute.jit
    def __call__(
        self,
        mHulls: cute.Tensor,
        mVisits: cute.Tensor,
        mCuSeqlensQ: Optional[cute.Tensor],
        mCuSeqlensK: Optional[cute.Tensor],
        mSeqUsedK: Optional[cute.Tensor],
        seqlen_q: Int32,
        seqlen_k: Int32,
        blocks: Int32,
        batch: Int32,
        # Must be last: TVM FFI fills it in.
        stream: cuda.CUstream = None,
    ):
        self.kernel(mHulls, mVisits, mCuSeqlensQ, mCuSeqlensK, mSeqUsedK, seqlen_q, seqlen_k, batch).launch(
            grid=[blocks * batch, 1, 1], block=[cute.arch.WARP_SIZE, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mHulls: cute.Tensor,
        mVisits: cute.Tensor,
        mCuSeqlensQ: Optional[cute.Tensor],
        mCuSeqlensK: Optional[cute.Tensor],
        mSeqUsedK: Optional[cute.Tensor],
        seqlen_q: Int32,
        seqlen_k: Int32,
        batch: Int32,
    ):
        index, lane = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        n_block, batch_idx = index // batch, index % batch
        rows = _Sequence(mCuSeqlensQ, None, batch_idx, seqlen_q, self.tile_m)
        keys = _Sequence(mCuSeqlensK, mSeqUsedK, batch_idx, seqlen_k, self.tile_n)
        key = n_block * self.tile_n
        m_blocks = (rows.seqlen + (self.tile_m - 1)) // self.tile_m
        first, end = Int32(_FAR), Int32(0)
        if const_expr(self.ordered):
            first, end = Int32(0), m_blocks
        else:
            for m_block in cutlass.range(lane, m_blocks, cute.arch.WARP_SIZE, unroll=1):
                for slot in cutlass.range_constexpr(self.k):
                    place = rows.slot + m_block
                    # A hull that is empty begins far behind its end.
                    last = cutlass.min(mHulls[place, slot, 1], key + self.tile_n)
                    meets = cutlass.max(mHulls[place, slot, 0], key) < last
                    first = cutlass.min(first, Registers.where(meets, m_block, _FAR))
                    end = cutlass.max(end, Registers.where(meets, m_block + 1, 0))
            first = utils.warp_reduce(first, cutlass.min)
            end = utils.warp_reduce(end, cutlass.max)
        if lane == 0 and key < keys.seqlen:
            mVisits[keys.slot + n_block, 0] = cutlass.min(first, end)
            mVisits[keys.slot + n_block, 1] = end


def hulls(
    intervals: tuple[torch.Tensor, torch.Tensor],
    lengths: Sequence[Optional[torch.Tensor]],
    seqlens: tuple[int, int],
    batch: int,
    tile_m: int,
) -> torch.Tensor:
    """Return the ranges.Hull of each interval of each block of tile_m queries, int32 (blocks, k, 4).

    intervals: (starts, ends), (batch, seqlen_q, k) or packed (total_q, k); contiguous. lengths: cu_seqlens_q,
    cu_seqlens_k, seqused_k. seqlens: of queries and keys, of a batch or the longest packed ones.
    """
    starts, cu_seqlens_q = intervals[0], lengths[0]
    packed, k = cu_seqlens_q is not None, starts.shape[-1]
    table = plan.not_read(
        starts.new_empty(slots(batch, starts.shape[0] if packed else seqlens[0], tile_m, packed), k, 4)
    )
    _run(
        hulls.compile_cache, _Hulls, (k, tile_m), (*intervals, table), lengths, *seqlens,
        -(-seqlens[0] // tile_m), batch,
    )  # fmt: skip
    return table


def visits(
    table: torch.Tensor,
    lengths: Sequence[Optional[torch.Tensor]],
    seqlens: tuple[int, int],
    batch: int,
    total_k: int,
    tile: tuple[int, int],
    ordered: bool,
) -> torch.Tensor:
    """Return the range of blocks of queries that each block of keys visits, int32 (blocks, 2).

    table: what hulls returned for the same tile. The rest is as there. total_k: the keys of all sequences.
    """
    packed = lengths[1] is not None
    blocks = slots(batch, total_k if packed else seqlens[1], tile[1], packed)
    out = plan.not_read(table.new_empty(blocks, 2))
    _run(
        visits.compile_cache, _Visits, (table.shape[1], *tile, ordered), (table, out), lengths, *seqlens,
        -(-seqlens[1] // tile[1]), batch,
    )  # fmt: skip
    return out


hulls.compile_cache = get_jit_cache("nosoftmax_hulls")
visits.compile_cache = get_jit_cache("nosoftmax_visits")


def _run(cache, kernel: type, constants: tuple, tables: tuple, lengths: tuple, *numbers: int) -> None:
    key = *constants, *(x.dim() for x in tables), *(x is not None for x in lengths)
    if key not in cache:
        cache[key] = _compile(kernel(*constants), tables, lengths)
    if not is_fake_mode():
        cache[key](*tables, *lengths, *numbers)


def _compile(kernel, tables: tuple, lengths: tuple):
    def integers(dims: int):
        return make_fake_tensor(Int32, tuple(cute.sym_int() for _ in range(dims)))

    return cute.compile(
        kernel,
        *(integers(x.dim()) for x in tables),
        *(None if x is None else integers(1) for x in lengths),
        *[Int32(1)] * 4,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )
