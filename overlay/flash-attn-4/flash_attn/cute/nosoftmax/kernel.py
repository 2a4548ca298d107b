"""Implement the hooks in upstream's Hopper kernels: P = f(S) in place of exp(S - max), without row
statistics.

Three things follow from softmax, and need code without it. Masked weights and masked dS are written as 0.
Tiles end at the end of their sequence, so that 0 * NaN from the rows behind it never occurs. P and O saturate
in float16, but NaN or Inf in an input still shows.
"""

import math
import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Optional

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from flash_attn.cute import utils
from flash_attn.cute.nosoftmax import masked, plan
from flash_attn.cute.nosoftmax.marker import BY_NUMBER, BY_ROW, BY_SEQUENCE, NoSoftmax
from flash_attn.cute.softmax import Softmax
from quack import copy_utils, layout_utils

_FLOAT16_MAX = 65504.0


def mask_value(mark: Optional[NoSoftmax]) -> float:
    return -math.inf if mark is None else 0.0


def hdim_multiple_of(mark: Optional[NoSoftmax]) -> int:
    """Return the multiple to which the backward rounds up head sizes where dK and dV are not swapped.

    The host code and the postprocess lay out dq_accum, and dk_accum and dv_accum with grouped heads, in
    multiples of 32. Upstream's 16 gives another size at head sizes such as 48, 72 and 80.
    """
    return 16 if mark is None else 32


@dataclass
class RowState(Softmax):
    """Replaces Softmax: the scores are the weights, and O is never rescaled.

    float16 saturation would make an infinite weight a large number, so it is turned into NaN before that.
    inf_seen_in = "weights" spends one operation per weight. "scores" spends one operation for two scores of
    tiles without masked scores, if registers are left: row_sum then becomes Inf or NaN for a row of O that
    had an infinite score, and is meaningless otherwise.
    """

    inf_seen_in: cutlass.Constexpr[Optional[str]] = None

    @staticmethod
    def create(scale_log2, num_rows, arch=80, softmax_scale=None, inf_seen_in=None):
        s = Softmax.create(scale_log2, num_rows, arch, softmax_scale)
        return RowState(scale_log2, num_rows, s.row_max, s.row_sum, arch, softmax_scale, inf_seen_in)

    def notice_scores(self, acc_S: cute.Tensor) -> None:
        """Look for Inf in a tile without masked scores, as the matrix unit left it.

        Products of two scores of finite float16 inputs stay below 2^81, and sums of any number of them below
        2^127.
        """
        if self.inf_seen_in != "scores":
            return
        acc_mn = layout_utils.reshape_acc_to_mn(acc_S)
        for r in range(cute.size(self.row_sum)):
            noticed = self.row_sum[r]
            for c in range(0, cute.size(acc_mn, mode=[1]), 2):
                noticed = acc_mn[r, c] * acc_mn[r, c + 1] + noticed
            self.row_sum[r] = noticed

    def notice_weights(self, acc_P: cute.Tensor, has_masked: bool, is_first: bool = False) -> None:
        """Look for Inf in the weights of a tile, whose masked weights are 0. is_first: the first tile of an
        output tile."""
        if is_first and self.inf_seen_in == "scores":
            self.row_sum.fill(0.0)
        if self.inf_seen_in == "weights" or (self.inf_seen_in == "scores" and has_masked):
            for i in range(cute.size(acc_P)):
                acc_P[i] = _inf_to_nan(acc_P[i])

    def online_softmax(self, acc_S, is_first=False, check_inf=True) -> cute.Tensor:
        return self.row_max  # the factors for rescale_O, which reads none

    def finalize(self, final_scale=1.0, sink_val=None) -> cute.Tensor:
        return self.row_max

    def rescale_O(self, acc_O: cute.Tensor, row_scale: cute.Tensor) -> None:
        pass

    def show(self, acc_O: cute.Tensor, dtype) -> None:
        """Before O saturates, turn its infinite elements and rows that had an infinite score into NaN."""
        if dtype is not cutlass.Float16:
            return
        acc_mn = layout_utils.reshape_acc_to_mn(acc_O)
        for r in range(cute.size(acc_mn, mode=[0])):
            zero = Float32(0.0)
            if self.inf_seen_in == "scores":
                zero = utils.warp_reduce(self.row_sum[r], operator.add, width=4) * 0.0
            for c in range(cute.size(acc_mn, mode=[1])):
                acc_mn[r, c] = acc_mn[r, c] * zero + acc_mn[r, c]


