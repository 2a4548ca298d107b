"""Implement flash_attn.masks, and the window of a call with a diagonal, in upstream's Hopper kernels, with
the ranges of ranges.py.

A tile visits the blocks of a ranges' keys or queries. Upstream's loops count an index from 0, which
`BlockInfo` bounds here, and `key_blocks` and `query_block` turn it into the block that is loaded and masked.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Callable, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from flash_attn.cute import block_info, mask, seqlen_info
from flash_attn.cute.nosoftmax.marker import BY_NUMBER, NoSoftmax, WindowKind
from flash_attn.cute.nosoftmax.ranges import (
    Blocks,
    HSTURanges,
    Hull,
    IntervalRanges,
    WindowRanges,
    first_slot,
    hides_from,
)
from flash_attn.cute.nosoftmax.registers import Registers
from quack import layout_utils


def hides(mark: Optional[NoSoftmax]) -> bool:
    """Whether there is a mask beside upstream's causal and window_size."""
    return mark is not None and (mark.hstu is not None or mark.intervals > 0 or mark.window is not None)


# ---- Upstream's classes, with the mask ----


@dataclass(frozen=True)
class SeqlenInfo(seqlen_info.SeqlenInfoQK):
    ranges: Any = None  # HSTURanges, IntervalRanges or WindowRanges
    diagonal: Any = None  # the key that query 0 is aligned with, if given


def seqlens(mark: Optional[NoSoftmax], create: Callable, aux_data: Any, tile: tuple[int, int]) -> Callable:
    """Return the function that describes sequence batch_idx: create, or one that adds the ranges of the mask.
    tile: (queries, keys).
    """
    return partial(_with_ranges, mark, create, aux_data, tile) if hides(mark) else create


def _with_ranges(
    mark: NoSoftmax, create: Callable, aux_data: Any, tile: tuple, batch_idx: Int32
) -> SeqlenInfo:
    # As in kernel.normalization; elsewhere than in the backward this waits for nothing.
    cute.arch.griddepcontrol_wait()
    plain, tensors, diagonal = create(batch_idx), aux_data.tensors, None
    if mark.has_diagonal:
        diagonal, tensors = Int32(tensors[0][batch_idx]), tensors[1:]
    if mark.window is not None:
        ranges = _window(mark.window, plain, aux_data.scalars, diagonal)
    elif mark.hstu is None:
        ranges = _intervals(mark.intervals, plain, tensors, tile, batch_idx)
    else:
        ranges = _hstu(mark, plain, tensors, aux_data.scalars, batch_idx, diagonal)
    of_plain = {x.name: getattr(plain, x.name) for x in fields(plain)}
    return SeqlenInfo(**of_plain, ranges=ranges, diagonal=diagonal)


def position(seqlen: seqlen_info.SeqlenInfoQK, row: Int32) -> Int32:
    """Return the key that query `row` is aligned with."""
    diagonal = getattr(seqlen, "diagonal", None)
    return row + seqlen.seqlen_k - seqlen.seqlen_q if diagonal is None else row + diagonal


def _window(kind: WindowKind, seqlen: Any, scalars: Any, diagonal: Int32) -> WindowRanges:
    numbers = iter(scalars or ())
    left, right = (Int32(next(numbers)) if limited else None for limited in kind)
    return WindowRanges(Registers, seqlen.seqlen_q, seqlen.seqlen_k, diagonal, left, right)


def _hstu(
    mark: NoSoftmax, seqlen: Any, tensors: Any, scalars: Any, batch_idx: Int32, diagonal: Optional[Int32]
) -> HSTURanges:
    tensors, scalars = iter(tensors or ()), iter(scalars or ())
    numbers = {
        name: Int32(next(scalars) if given in (True, BY_NUMBER) else next(tensors)[batch_idx])
        for name, given in mark.hstu._asdict().items()
        if given
    }
    return HSTURanges.of(Registers, mark.hstu, seqlen.seqlen_q, seqlen.seqlen_k, numbers, diagonal)


def _intervals(k: int, seqlen: Any, tensors: Any, tile: tuple, batch_idx: Int32) -> IntervalRanges:
    """tensors: starts, ends, and of hulls.py the hulls and, in the backward, the visits."""
    starts, ends = (
        cute.domain_offset((seqlen.offset_q, 0), x) if seqlen.has_cu_seqlens_q else x[batch_idx, None, None]
        for x in tensors[:2]
    )
    slot_q = first_slot(seqlen.offset_q, batch_idx, seqlen.seqlen_q, tile[0], seqlen.has_cu_seqlens_q)
    slot_k = first_slot(seqlen.offset_k, batch_idx, seqlen.seqlen_k, tile[1], seqlen.has_cu_seqlens_k)
    return IntervalRanges(
        Registers,
        seqlen.seqlen_q,
        seqlen.seqlen_k,
        of_query=lambda query: [(starts[query, i], ends[query, i]) for i in range(k)],
        hulls=lambda m_block: [
            Hull(*(tensors[2][slot_q + m_block, i, j] for j in range(len(Hull._fields)))) for i in range(k)
        ],
        visits=lambda n_block: tuple(tensors[3][slot_k + n_block, j] for j in range(2)),
    )