def row_state(mark: Optional[NoSoftmax], dtype) -> Callable:
    """Return the function that makes the row state of a forward."""
    if mark is None:
        return Softmax.create
    return partial(RowState.create, inf_seen_in=mark.inf_seen_in if dtype is cutlass.Float16 else None)


def layout_of_sQ(
    mark: Optional[NoSoftmax], sQ_layout: cute.ComposedLayout, sO_layout: cute.ComposedLayout
) -> cute.ComposedLayout:
    """Return the layout of the shared memory that Q and then O use. Upstream sizes it for Q: a wider O would
    overwrite K and more.
    """
    if mark is None or cute.cosize(sO_layout) <= cute.cosize(sQ_layout):
        return sQ_layout
    return sO_layout


# ---- Tiles end where the sequence ends ----


def ends_at_seqlen(mX: cute.Tensor, mCuSeqlens: Optional[cute.Tensor]) -> cute.Tensor:
    """Return the tensor for a TMA descriptor, from which `offset_batch_Q` and `offset_batch_K` cut sequences.

    TMA fills a tile with zeros past the end of the tensor, not past the end of a packed sequence. The rows of
    the next sequence would be multiplied by P = 0 or dS = 0, and a NaN there would reach the result. quack's
    ragged tensors let every sequence end at the border of the descriptor. Loads need the form without a
    pointer shift.
    """
    if const_expr(mCuSeqlens is None):
        return mX
    return copy_utils.create_ragged_tensor_for_tma(mX, ragged_dim=0, ptr_shift=False)


def offset_batch_Q(mark: Optional[NoSoftmax], seqlen_info) -> Callable:
    """Return the function that cuts a sequence out of Q or dO: seqlen_info.offset_batch_Q, or its equivalent
    for tensors of `ends_at_seqlen`.
    """
    if mark is None or not seqlen_info.has_cu_seqlens_q:
        return seqlen_info.offset_batch_Q
    return partial(_sequence, offset=seqlen_info.offset_q, seqlen=seqlen_info.seqlen_q)


def offset_batch_K(mark: Optional[NoSoftmax], seqlen_info) -> Callable:
    """Do the same as `offset_batch_Q` for K and V."""
    if mark is None or not seqlen_info.has_cu_seqlens_k:
        return seqlen_info.offset_batch_K
    return partial(_sequence, offset=seqlen_info.offset_k, seqlen=seqlen_info.seqlen_k)


def _sequence(mX: cute.Tensor, batch_idx: Int32, dim: int, offset: Int32, seqlen: Int32) -> cute.Tensor:
    return copy_utils.offset_ragged_tensor(mX, offset, seqlen, ragged_dim=0, ptr_shift=False)


def repeating_last_row(paged_kv_manager):
    """Make the manager read the last row of the sequence again in place of rows past the end. Pages are read
    row by row, and shared memory would keep old contents, possibly NaN, in a row that is not read. P is 0
    there.
    """
    return replace(paged_kv_manager, repeat_last_row=True)


@cute.jit
def zero_without_keys(acc_O: cute.Tensor, seqlen_k: Int32) -> None:
    """Write 0 for a sequence without keys, which has no row to repeat."""
    if seqlen_k <= 0:
        acc_O.fill(0.0)


def load_nothing(src_idx, producer_state) -> None:
    """Replaces the loads of LSE and dPsum."""


# ---- Saturation ----


@dsl_user_op
def _cvt_f16x2_satfinite(a: Float32, b: Float32, *, loc=None, ip=None) -> Int32:
    """Convert two floats to float16. NaN stays NaN, but +-Inf becomes +-65504."""
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [Float32(a).ir_value(loc=loc, ip=ip), Float32(b).ir_value(loc=loc, ip=ip)],
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;",
            "=r,f,f",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


@dsl_user_op
def ramp(x: Float32, high: float, *, loc=None, ip=None) -> Float32:
    """Clamp x to [0, high] in one integer operation: as integers, floats > 0 keep their order and floats < 0
    are < 0. NaN is lost.
    """
    return Float32(
        llvm.inline_asm(
            T.f32(),
            [Float32(x).ir_value(loc=loc, ip=ip), Float32(high).ir_value(loc=loc, ip=ip)],
            "{ .reg .s32 a, b; mov.b32 a, $1; mov.b32 b, $2; min.relu.s32 a, a, b; mov.b32 $0, a; }",
            "=f,f,f",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


def _inf_to_nan(x: Float32) -> Float32:
    return x * 0.0 + x


def cvt_f16_satfinite(src: cute.Tensor, dst_or_dtype):
    """Do utils.cvt_f16, with float16 saturating at +-65504; bfloat16 has the range of float32. The caller
    must notice Inf before.
    """
    is_dtype = isinstance(dst_or_dtype, type)
    if (dst_or_dtype if is_dtype else dst_or_dtype.element_type) is not cutlass.Float16:
        return utils.cvt_f16(src, dst_or_dtype)
    dst = cute.make_rmem_tensor(src.shape, dst_or_dtype) if is_dtype else dst_or_dtype
    dst_i32 = cute.recast_tensor(dst, Int32)
    for i in range(cute.size(dst_i32)):
        dst_i32[i] = _cvt_f16x2_satfinite(src[2 * i], src[2 * i + 1])
    return dst if is_dtype else None


def cvt_f16(mark: Optional[NoSoftmax]) -> Callable:
    return utils.cvt_f16 if mark is None else cvt_f16_satfinite


def cvt_P_of_backward(mark: Optional[NoSoftmax], acc_P: cute.Tensor, dtype) -> cute.Tensor:
    """Convert P for dV. P saturates as in the forward; dS and the gradients do not."""
    if mark is None or mark.by_row:  # Normalization.scale_P has saturated it
        return utils.cvt_f16(acc_P, dtype)
    if dtype is cutlass.Float16 and mark.inf_seen_in is not None:
        for i in range(cute.size(acc_P)):
            acc_P[i] = _inf_to_nan(acc_P[i])
    return cvt_f16_satfinite(acc_P, dtype)


def _saturate(x: Float32) -> Float32:
    return cute.arch.fmin(cute.arch.fmax(_inf_to_nan(x), -_FLOAT16_MAX, nan=True), _FLOAT16_MAX, nan=True)


# ---- Results in float32 ----


def wide(mark: Optional[NoSoftmax]) -> bool:
    """Whether results are the float32 sums themselves, neither rounded nor saturated."""
    return mark is not None and mark.wide


def result_type(mark: Optional[NoSoftmax], dtype: Any) -> Any:
    """Return the type of the output and of the gradients. dtype: that of q, of torch or of the compiler."""
    if not wide(mark):
        return dtype
    return torch.float32 if isinstance(dtype, torch.dtype) else Float32


def epilogue(kernel) -> Callable:
    """Return the function that writes a tile of O: upstream's, or one with the same arguments. Shared memory
    has no room for float32."""
    return partial(_store_O, kernel) if wide(kernel.no_softmax) else kernel.epilogue


def _store_O(
    kernel, acc_O, lse, mO, mLSE, sO, seqlen, gmem_tiled_copy_O, tma_atom_O, tiled_mma, tidx, m_block,
    head_idx, batch_idx,
) -> None:  # fmt: skip
    mO_cur = seqlen.offset_batch_Q(mO, batch_idx, dim=3)[None, None, head_idx]
    tile = kernel.tile_m, kernel.tile_hdimv
    _store_sums(acc_O, mO_cur, tiled_mma, tidx, m_block, tile, seqlen.seqlen_q, False)


def epilogue_dKV(kernel) -> Callable:
    """Do the same for dK and dV. Grouped heads add to float32 sums anyway, which the postprocess copies."""
    direct = wide(kernel.no_softmax) and kernel.qhead_per_kvhead == 1
    return partial(_store_dKV, kernel) if direct else kernel.epilogue_dKV


def _store_dKV(
    kernel, acc_dV, mdV, sV, acc_dK, mdK, sK, seqlen, tma_atom_dK, tma_atom_dV, tiled_mma_dK, tiled_mma_dV,
    tidx, n_block, head_idx, batch_idx, *of_groups,
) -> None:  # fmt: skip
    for acc, mX, tiled_mma, hdim in (
        (acc_dV, mdV, tiled_mma_dV, kernel.tile_hdimv),
        (acc_dK, mdK, tiled_mma_dK, kernel.tile_hdim),
    ):
        mX_cur = seqlen.offset_batch_K(mX, batch_idx, dim=3)[None, None, head_idx]
        tile = kernel.tile_n, hdim
        _store_sums(acc, mX_cur, tiled_mma, tidx, n_block, tile, seqlen.seqlen_k, kernel.dKV_swapAB)


@cute.jit
def _store_sums(
    acc: cute.Tensor,
    mX: cute.Tensor,
    tiled_mma: cute.TiledMma,
    tidx: Int32,
    block: Int32,
    tile: cutlass.Constexpr[tuple],
    seqlen: Int32,
    transposed: cutlass.Constexpr[bool],
):
    """Write the accumulator of a tile of (rows, channels) to mX (seqlen, channels), from registers. A warp
    writes whole sectors of 32 bytes: 4 threads with 2 channels each, or 8 with one if transposed.
    """
    shape = (tile[1], tile[0]) if const_expr(transposed) else tile
    places = tiled_mma.get_slice(tidx).partition_C(cute.make_identity_tensor(shape))
    acc_mn = layout_utils.reshape_acc_to_mn(acc, transpose=transposed)
    places = layout_utils.reshape_acc_to_mn(places, transpose=transposed)
    ROW, CHANNEL = (1, 0) if const_expr(transposed) else (0, 1)
    width = 1 if const_expr(transposed) else 2  # neighbouring channels of a thread
    values = cute.make_rmem_tensor(width, Float32)
    for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
        row = places[r, 0][ROW] + block * tile[0]
        if row < seqlen:
            for c in cutlass.range_constexpr(0, cute.size(acc_mn, mode=[1]), width):
                channel = places[r, c][CHANNEL]
                if channel < mX.shape[1]:
                    for i in cutlass.range_constexpr(width):
                        values[i] = acc_mn[r, c + i]
                    at = utils.elem_pointer(mX, (row, channel))
                    at = cute.make_ptr(Float32, at.toint(), at.memspace, assumed_align=4 * width)
                    cute.autovec_copy(values, cute.make_tensor(at, cute.make_layout(width)))


# ---- Normalization ----


@dataclass(frozen=True)
class Normalization:
    """norm_i of score.py, for the queries of one sequence.

    The backward splits norm_i into a factor of the sequence, which multiplies float32 accumulators, and a
    factor of the row, which multiplies P and dP before they become 16-bit. Only "1/visible" and factors that
    the caller gives for rows have the latter. "1/visible" is balanced: sqrt(n) / visible lies in [1 /
    sqrt(n), sqrt(n)], so float16 neither overflows nor loses bits to it. Given factors are divided by the
    largest of their sequence, so that none overflows.
    """

    mark: cutlass.Constexpr[NoSoftmax]
    mask: cutlass.Constexpr  # AttentionMask: lengths, window and tile
    is_causal: cutlass.Constexpr[bool]
    given: Optional[Float32] = None  # the factor of the sequence, or the largest of its rows
    given_rows: Optional[cute.Tensor] = None  # the factors of the sequence's rows

    def _n(self) -> Float32:
        return cute.arch.fmax(Float32(self.mask.seqlen_k), 1.0)

    def of_sequence(self) -> Float32:
        """Return the factor of the sequence in the backward: the whole norm unless it differs by row."""
        if self.given is not None:
            return self.given
        if self.mark.normalization == "1/n":
            return cute.arch.rcp_approx(self._n())
        return cute.math.rsqrt(self._n(), fastmath=True)

    def _given(self, row: Int32) -> Float32:
        """Return the given factor of query `row`. A tile may reach past the end of the sequence."""
        return self.given_rows[cutlass.max(cutlass.min(row, self.mask.seqlen_q - 1), 0)]

    def _of_row(self, row: Int32) -> Float32:
        """Return the whole norm of query `row`."""
        if self.mark.normalization == BY_ROW:
            return self._given(row)
        return cute.arch.rcp_approx(self._visible(row)) if self.mark.by_row else self.of_sequence()

    def _visible(self, row: Int32) -> Float32:
        """The number of keys that query `row` sees, at least 1."""
        mask = self.mask
        if masked.hides(self.mark):
            return masked.visible(mask.seqlen_info, row)
        aligned = row + mask.seqlen_k - mask.seqlen_q
        end = mask.seqlen_k
        if self.is_causal:
            end = cutlass.min(end, aligned + 1)
        elif mask.window_size_right is not None:
            end = cutlass.min(end, aligned + 1 + mask.window_size_right)
        begin = Int32(0)
        if mask.window_size_left is not None:
            begin = cutlass.max(begin, aligned - mask.window_size_left)
        return Float32(cutlass.max(end - begin, 1))

    def _rows(self, acc_mn: cute.Tensor, thr_mma, m_block: Int32):
        """Yield (register row, query) of an accumulator of S that reshape_acc_to_mn reshaped to (rows,
        columns)."""
        mask = self.mask
        shape = (mask.tile_n, mask.tile_m) if mask.swap_AB else (mask.tile_m, mask.tile_n)
        coordinates = layout_utils.reshape_acc_to_mn(
            thr_mma.partition_C(cute.make_identity_tensor(shape)), transpose=mask.swap_AB
        )
        for r in range(cute.size(acc_mn, mode=[0])):
            row = coordinates[r, 0][1 if mask.swap_AB else 0] + m_block * mask.tile_m
            if mask.qhead_per_kvhead_packgqa != 1:
                row = row // mask.qhead_per_kvhead_packgqa
            yield r, row

    def scale_O(self, acc_O: cute.Tensor, thr_mma, m_block: Int32) -> None:
        """O_i *= norm_i. thr_mma: that of S, whose rows an accumulator of O shares."""
        if self.mark.normalization is None:
            return
        acc_mn = layout_utils.reshape_acc_to_mn(acc_O)
        for r, row in self._rows(acc_mn, thr_mma, m_block):
            acc_mn[r, None].store(acc_mn[r, None].load() * self._of_row(row))

    def scale_P(self, acc_mn: cute.Tensor, thr_mma, m_block: Int32, dtype) -> None:
        """Apply the row's factor to P in the backward. P saturates first, as in the forward; the product does
        not.
        """
        if self.mark.by_row and dtype is cutlass.Float16:
            for r in range(cute.size(acc_mn, mode=[0])):
                for c in range(cute.size(acc_mn, mode=[1])):
                    acc_mn[r, c] = _saturate(acc_mn[r, c])
        self.scale_rows(acc_mn, thr_mma, m_block)

    def scale_rows(self, acc_mn: cute.Tensor, thr_mma, m_block: Int32) -> None:
        """Apply the row's factor to P or dP in the backward."""
        if not self.mark.by_row:
            return
        if self.mark.normalization == BY_ROW:
            factors = self._factors_of_rows(acc_mn, thr_mma, m_block)
            whole = cute.arch.rcp_approx(self.given)
        else:
            # Counting takes few operations if causal or local.
            rows = self._factors_of_rows if masked.hides(self.mark) else self._factors_of_each_row
            factors = rows(acc_mn, thr_mma, m_block)
            whole = cute.math.sqrt(self._n(), fastmath=True)
        for r, factor in factors:
            factor = whole * factor
            for c in range(cute.size(acc_mn, mode=[1])):
                acc_mn[r, c] = acc_mn[r, c] * factor

    def _factors_of_each_row(self, acc_mn: cute.Tensor, thr_mma, m_block: Int32):
        """Yield (register row, norm of the query) of an accumulator as in `_rows`."""
        for r, row in self._rows(acc_mn, thr_mma, m_block):
            yield r, self._of_row(row)

    def _factors_of_rows(self, acc_mn: cute.Tensor, thr_mma, m_block: Int32):
        """Do the same as `_factors_of_each_row`.

        If the accumulator is transposed, a thread has a fourth of the tile's queries: 2 (lane % 4) + 8 j and
        the next one, for each j. Then the lanes of a warp load or count the factors together and exchange
        them. So many of each thread would not fit into the registers.
        """
        if not self.mask.swap_AB:
            yield from self._factors_of_each_row(acc_mn, thr_mma, m_block)
            return
        lane = cute.arch.lane_idx()
        mine = 2 * (lane % 4)
        first = next(self._rows(acc_mn, thr_mma, m_block))[1] - mine  # the same for all lanes
        places = self._places(acc_mn, thr_mma)
        loaded = [self._of_row(first + lane + i) for i in range(0, max(places) + 8, cute.arch.WARP_SIZE)]
        for r, place in enumerate(places):
            part, source = divmod(place, cute.arch.WARP_SIZE)
            yield r, utils.shuffle_sync(loaded[part], offset=source + mine)

    def _places(self, acc_mn: cute.Tensor, thr_mma) -> list[int]:
        """Return the query of each register row of a transposed accumulator, counted from the first one."""
        coordinates = layout_utils.reshape_acc_to_mn(
            thr_mma.get_slice(0).partition_C(cute.make_identity_tensor((self.mask.tile_n, self.mask.tile_m))),
            transpose=True,
        )
        return [coordinates[r, 0][1] for r in range(cute.size(acc_mn, mode=[0]))]

    def scale_sums(self, acc: cute.Tensor) -> None:
        """Apply the sequence's factor to an accumulator of dQ, dK or dV."""
        if self.mark.normalization is not None:
            acc.store(acc.load() * self.of_sequence())


def normalization(
    mark: NoSoftmax, mask, is_causal: bool, aux_data: Any, batch_idx: Int32, backward: bool = False
) -> Normalization:
    """Return the normalization of sequence `batch_idx`, with the factors that launch.py put at the end of
    aux_data.
    """
    if backward:
        # Upstream lets the backward begin before the kernel in front of it has written its results: that of
        # largest.py, or whatever computed the caller's factors, biases and slopes.
        cute.arch.griddepcontrol_wait()
    given = rows = None
    last = -1 - mark.by_head
    if mark.normalization == BY_NUMBER:
        given = Float32(aux_data.scalars[-1])
    elif mark.normalization == BY_SEQUENCE:
        given = aux_data.tensors[last][batch_idx]
    elif mark.normalization == BY_ROW:
        rows = aux_data.tensors[last - 1 if backward else last]
        if cute.rank(rows) == 2:
            rows = rows[batch_idx, None]
        else:
            rows = cute.domain_offset((mask.seqlen_info.offset_q,), rows)
        if backward:
            given = aux_data.tensors[last][batch_idx]
    return Normalization(mark, mask, is_causal, given, rows)


# ---- Values for each head ----


def of_this_head(mark: Optional[NoSoftmax], aux_data: Any, batch_idx: Int32, head_idx: Int32) -> Any:
    """Return aux_data for the score_mods of one tile of the backward, whose queries are of one head: with the
    sigmoid bias and the slope of this head in the place of all.

    Read once, a bias lets P and dS share an exponential. And with grouped heads upstream's backward gives a
    score_mod wrong indices of heads.
    """
    if mark is None or not mark.by_head:
        return aux_data
    others, by_head = aux_data.tensors[: -mark.by_head], aux_data.tensors[-mark.by_head :]
    return aux_data._replace(tensors=(*others, *(of_head(x, batch_idx, head_idx) for x in by_head)))


def of_head(values: Any, batch_idx: Int32, head_idx: Int32) -> Float32:
    """values: (nheads,) or (batch, nheads), or the value itself, which `of_this_head` chose."""
    if not isinstance(values, cute.Tensor):
        return values
    return values[head_idx] if cute.rank(values) == 1 else values[batch_idx, head_idx]


def decay(
    mark: Optional[NoSoftmax],
    acc: cute.Tensor,
    tile: cute.Tensor,
    thr_mma,
    seqlen,
    aux_data: Any,
    batch_idx: Int32,
    head_idx: Int32,
    transposed: bool = False,
) -> None:
    """Multiply weights, or what is to become dS, by exp(-slope * |distance|).

    acc: an accumulator of S. tile: its coordinates in the sequences, (query, key), or (key, query) if
    transposed. Distances are floats that count from the thread's first one, so that an element costs no
    operation on integers. Far from the diagonal they are rounded, by less than 2^-24 of themselves.
    """
    if mark is None or not mark.has_decay:
        return
    q, k = (1, 0) if transposed else (0, 1)
    rate = of_head(aux_data.tensors[-1], batch_idx, head_idx) * -math.log2(math.e)
    place = thr_mma.partition_C(tile)[0]
    first = Float32(masked.position(seqlen, place[q]) - place[k])
    # Those of the first thread are constants, and all threads have the same steps from element to element.
    constant = thr_mma.get_slice(0).partition_C(cute.make_identity_tensor(tile.shape))
    for i in range(cute.size(acc)):
        steps = [constant[i][side] - constant[0][side] for side in (q, k)]
        distance = cute.math.absf(first + float(steps[0] - steps[1]))
        acc[i] = acc[i] * cute.math.exp2(distance * rate, fastmath=True)


# ---- Which blocks of the backward need the mask ----


def masks_any(
    mark: Optional[NoSoftmax], is_causal: bool, is_local: bool, mask_mod: Optional[Callable]
) -> bool:
    """Whether a block may need the mask at all. With softmax every block gets it.

    The end of the sequence needs no mask: past it Q, K, V and dO are zeros, so dS = f'(0) * 0 = 0, and P =
    f(0) adds only to rows of dV that are not written. This requires f and f' to be finite at 0.
    """
    hidden = is_causal or is_local or mask_mod is not None or masked.hides(mark)
    return hidden or mark is None or not mark.finite_at_zero


def leaves_interior(mark: Optional[NoSoftmax], is_local: bool, mask_mod: Optional[Callable]) -> bool:
    """Whether blocks in which each query sees each key need no mask."""
    if mark is None or mark.intervals:  # the mask itself passes over such blocks
        return False
    return mark.finite_at_zero and not is_local and mask_mod is None


def m_block_interior(mask, m_block_min: Int32, m_block_max: Int32, n_block: Int32, is_causal: bool) -> Int32:
    """Return the first block of queries that needs no mask: if causal, all its queries see every key of the
    block.
    """
    if isinstance(mask, masked.AttentionMask):
        return mask.m_block_interior(n_block)
    if const_expr(not is_causal):
        return m_block_min
    # Query i sees key j if j <= i + seqlen_k - seqlen_q.
    first = (n_block + 1) * mask.tile_n - 1 + mask.seqlen_q - mask.seqlen_k
    interior = (cutlass.max(first, 0) + mask.tile_m - 1) // mask.tile_m
    return cutlass.max(cutlass.min(interior, m_block_max), m_block_min)


# ---- Host ----


def bwd_tile_with(mark: Optional[NoSoftmax], upstreams: Callable) -> Callable:
    """Return the function that chooses the backward's tile: upstream's, or one with the same arguments."""
    return upstreams if mark is None else partial(_bwd_tile, upstreams, masked.hides(mark))


def _bwd_tile(
    upstreams: Callable,
    hides: bool,
    head_dim: int,
    head_dim_v: int,
    causal: bool,
    local: bool,
    sparse_block_size_q=None,
):
    """docs/results/h100-fa4.md has the times of upstream's tiles and of these. hides: a mask beside causal
    and local, served as causal is.
    """
    causal = causal or hides
    if head_dim_v > head_dim:
        # Upstream's choice by head_dim alone would not fit into shared memory. The causal tile for head_dim_v
        # fits. The non-causal one has rows that the matrix unit cannot divide at a smaller head_dim.
        return upstreams(head_dim_v, head_dim_v, True, local, sparse_block_size_q=sparse_block_size_q)
    tile = upstreams(head_dim, head_dim_v, causal, local, sparse_block_size_q=sparse_block_size_q)
    if sparse_block_size_q is not None:
        return tile
    if 96 < head_dim <= 128:
        return replace(tile, m_block_size=64, dQ_swapAB=True)
    if head_dim_v > 224:
        # More keys a block, so that fewer sums of dQ go to L2, and two stages of dO, P and dS, in exchange
        # for shorter blocks of queries. Without dKV_swapAB, head sizes are rounded up to multiples of
        # 32: all those above 224 to 256.
        return replace(
            tile, m_block_size=32, n_block_size=64, num_stages_dO=2, num_stages_PdS=2, SdP_swapAB=True,
            dKV_swapAB=False, dQ_swapAB=True, AtomLayoutMSdP=2,
        )  # fmt: skip
    return tile


def zero_dq_accum(out, dout, dpsum, lse, lse_log2, dq_accum, *args, fake_mode: bool, **kwargs) -> None:
    """Replaces _bwd_preprocess, of which the kernels need only the zeroed dq_accum."""
    plan.not_used(dpsum, lse_log2)
    if not fake_mode:
        dq_accum.zero_()