@dataclass(frozen=True)
class BlockInfo(block_info.BlockInfo):
    """Bounds the indices of the blocks that a tile visits, in the place of the blocks themselves."""

    def keys(self, seqlen: SeqlenInfo, m_block: Int32) -> Blocks:
        return seqlen.ranges.keys(m_block, self.tile_m, self.tile_n)

    def queries(self, seqlen: SeqlenInfo, n_block: Int32) -> Blocks:
        return seqlen.ranges.queries(n_block, self.tile_m, self.tile_n)

    def get_n_block_min_max(self, seqlen: SeqlenInfo, m_block: Int32) -> tuple:
        return 0, self.keys(seqlen, m_block).count

    def get_n_block_min_causal_local_mask(self, seqlen: SeqlenInfo, m_block: Int32, n_block_min) -> Int32:
        """Return where the blocks begin that need the mask. The forward counts down."""
        return self.keys(seqlen, m_block).split

    def get_m_block_min_max(self, seqlen: SeqlenInfo, n_block: Int32) -> tuple:
        return 0, self.queries(seqlen, n_block).count


def block_info_class(mark: Optional[NoSoftmax]) -> type:
    return BlockInfo if hides(mark) else block_info.BlockInfo


def attention_mask_class(mark: Optional[NoSoftmax]) -> type:
    return AttentionMask if hides(mark) else mask.AttentionMask


@dataclass(frozen=True)
class AttentionMask(mask.AttentionMask):
    def apply_mask(
        self, acc_S: cute.Tensor, m_block: Int32, n_block: Int32, thr_mma: cute.ThrMma, **upstreams: Any
    ) -> None:
        """Write mask_value into what a tile of S hides. A thread owns few of its rows or, transposed, of its
        keys: it finds what each of them shows, as bits over the other side.
        """
        ranges, swap = self.seqlen_info.ranges, self.swap_AB
        if swap and isinstance(ranges, IntervalRanges):
            shown = ranges.shows_all(m_block, n_block, self.tile_n)
            _hide_transposed(self, acc_S, m_block, n_block, thr_mma, shown)
            return
        shape = (self.tile_n, self.tile_m) if swap else (self.tile_m, self.tile_n)
        acc, places, constants = (
            layout_utils.reshape_acc_to_mn(x, transpose=swap)
            for x in (
                acc_S,
                thr_mma.partition_C(cute.make_identity_tensor(shape)),
                thr_mma.get_slice(0).partition_C(cute.make_identity_tensor(shape)),
            )
        )
        # Of a place, (row, key), or (key, row) if transposed, [0] is on the thread's own side.
        first_row = m_block * self.tile_m + ranges.offset
        first_key = n_block * self.tile_n
        count, others = acc.shape[swap], acc.shape[1 - swap]
        if swap:
            own, other, first_own, first_other = (lambda i, j: (j, i)), ranges.of_key, first_key, first_row
        else:
            own, other, first_own, first_other = (lambda i, j: (i, j)), ranges.of_row, first_row, first_key
        for j in range(cute.size(others)):
            assert constants[own(0, j)][1] == j // 2 * 8 + j % 2, "the bits are of other columns"
        for i in range(cute.size(count)):
            position = places[own(i, 0)][0] + first_own
            shift = first_other + places[own(0, 0)][1]
            bounds = [
                tuple(mask.sm90_col_to_r2p_idx(Int32(x) - shift) for x in shown) for shown in other(position)
            ]
            mask.mask_r2p_lambda(
                acc[own(i, None)], partial(_shown, bounds), rank1=True, mask_value=self.mask_value
            )

    def m_block_interior(self, n_block: Int32) -> Int32:
        """Return the index of the first block of queries that needs no mask."""
        return self.seqlen_info.ranges.queries(n_block, self.tile_m, self.tile_n).split


@cute.jit
def _hide_transposed(
    mask: AttentionMask,
    acc_S: cute.Tensor,
    m_block: Int32,
    n_block: Int32,
    thr_mma: cute.ThrMma,
    shown: Int32,
):
    """Do the same for a transposed tile whose queries alone say what they see: each of them for all keys of
    the thread. shown: not 0 if the tile hides nothing.
    """
    if shown == 0:
        _hide_by_query(mask, acc_S, m_block, n_block, thr_mma)


def _hide_by_query(mask: AttentionMask, acc_S: cute.Tensor, m_block, n_block, thr_mma: cute.ThrMma) -> None:
    ranges = mask.seqlen_info.ranges
    acc, places = (
        layout_utils.reshape_acc_to_mn(x, transpose=True)
        for x in (acc_S, thr_mma.partition_C(cute.make_identity_tensor((mask.tile_n, mask.tile_m))))
    )
    for r in range(cute.size(acc.shape[0])):
        seen = ranges.of_row(places[r, 0][1] + m_block * mask.tile_m + ranges.offset)
        for c in range(cute.size(acc.shape[1])):
            key = places[0, c][0] + n_block * mask.tile_n
            visible = Int32(0)
            for first, end in seen:
                visible = Registers.where(key >= first, Registers.where(key < end, 1, visible), visible)
            acc[r, c] = Float32(
                cutlass.select_(
                    Boolean(visible != 0).ir_value(),
                    acc[r, c].ir_value(),
                    Float32(mask.mask_value).ir_value(),
                )
            )


def _shown(bounds: list, chunk: int) -> Any:
    """Return the bits of the elements of a chunk that lie in any of the ranges."""
    shown = None
    for first, end in bounds:
        bits = mask.r2p_bitmask_below(end, chunk) & mask.r2p_bitmask_above(first, chunk)
        shown = bits if shown is None else shown | bits
    return shown


# ---- From an index to a block ----


def key_block(mark: Optional[NoSoftmax], blocks: Any, seqlen: Any, m_block: Int32) -> Callable:
    """Return the function that turns an index of the forward's loops into a block of keys."""
    return blocks.keys(seqlen, m_block).physical if hides(mark) else _same


def query_block(mark: Optional[NoSoftmax], blocks: Any, seqlen: Any, n_block: Int32) -> Callable:
    """Return the function that turns an index of the backward's loops into a block of queries."""
    return blocks.queries(seqlen, n_block).physical if hides(mark) else _same


def _same(block: Any) -> Any:
    return block


def at_blocks(block: Callable, *functions: Callable, name: Optional[str] = None) -> list[Callable]:
    """Return functions that take an index in the place of the block that is their argument `name`, or their
    first."""

    def at(function: Callable) -> Callable:
        def visit(*args, **kwargs):
            if name is None:
                return function(block(args[0]), *args[1:], **kwargs)
            return function(*args, **{**kwargs, name: block(kwargs[name])})

        return visit

    return list(functions) if block is _same else [at(function) for function in functions]


# ---- Where a warp group begins ----

_ROWS = 64  # of a tile, of a warp group


def skip_unseen(
    kernel: Any, seqlen: SeqlenInfo, blocks: BlockInfo, m_block: Int32, warp_group: Int32, n_block_min: Int32,
    n_block_max: Int32, pipeline_k: Any, pipeline_v: Any, state: Any,
) -> tuple:  # fmt: skip
    """Return (state of the pipelines, n_block_max) of a warp group of the forward, whose rows are a part of
    its tile's. If they see nothing of the block of keys that the tile visits first, it begins with the next
    one, and if they are behind the sequence, with the last one. So warp groups must not wait for each other.
    """
    mark, alone = kernel.no_softmax, kernel.tile_m == _ROWS
    if mark is None or alone or kernel.use_scheduler_barrier:
        return state, n_block_max
    if kernel.pack_gqa or kernel.use_block_sparsity or not kernel.use_tma_KV:
        return state, n_block_max
    row, count = m_block * kernel.tile_m + warp_group * _ROWS, n_block_max - n_block_min
    skipped = Int32(0)
    if mark.hstu is not None or kernel.is_causal and not hides(mark):
        first = position(seqlen, row)
        last = first + (_ROWS - 1)
        key = key_block(mark, blocks, seqlen, m_block)(n_block_max - 1) * kernel.tile_n
        hidden = hides_from(key, last) if mark.hstu is None else seqlen.ranges.hides_from(key, first, last)
        skipped = Registers.where(hidden & (count > 1), 1, 0)
    skipped = Registers.where(row >= seqlen.seqlen_q, count - 1, skipped)
    return _skip(skipped, pipeline_k, pipeline_v, state), n_block_max - cutlass.max(skipped, 0)


@cute.jit
def _skip(count: Int32, pipeline_k: Any, pipeline_v: Any, state: Any) -> Any:
    """Let `count` blocks of keys and values pass."""
    for _ in cutlass.range(count, unroll=1):
        for pipeline in (pipeline_k, pipeline_v):
            pipeline.consumer_wait(state, pipeline.consumer_try_wait(state))
            pipeline.consumer_release(state)
        state.advance()
    return state


# ---- The ends ----


@cute.jit
def zero_without_blocks(acc_O: cute.Tensor, count: Int32) -> None:
    """Write 0 for a tile of queries that sees no key: what it visited is hidden, and may be NaN."""
    if count <= 0:
        acc_O.fill(0.0)


def turn(seqlen: SeqlenInfo, blocks: BlockInfo, n_block: Int32, m_block: Int32) -> Int32:
    """Return how many key tiles add to dQ of m_block before n_block does, in the deterministic order."""
    return Int32(seqlen.ranges.turn(n_block, m_block, blocks.tile_m, blocks.tile_n))


def visible(seqlen: SeqlenInfo, row: Int32) -> Float32:
    """Return the number of keys that query `row` sees, at least 1."""
    return Float32(cutlass.max(seqlen.ranges.visible(row + seqlen.ranges.offset), 1))
