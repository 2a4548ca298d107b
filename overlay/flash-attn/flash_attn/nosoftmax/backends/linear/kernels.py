"""Compute the linear-attention primitive in Triton, for float16 and bfloat16 tensors on CUDA.

Sequences are dense or packed, with or without a state. Positions are cut into segments of whole chunks.
`_sum_segments` adds up k^T v of every segment, `_scan` turns the sums into the state that each segment starts
with, and `_walk` goes through each segment chunk by chunk with the running state in registers. So k and v are
read twice and q and out touched once, whatever the chunk size. A segment is long enough that its state is
small in comparison. One segment alone (short sequences, or as many heads as the GPU has multiprocessors)
needs only `_walk`.

"1/visible" with a causal mask is a factor for each query, and so are row factors. Where queries are rows, it
multiplies the row. Where queries are keys (dk and dv), it multiplies the scores in float32, and the columns
that are added to the state, which are then rounded to 16 bit once.

A decay multiplies the scores of a chunk in float32, and what a row reads from the state. The state decays by
the length of the chunk, and the columns that are added to it by their distance to its end, those of a
segment's sum by their distance to the end of the segment. So all factors are exp of numbers that are not
positive. The full form then is the causal one and the strictly anticausal one, and their sum is rounded once.
Where grouped heads have decays of their own, each query head has a state, and dk and dv of a key head are
sums over its query heads in float32.

A float32 state enters the 16-bit matrix units as the sum of two 16-bit numbers, hi + lo, which loses no more
than the products of the quadratic kernel. In float16 the state is first scaled by a power of two to fit.

A diagonal moves rows and keys against each other, up to where the ones end and the others begin. What lies
between them beyond that is no position: all products pass over it, so one factor of the decay covers it.

The host reads no GPU tensor: grids and buffers follow from shapes and max_seqlen, so calls can be captured in
CUDA graphs. With a diagonal, there are segments for rows and keys behind one another, and those that a
sequence does not have return at once.
"""

from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from ...score import saturate_
from .form import ANTICAUSAL, CAUSAL, FULL, NOTHING, ROW, SEQUENCE, Form, Given

_FULL, _CAUSAL, _ANTICAUSAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MASKS = {FULL: 0, CAUSAL: 1, ANTICAUSAL: 2}
_PER_N, _PER_ROOT_N, _PER_VISIBLE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_NORMALIZATIONS = {None: 0, "1/n": 1, "1/sqrt(n)": 2, "1/visible": 3}
_OF_SEQUENCE, _OF_ROW = tl.constexpr(1), tl.constexpr(2)
_ROW_FACTORS = {None: 0, SEQUENCE: 1, ROW: 2}
_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _sequence(cu_rows, cu_keys, diagonals, b, rows, keys, DIAGONAL: tl.constexpr, VARLEN: tl.constexpr):
    """Return of sequence b the start and the length of the rows and of the keys, the positions of the first
    row and of the first key, the number of positions, and how far apart rows and keys lie beyond that.

    diagonals: for each sequence the query's key, of which DIAGONAL says the sign: 1, or -1 where queries are
    keys. DIAGONAL = 0: both end at the last position.
    """
    start_row = tl.full((), 0, tl.int32)
    start_key = start_row
    if VARLEN:
        start_row, start_key = tl.load(cu_rows + b), tl.load(cu_keys + b)
        rows, keys = tl.load(cu_rows + b + 1) - start_row, tl.load(cu_keys + b + 1) - start_key
    near, gap = keys - rows, tl.full((), 0, tl.int32)
    if DIAGONAL != 0:
        wanted = tl.load(diagonals + b) * DIAGONAL
        near = tl.minimum(tl.maximum(wanted, -rows), keys)
        gap = tl.abs(wanted - near)
    first_row, first_key = tl.maximum(near, 0), tl.maximum(-near, 0)
    total = tl.maximum(first_row + rows, first_key + keys)
    return start_row, rows, start_key, keys, first_row, first_key, total, gap


@triton.jit
def _place(parts, heads, FLAT: tl.constexpr):
    """Return the part, head and sequence of this program in a grid (parts, heads, batch). FLAT: one axis
    holds all three.
    """
    part, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if FLAT:
        head, b = part // parts % heads, part // parts // heads
        part %= parts
    return part, head, b


@triton.jit
def _clear(columns, stride, start, stop, share, shares, inside, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Write 0 to one of `shares` shares of the rows from start to stop. columns: pointers to the columns
    of row 0.
    """
    zeros = tl.zeros((CHUNK, WIDTH), dtype=columns.dtype.element_ty)
    for chunk in range(start + share * CHUNK, stop, shares * CHUNK):
        row = chunk + tl.arange(0, CHUNK)
        tl.store(
            columns[None, :] + row[:, None].to(tl.int64) * stride,
            zeros,
            mask=(row < stop)[:, None] & inside[None, :],
        )


@triton.jit
def _first_slot(cu_rows, cu_keys, b, segments, segment_length, VARLEN: tl.constexpr):
    """Return the first slot of the states of sequence b. For packed sequences, the slots up to that of the
    next sequence are at least as many as the segments.
    """
    if VARLEN:
        return ((tl.load(cu_rows + b) + tl.load(cu_keys + b)) // segment_length + b).to(tl.int64)
    return (b * segments).to(tl.int64)


@triton.jit
def _first_factor(start, length, b, VARLEN: tl.constexpr):
    """Return the index of the first factor of sequence b, whose queries begin at `start` if packed."""
    return start.to(tl.int64) if VARLEN else b.to(tl.int64) * length


@triton.jit
def _pointers(base, stride, first, at, channels, NEAR: tl.constexpr):
    """Return pointers to the rows first + at and the columns `channels` of a matrix.

    NEAR: the distance from row `first` fits 32 bits, and is computed once for all chunks. That saves
    instructions and takes registers.
    """
    if NEAR:
        return base + first.to(tl.int64) * stride + (at[:, None] * stride + channels[None, :]).to(tl.uint32)
    return base + (first + at)[:, None].to(tl.int64) * stride + channels[None, :]


@triton.jit
def _load(
    base, stride, first, at, valid, channels, CHANNELS: tl.constexpr, WHOLE: tl.constexpr, NEAR: tl.constexpr
):  # fmt: skip
    """Load the rows first + at (where valid, else 0) and the columns `channels` of a matrix with CHANNELS
    columns. WHOLE: all of them are there.
    """
    pointers = _pointers(base, stride, first, at, channels, NEAR)
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=valid[:, None] & (channels < CHANNELS)[None, :], other=0.0)


@triton.jit
def _saturate(x, dtype: tl.constexpr, SATURATE: tl.constexpr):
    """With SATURATE, keep finite numbers finite in this 16-bit type. bfloat16 has the range of float32."""
    if SATURATE and dtype == tl.float16:
        # minimum and maximum replace a NaN or Inf by the limit. x * 0 makes both NaN, and adds 0 to a number.
        x = tl.minimum(tl.maximum(x, -_LARGEST_HALF), _LARGEST_HALF) + x * 0.0
    return x


@triton.jit
def _power_of_two_below(x):
    """The largest power of two that is at most x, for x > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _hi_lo(state, dtype: tl.constexpr):
    """Split state * up into hi + lo in 16 bit. Returns hi, lo and 1 / up, a power of two.

    In bfloat16, hi is the upper half of the state's bits. To round it would give lo one bit more, and take
    instructions and registers.
    """
    down = 1.0
    if dtype == tl.float16:
        # Scale by the largest finite number, because an Inf would scale all others to 0: state * 0 turns Inf
        # into NaN, and max ignores NaN.
        largest = tl.max(tl.abs(state * 0.0 + state))
        down = _power_of_two_below(tl.maximum(largest, 1e-30)) / 16384.0
        state = state * (1.0 / down)
    if dtype == tl.bfloat16:
        bits = state.to(tl.int32, bitcast=True)
        hi = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
        return hi, (state - (bits & -65536).to(tl.float32, bitcast=True)).to(dtype), down
    hi = state.to(dtype)
    return hi, (state - hi.to(tl.float32)).to(dtype), down


@triton.jit
def _visible(position, first_counted, most, DIAGONAL: tl.constexpr):
    """Return the number of keys that the query at each position sees, at least 1, in float32. first_counted:
    the position of the first key. most: the number of keys, which only a diagonal lets a position exceed.
    """
    count = position - first_counted + 1
    if DIAGONAL != 0:
        count = tl.minimum(count, most)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def _reciprocal(x):
    """Return 1 / x to 21 bits, for 1 <= x < 2^63. A division takes registers that `_walk` does not have."""
    return tl.rsqrt(x * x)


@triton.jit
def _gentle(exponent):
    """Return exp(exponent) - 1 by its series, for an exponent from -0.5 to 0."""
    change = exponent / 8.0
    for i in tl.static_range(7, 0, -1):
        change = (1.0 + change) * exponent / i
    return change


@triton.jit
def _decayed(state, exponent):
    """Return state * exp(exponent), for one exponent that is not positive.

    Near 1 a decay is 1 + change, and the change is added: the rounding of 1 + change would be the same for
    each step, and add up.
    """
    gentle = exponent > -0.5
    change = _gentle(tl.maximum(exponent, -0.5))
    return state * tl.where(gentle, 1.0, tl.exp(exponent)) + state * tl.where(gentle, change, 0.0)


@triton.jit
def _decay_and_rest(exponent):
    """Return exp(exponent) rounded to float32, and what the rounding left over, for one exponent that is not
    positive. Far from 1 no state lasts so long that it adds up, and the rest is 0.
    """
    gentle = exponent > -0.5
    change = _gentle(tl.maximum(exponent, -0.5))
    near = 1.0 + change
    return tl.where(gentle, near, tl.exp(exponent)), tl.where(gentle, change - (near - 1.0), 0.0)


@triton.jit
def _next_decay(decay, rest, owed):
    """Return the decay of the next of many equal chunks, and what is left over then. owed: what was left over
    before it.

    What rounding left over is made up for by a later chunk, so that the state takes one multiplication a
    chunk, and the decay over any number of chunks is off by about one rounding.
    """
    owed += rest
    paid = decay + owed
    return paid, owed - (paid - decay)


@triton.jit
def _decay(slope, distance):
    """Return exp(-slope * |distance|) for distances in positions."""
    return tl.exp2(slope * -1.4426950408889634 * tl.abs(distance.to(tl.float32)))


@triton.jit
def _scaled(columns, weights, PAIRS: tl.constexpr):
    """Multiply each column by its weight, and round to 16 bit once.

    With PAIRS, a weight in bfloat16 is hi + lo, two 16-bit numbers, and two columns stay in one register.
    That takes fewer instructions than float32 does. In float16 weights are in units of a power of two that
    keeps the products from becoming too small, and the accumulator is in the same units.
    """
    if PAIRS and columns.dtype == tl.bfloat16:
        hi = weights.to(tl.bfloat16)
        lo = (weights - hi.to(tl.float32)).to(tl.bfloat16)
        return tl.fma(columns, hi[None, :], columns * lo[None, :])
    return (columns.to(tl.float32) * weights[None, :]).to(columns.dtype)


@triton.jit
def _unit_of(weights):
    """Return a power of two, at most 2^30, that makes the largest of the weights at most 1.

    A larger one is of no use, since float16 holds no result so small, and might overflow the accumulator.
    """
    return tl.minimum(0.5 / _power_of_two_below(tl.maximum(tl.max(weights), 1e-30)), 1073741824.0)


@triton.jit(do_not_specialize=["heads"])  # compiled once for all values
def _sum_segments(
    k, v, sums, factors, slopes, diagonals, cu_rows, cu_keys, rows, keys, segments, segment_length, heads,
    stride_s, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, MASK: tl.constexpr, WEIGHED: tl.constexpr, ROW_WEIGHED: tl.constexpr,
    SHARED: tl.constexpr, DECAY: tl.constexpr, DIAGONAL: tl.constexpr, VARLEN: tl.constexpr,
    ALL: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """sums[slot of the segment, head] = sum of k^T v over the segment's keys and the head's group.

    Grid: (segments * tiles of the state, heads, batch). Unless ALL, skips the sum that is not needed: that of
    the last segment (causal) or the first (anticausal). WEIGHED: each key is divided by the number of rows
    that see it. ROW_WEIGHED: each key is multiplied by its own factor.
    DECAY: each key is decayed to the segment's last position (causal) or its first (anticausal), by the slope
    of the head; GROUP is 1 then, and SHARED heads have the same key head. WHOLE, NEAR: see `_load` and
    `_pointers`.
    """
    tiles_v: tl.constexpr = (D_V + BLOCK_V - 1) // BLOCK_V
    tiles: tl.constexpr = tiles_v * ((D + BLOCK_D - 1) // BLOCK_D)
    part, head, b = _place(segments * tiles, heads, FLAT)
    segment, tile = part // tiles, part % tiles
    start_row, rows, start_key, keys, first_row, first_key, total, gap = _sequence(
        cu_rows, cu_keys, diagonals, b, rows, keys, DIAGONAL, VARLEN
    )
    begin, end = segment * segment_length, tl.minimum((segment + 1) * segment_length, total)
    if begin >= total:
        return
    if not ALL:
        if MASK == _CAUSAL and end == total:
            return
        if MASK == _ANTICAUSAL and segment == 0:
            return
    # No row sees a key before `seen` or from the index `count` on, so it is not read.
    seen = tl.maximum(first_key, first_row) if MASK == _ANTICAUSAL else first_key
    count = keys
    if DIAGONAL != 0 and MASK == _CAUSAL:
        count = tl.minimum(keys, first_row + rows - first_key)
    channels = (tile // tiles_v) * BLOCK_D + tl.arange(0, BLOCK_D)
    channels_v = (tile % tiles_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_D, BLOCK_V), dtype=tl.float32)
    unit = 1.0
    # Whole chunks before the first key seen are skipped; the rest is one loop over chunks and the heads of
    # the group.
    skipped = tl.maximum(seen - begin, 0) // CHUNK
    at = tl.arange(0, CHUNK)
    if DECAY:
        slope = tl.load(slopes + b.to(tl.int64) * stride_s + head)
        if WHOLE:
            to_side = _decay(slope, CHUNK - 1 - at if MASK == _CAUSAL else at)
    for step in range(skipped * GROUP, tl.cdiv(end - begin, CHUNK) * GROUP):
        chunk = begin + (step // GROUP) * CHUNK
        index = chunk + at - first_key
        valid = (index >= seen - first_key) & (index < count)
        if SHARED == 1:
            key_head = (head * GROUP + step % GROUP).to(tl.int64)
        else:
            key_head = (head // SHARED).to(tl.int64)
        k_base = k + b.to(tl.int64) * stride_kb + start_key.to(tl.int64) * stride_kt + key_head * stride_kh
        v_base = v + b.to(tl.int64) * stride_vb + start_key.to(tl.int64) * stride_vt + key_head * stride_vh
        k_chunk = _load(k_base, stride_kt, chunk - first_key, at, valid, channels, D, WHOLE, NEAR)
        v_chunk = _load(v_base, stride_vt, chunk - first_key, at, valid, channels_v, D_V, WHOLE, NEAR)
        k_columns = tl.trans(k_chunk)
        if WEIGHED:
            if k.dtype.element_ty == tl.float16:
                before, unit = unit, _power_of_two_below(_visible(chunk, first_row, rows, DIAGONAL))
                acc *= unit / before
            weights = _reciprocal(_visible(first_key + index, first_row, rows, DIAGONAL)) * unit
        if ROW_WEIGHED:
            weights = tl.load(
                factors + _first_factor(start_key, keys, b, VARLEN) + index, mask=valid, other=0.0
            )
            if k.dtype.element_ty == tl.float16:
                before, unit = unit, _unit_of(weights)
                acc *= unit / before
            weights *= unit
        if DECAY:
            if WHOLE:  # to the side of the chunk, and from there to that of the segment
                decay = to_side * _decay(slope, end - CHUNK - chunk if MASK == _CAUSAL else chunk - begin)
            else:
                position = first_key + index
                decay = _decay(slope, end - 1 - position if MASK == _CAUSAL else position - begin)
            weights = weights * decay if WEIGHED or ROW_WEIGHED else decay
            # v and not k: the matrix unit transposes k in shared memory, but could not in registers.
            v_chunk = tl.trans(_scaled(tl.trans(v_chunk), weights, True))
        elif WEIGHED or ROW_WEIGHED:
            k_columns = _scaled(k_columns, weights, True)
        acc = tl.dot(k_columns, v_chunk, acc)
    if WEIGHED or ROW_WEIGHED:
        acc *= 1.0 / unit
    slot = _first_slot(cu_rows, cu_keys, b, segments, segment_length, VARLEN) + segment
    out = sums + (slot * heads + head) * (D * D_V)
    tl.store(
        out + channels[:, None] * D_V + channels_v[None, :], acc,
        mask=(channels < D)[:, None] & (channels_v < D_V)[None, :],
    )  # fmt: skip


@triton.jit
def _segment_of(i, count, MASK: tl.constexpr):
    """Return the segment that `_scan` comes to as number i."""
    return count - 1 - i if MASK == _ANTICAUSAL else i


@triton.jit
def _own_sum(here, i, first, count, summed, heads, offsets, SIZE: tl.constexpr, MASK: tl.constexpr):
    """Load the sum of the segment that `_scan` comes to as number i; 0 from number `summed` on."""
    pointers = here + (first + _segment_of(i, count, MASK)) * heads * SIZE
    return tl.load(pointers, mask=offsets < tl.where(i < summed, SIZE, 0), other=0.0)


@triton.jit
def _own_sums(here, i, first, count, summed, heads, offsets, SIZE: tl.constexpr, MASK: tl.constexpr):
    """Load the sums of four segments from number i on."""
    return (
        _own_sum(here, i, first, count, summed, heads, offsets, SIZE, MASK),
        _own_sum(here, i + 1, first, count, summed, heads, offsets, SIZE, MASK),
        _own_sum(here, i + 2, first, count, summed, heads, offsets, SIZE, MASK),
        _own_sum(here, i + 3, first, count, summed, heads, offsets, SIZE, MASK),
    )


@triton.jit(do_not_specialize=["heads"])
def _scan(
    sums, initial, final, slopes, diagonals, cu_rows, cu_keys, rows, keys, segments, segment_length, heads,
    stride_s, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, DECAY: tl.constexpr,
    DIAGONAL: tl.constexpr, VARLEN: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Replace the sum of each segment in place by the sum of the segments before it (causal) or after it
    (anticausal). With the full mask, replace the sum of the first segment by the sum of all.

    Grid: (tiles of the state, heads, batch). initial: the start of the sums. final: receives the sum of
    everything. DECAY: what was summed decays by the length of each further segment.
    """
    part, head, b = _place((SIZE + BLOCK - 1) // BLOCK, heads, FLAT)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < SIZE
    start_row, rows, start_key, keys, first_row, first_key, total, gap = _sequence(
        cu_rows, cu_keys, diagonals, b, rows, keys, DIAGONAL, VARLEN
    )
    count = tl.cdiv(total, segment_length)
    first = _first_slot(cu_rows, cu_keys, b, segments, segment_length, VARLEN)
    here = sums + head.to(tl.int64) * SIZE + offsets
    carry = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial + (b.to(tl.int64) * heads + head) * SIZE + offsets, mask=inside, other=0.0)
    slope = tl.load(slopes + b.to(tl.int64) * stride_s + head) if DECAY else 0.0
    # Without a final state, the last sum is not needed, and was not computed.
    summed = count if HAS_FINAL or MASK == _FULL else count - 1
    # Eight sums are on their way at once. A store that one of them might alias would make it wait.
    for i in range(0, count, 8):
        own_0, own_1, own_2, own_3 = _own_sums(here, i, first, count, summed, heads, offsets, SIZE, MASK)
        own_4, own_5, own_6, own_7 = _own_sums(here, i + 4, first, count, summed, heads, offsets, SIZE, MASK)
        for j in tl.static_range(8):
            if j < 4:
                own = own_0 if j == 0 else own_1 if j == 1 else own_2 if j == 2 else own_3
            else:
                own = own_4 if j == 4 else own_5 if j == 5 else own_6 if j == 6 else own_7
            segment = _segment_of(i + j, count, MASK)
            if MASK != _FULL:
                tl.store(
                    here + (first + segment) * heads * SIZE, carry,
                    mask=offsets < tl.where(i + j < count, SIZE, 0),
                )  # fmt: skip
            if DECAY:
                length = tl.minimum((segment + 1) * segment_length, total) - segment * segment_length
                # After the last segment there is nothing to decay over, and no sum.
                carry = _decayed(carry, -slope * tl.where(i + j < count, length, 0).to(tl.float32))
            carry += own
    if MASK == _FULL and count > 0:
        tl.store(here + first * heads * SIZE, carry, mask=inside)
    if HAS_FINAL:
        tl.store(final + (b.to(tl.int64) * heads + head) * SIZE + offsets, carry, mask=inside)


@triton.jit(do_not_specialize=["batch", "heads", "all_rows"])
def _walk(
    q, k, v, out, states, factors, slopes, diagonals, partial, cu_rows, cu_keys, rows, keys, segments,
    segment_length, batch, heads, all_rows, softmax_scale, row_factor, stride_s,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh, stride_ob, stride_ot, stride_oh, stride_sd, stride_sv,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GROUP_Q: tl.constexpr, GROUP_K: tl.constexpr, SHARED_Q: tl.constexpr, SHARED_K: tl.constexpr,
    MASK: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, NORMALIZATION: tl.constexpr, ROW_FACTORS: tl.constexpr,
    DIAGONAL: tl.constexpr, VARLEN: tl.constexpr, HAS_STATES: tl.constexpr, HAS_INITIAL: tl.constexpr,
    FLAT: tl.constexpr, WEIGHTS_SATURATE: tl.constexpr, OUTPUT_SATURATES: tl.constexpr,
    WHOLE: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_V columns of the output of one segment and one head.

    Grid: (segments * tiles of columns, nheads, batch). GROUP_Q heads of q share a head of k and v; GROUP_K
    heads of k and v are summed for a head of q; one of the two is 1. states: (slots, heads, D, D_V) with the
    strides stride_sd and stride_sv. factors: for each sequence or each query, by ROW_FACTORS.

    DECAY: slopes has one for each state. SHARED_Q states have the same head of q, and `out` has a head for
    each of them; SHARED_K states have the same head of k and v. STRICT: a row does not see its own position.
    partial: laid out as `out`, in float32, and added to it. WHOLE, NEAR: see `_load` and `_pointers`.
    With NEAR, q, k, v and out have one stride, so that they share their distances.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    # bfloat16 products fit without scaling, so that the scale can be applied at the end.
    late: tl.constexpr = dtype == tl.bfloat16
    per_visible: tl.constexpr = NORMALIZATION == _PER_VISIBLE
    weighed: tl.constexpr = per_visible and TRANSPOSED
    row_weighed: tl.constexpr = ROW_FACTORS == _OF_ROW and TRANSPOSED and MASK != _FULL
    # At 128 that takes registers which some kernels and GPUs spill.
    pairs: tl.constexpr = BLOCK_D <= 64
    tiles_v: tl.constexpr = (D_V + BLOCK_V - 1) // BLOCK_V
    part, head, b = _place(segments * tiles_v, heads, FLAT)
    segment, tile = part // tiles_v, part % tiles_v
    if VARLEN:
        # Rows of no sequence lie before the first and behind the last. Programs of the first sequences clear
        # them.
        sharing = tl.minimum(batch, 64)
        if b < sharing:
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = columns < D_V
            share, shares = b * segments + segment, sharing * segments
            base = out + head.to(tl.int64) * stride_oh + columns
            _clear(base, stride_ot, 0, tl.load(cu_rows), share, shares, inside, BLOCK_V, CHUNK)
            _clear(base, stride_ot, tl.load(cu_rows + batch), all_rows, share, shares, inside, BLOCK_V, CHUNK)
    start_row, rows, start_key, keys, first_row, first_key, total, gap = _sequence(
        cu_rows, cu_keys, diagonals, b, rows, keys, DIAGONAL, VARLEN
    )
    begin, end = segment * segment_length, tl.minimum((segment + 1) * segment_length, total)
    if end <= first_row or begin >= first_row + rows:
        return
    # A row before `seeing` or from `stops_seeing` on sees no key, and its output is 0 whatever q holds. No
    # row sees a key before `seen` or from the index `seen_keys` on, so it is not read.
    seeing = tl.where(keys > 0, first_key if MASK == _CAUSAL else 0, total)
    seen = tl.maximum(first_key, first_row) if MASK == _ANTICAUSAL else first_key
    stops_seeing, seen_keys = total, keys
    if DIAGONAL != 0 and MASK == _CAUSAL:
        seen_keys = tl.minimum(keys, first_row + rows - first_key)
    if DIAGONAL != 0 and MASK == _ANTICAUSAL:
        stops_seeing = first_key + keys
    factor = row_factor * softmax_scale if late else row_factor
    if NORMALIZATION == _PER_N or NORMALIZATION == _PER_ROOT_N:
        n = tl.maximum(rows if TRANSPOSED else keys, 1).to(tl.float32)
        factor *= 1.0 / n if NORMALIZATION == _PER_N else 1.0 / tl.sqrt(n)
    if ROW_FACTORS == _OF_SEQUENCE:
        factor *= tl.load(factors + b)
    if ROW_FACTORS == _OF_ROW:
        factors += _first_factor(
            start_key if TRANSPOSED else start_row, keys if TRANSPOSED else rows, b, VARLEN
        )

    if NEAR:
        stride_kt, stride_vt, stride_ot = stride_qt, stride_qt, stride_qt
    channels, channels_v = tl.arange(0, BLOCK_D), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    # A stride times an index can exceed 2^31.
    head_q, head_k = head.to(tl.int64), (head // GROUP_Q * GROUP_K).to(tl.int64)
    if SHARED_K > 1:
        head_k = head_k // SHARED_K
    q_base = q + b.to(tl.int64) * stride_qb + start_row.to(tl.int64) * stride_qt
    q_base += (head_q if SHARED_Q == 1 else head_q // SHARED_Q) * stride_qh
    out_base = out + b.to(tl.int64) * stride_ob + start_row.to(tl.int64) * stride_ot + head_q * stride_oh
    k_base = k + b.to(tl.int64) * stride_kb + start_key.to(tl.int64) * stride_kt
    v_base = v + b.to(tl.int64) * stride_vb + start_key.to(tl.int64) * stride_vt

    # All tiles are transposed: rows and keys are columns, so that the state is the left operand of its
    # products, which a matrix unit can read from registers.
    state = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    if HAS_STATES:
        slot = _first_slot(cu_rows, cu_keys, b, segments, segment_length, VARLEN)
        if MASK != _FULL:
            slot += segment
        start = states + (slot * (heads // GROUP_Q) + head // GROUP_Q) * (D * D_V)
        # The segment that is walked first starts from zero.
        if MASK == _FULL or HAS_INITIAL:
            present = total > 0
        elif MASK == _CAUSAL:
            present = segment > 0
        else:
            present = end < total
        state = tl.load(
            start + channels[None, :] * stride_sd + channels_v[:, None] * stride_sv,
            mask=(channels < tl.where(present, D, 0))[None, :] & (channels_v < D_V)[:, None], other=0.0,
        )  # fmt: skip
    if MASK == _FULL:
        hi, lo, down = _hi_lo(state, dtype)

    chunks = tl.cdiv(end - begin, CHUNK)
    at = tl.arange(0, CHUNK)
    visible = at[:, None] <= at[None, :] if MASK == _CAUSAL else at[:, None] >= at[None, :]
    if STRICT:
        visible = visible & (at[:, None] != at[None, :])
    if DECAY:
        slope = tl.load(slopes + b.to(tl.int64) * stride_s + head // GROUP_Q)
        decay, rest = _decay_and_rest(-slope * CHUNK)
        owed = 0.0
        if DIAGONAL != 0:
            factor *= _decay(slope, gap)
        early = 1.0
        if late and not per_visible:  # the factor is the same for all rows, and goes into their decays
            early, factor = factor, 1.0
        from_state = early * _decay(slope, at + 1 if MASK == _CAUSAL else CHUNK - at)
        to_state = _decay(slope, CHUNK - 1 - at if MASK == _CAUSAL else at)
        place = at.to(tl.float32)
        # A NaN stands for what is hidden, so that a chunk needs no positions to see that.
        within = tl.where(visible, early * _decay(slope, place[None, :] - place[:, None]), float("nan"))
    first_counted, most = (first_row, rows) if TRANSPOSED else (first_key, keys)
    unit = 1.0
    for i in range(chunks):
        chunk = begin + (chunks - 1 - i if MASK == _ANTICAUSAL else i) * CHUNK
        position = chunk + at
        row, key = position - first_row, position - first_key
        valid = (row >= 0) & (row < rows)
        from_row, from_key = chunk - first_row, chunk - first_key
        q_columns = tl.trans(_load(q_base, stride_qt, from_row, at, valid, channels, D, WHOLE, NEAR))
        if per_visible:
            count = _visible(position, first_counted, most, DIAGONAL)
        if weighed and not late:
            before, unit = unit, _power_of_two_below(_visible(chunk, first_counted, most, DIAGONAL))
            state *= unit / before
        if row_weighed:
            weights = tl.load(factors + key, mask=(position >= seen) & (key < seen_keys), other=0.0)
            if not late:
                before, unit = unit, _unit_of(weights)
                state *= unit / before
        if MASK != _FULL:
            hi, lo, down = _hi_lo(state, dtype)
        acc = tl.dot(hi, q_columns)
        acc = tl.dot(lo, q_columns, acc)
        if weighed:
            acc *= (count * ((1.0 if late else down * softmax_scale) / unit))[None, :]
        elif not late:
            acc *= down * softmax_scale
        if DECAY:
            if MASK == _ANTICAUSAL and HAS_INITIAL:  # the last chunk may end before CHUNK positions
                stop = tl.minimum(chunk + CHUNK, end)
                acc *= (early * _decay(slope, stop - position))[None, :]
                state = _decayed(state, -slope * (stop - chunk).to(tl.float32))
            else:
                acc *= from_state[None, :]
                paid, owed = _next_decay(decay, rest, owed)
                state *= paid
        if MASK != _FULL:
            key_valid = (position >= seen) & (key < seen_keys)
            for g in range(GROUP_K):
                k_chunk = _load(
                    k_base + (head_k + g) * stride_kh, stride_kt, from_key, at, key_valid, channels, D,
                    WHOLE, NEAR,
                )  # fmt: skip
                v_chunk = _load(
                    v_base + (head_k + g) * stride_vh, stride_vt, from_key, at, key_valid, channels_v, D_V,
                    WHOLE, NEAR,
                )  # fmt: skip
                v_columns = tl.trans(v_chunk)
                p = tl.dot(k_chunk, q_columns)
                if not late:
                    p *= softmax_scale
                if DECAY:
                    p = tl.where(within == within, p * within, 0.0)
                else:
                    p = tl.where(visible, p, 0.0)
                p = _saturate(p, dtype, WEIGHTS_SATURATE)
                if weighed:  # relative to the row, which is divided by its own count at the end: at most 1
                    p *= _reciprocal(count)[:, None] * count[None, :]
                if row_weighed:
                    p *= (weights * unit)[:, None]
                acc = tl.dot(v_columns, p.to(dtype), acc)
                if weighed:
                    weights = _reciprocal(count)
                if weighed or row_weighed:
                    entering = weights * unit
                if DECAY:
                    entering = entering * to_state if weighed or row_weighed else to_state
                if weighed or row_weighed or DECAY:
                    v_columns = _scaled(v_columns, entering, pairs)
                state = tl.dot(v_columns, k_chunk, state)
        acc *= (_reciprocal(count) * factor)[None, :] if per_visible else factor
        if row_weighed and not late:
            acc *= 1.0 / unit
        if ROW_FACTORS == _OF_ROW and not TRANSPOSED:
            acc *= tl.load(factors + row, mask=valid, other=0.0)[None, :]
        if not WHOLE:
            sees = position >= seeing
            if DIAGONAL != 0:
                sees = sees & (position < stops_seeing)
            acc = tl.where(sees[None, :], acc, 0.0)
        if HAS_PARTIAL:
            summed = partial + b.to(tl.int64) * stride_ob + start_row.to(tl.int64) * stride_ot
            summed += head_q * stride_oh
            acc += tl.trans(_load(summed, stride_ot, from_row, at, valid, channels_v, D_V, WHOLE, NEAR))
        pointers = _pointers(out_base, stride_ot, from_row, at, channels_v, NEAR)
        result = tl.trans(_saturate(acc, dtype, OUTPUT_SATURATES).to(out.dtype.element_ty))
        if WHOLE:
            tl.store(pointers, result)
        else:
            tl.store(pointers, result, mask=valid[:, None] & (channels_v < D_V)[None, :])


@triton.jit
def _query(q, stride, head, g, channels, D: tl.constexpr, GROUP: tl.constexpr):
    """Load query g of the GROUP that begin at `head`, or zeros behind the last one."""
    return tl.load(q + (head + g) * stride + channels, mask=(channels < D) & (g < GROUP), other=0.0)


@triton.jit
def _four_queries(q, stride, head, g, channels, D: tl.constexpr, GROUP: tl.constexpr):
    return (
        _query(q, stride, head, g, channels, D, GROUP),
        _query(q, stride, head, g + 1, channels, D, GROUP),
        _query(q, stride, head, g + 2, channels, D, GROUP),
        _query(q, stride, head, g + 3, channels, D, GROUP),
    )


@triton.jit
def _product(query, state):
    return query.to(tl.float32)[:, None] * state


@triton.jit
def _four_sums(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _put(out, head, row, channels_v, D_V: tl.constexpr):
    """Write the row of one head."""
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(
        out + head * D_V + channels_v, _saturate(row, dtype, True).to(dtype), mask=channels_v < D_V
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads"])
def _token(
    q, k, v, state, out, factors, slopes, slots, heads, scale, stride_s, stride_qb, stride_qh, stride_kb,
    stride_kh, stride_vb, stride_vh, stride_ss, stride_sh, stride_sd, stride_sv,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    HAS_FACTORS: tl.constexpr, DECAY: tl.constexpr, HAS_SLOTS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Add one token to BLOCK_V columns of the state of one key head, in place, and attend with the GROUP
    queries that share it. All in float32: the time is that of reading and writing the state.

    Nothing but the state is waited for: q, k and v are loaded before it. Four queries share a reduction,
    whose steps through shared memory each wait for all warps.

    Grid: (tiles of columns, nheads_k, batch). factors: one for each sequence. slots: the state of each.
    """
    tile, head, b = _place((D_V + BLOCK_V - 1) // BLOCK_V, heads, FLAT)
    b = b.to(tl.int64)
    channels, channels_v = tl.arange(0, BLOCK_D), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, inside_v = channels < D, channels_v < D_V
    head_q, q, out = head.to(tl.int64) * GROUP, q + b * stride_qb, out + b * heads * GROUP * D_V
    if GROUP == 1:
        query_0 = _query(q, stride_qh, head_q, 0, channels, D, GROUP)
    else:
        query_0, query_1, query_2, query_3 = _four_queries(q, stride_qh, head_q, 0, channels, D, GROUP)
    key = tl.load(k + b * stride_kb + head.to(tl.int64) * stride_kh + channels, mask=inside, other=0.0)
    value = tl.load(v + b * stride_vb + head.to(tl.int64) * stride_vh + channels_v, mask=inside_v, other=0.0)
    slot = tl.load(slots + b).to(tl.int64) if HAS_SLOTS else b
    place = state + slot * stride_ss + head.to(tl.int64) * stride_sh
    place = place + channels[:, None] * stride_sd + channels_v[None, :] * stride_sv
    both = inside[:, None] & inside_v[None, :]
    own = tl.load(place, mask=both, other=0.0)
    if DECAY:
        own = _decayed(own, -tl.load(slopes + b * stride_s + head))
    own += key.to(tl.float32)[:, None] * value.to(tl.float32)[None, :]
    tl.store(place, own, mask=both)
    if HAS_FACTORS:
        scale *= tl.load(factors + b)
    if GROUP == 1:
        _put(out, head_q, tl.sum(_product(query_0, own), axis=0) * scale, channels_v, D_V)
    else:
        for g in tl.static_range(0, GROUP, 4):
            if g > 0:
                query_0, query_1, query_2, query_3 = _four_queries(
                    q, stride_qh, head_q, g, channels, D, GROUP
                )
            row_0, row_1, row_2, row_3 = tl.reduce(
                (_product(query_0, own), _product(query_1, own), _product(query_2, own),
                 _product(query_3, own)), 0, _four_sums,
            )  # fmt: skip
            _put(out, head_q + g, row_0 * scale, channels_v, D_V)
            if g + 1 < GROUP:
                _put(out, head_q + g + 1, row_1 * scale, channels_v, D_V)
            if g + 2 < GROUP:
                _put(out, head_q + g + 2, row_2 * scale, channels_v, D_V)
            if g + 3 < GROUP:
                _put(out, head_q + g + 3, row_3 * scale, channels_v, D_V)


def _normalization(form: Form) -> int:
    """Return the code that `_walk` takes. Where every query sees all keys, "1/visible" is "1/n"."""
    name = "1/n" if form.normalization == "1/visible" and not form.weighs_positions else form.normalization
    return _NORMALIZATIONS[name]


# From Triton 3.3 on, a compiled kernel is called with its constants as well.
_COMPILED_TAKE_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


class _Launch:
    """A kernel launch with everything fixed but the addresses of its tensors.

    Remembers the kernel that Triton compiled for addresses that 16 divides, as nearly all are, and calls it
    with addresses. Otherwise Triton would find the kernel by its arguments and ask the driver about each
    tensor, which takes as long as a short kernel runs.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, int, int],
        numbers: tuple,
        constants: tuple,
        num_warps: int,
        num_stages: int = 1,
    ) -> None:
        self._kernel, self._grid, self._arguments = kernel, grid, (*numbers, *constants)
        self._options = {"num_warps": num_warps, "num_stages": num_stages}
        self._compiled = None

    def __call__(self, *tensors: Optional[torch.Tensor]) -> None:
        """Launch the kernel, which takes the tensors before the numbers and constants. Their device must be
        current.
        """
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        aligned = reduce(or_, addresses) % 16 == 0
        if aligned and self._compiled is not None:
            self._compiled(*addresses, *self._arguments)
            return
        compiled = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
        if aligned and compiled is not None and _COMPILED_TAKE_CONSTANTS:  # the interpreter compiles nothing
            self._compiled = compiled[self._grid]


@dataclass(frozen=True)
class _Tuning:
    """Positions of a chunk, the largest tile of columns of v, Triton's warps and pipeline stages, and the
    target number of segments per multiprocessor.
    """

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    segments: int = 1

    def shared_memory(self, block_d: int) -> int:
        """Bytes that `_walk` needs: the stages of q, k and v, and the state as hi and lo."""
        operands = self.chunk * (2 * block_d + self.block_v)
        return 2 * (self.num_stages * operands + 2 * block_d * self.block_v)

    def within(self, limit: int, block_d: int) -> "_Tuning":
        """Return the nearest tuning that needs at most `limit` bytes of shared memory."""
        if self.shared_memory(block_d) <= limit:
            return self
        if self.num_stages > 1:
            smaller = replace(self, num_stages=self.num_stages - 1)
        elif self.block_v > 32:
            smaller = replace(self, block_v=self.block_v // 2)
        else:
            smaller = replace(self, chunk=self.chunk // 2)
        return smaller.within(limit, block_d)


# Keyed by head_dim, padded to a power of two. A chunk costs 2 chunk (d + d_v) operations a row for the
# masked products and 6 d d_v for the state, whose registers and shared memory limit the sizes: these are the
# largest that compile for sm_90 without spilling registers. Up to 64, two programs fit a multiprocessor, and
# one works while the other waits: with two segments, forward and backward take 0.85 times as long at 64,
# with a decay 0.78 times (H200, 64k tokens, 2026-11-30). docs/linear.md has times for 64 and 128, and for
# other tunings that were tried.
_WALK = {
    16: _Tuning(64, 128, 4, 3, segments=2),
    32: _Tuning(64, 128, 4, 3, segments=2),
    64: _Tuning(64, 64, 4, 3, segments=2),
    128: _Tuning(64, 128, 8, 3),
    256: _Tuning(64, 64, 8, 2),
}
# Before compute capability 9.0, a matrix unit has both operands in registers. There the tuning above spills
# 123 of them at 128, with a decay 78. This one spills none and takes fewer instructions (compiled for 8.0,
# not timed). Where it does not fit, at 8.6 and 8.9, the shared memory leaves half of the columns above, which
# spill none either, and at 12.0 9 with a decay.
_WALK_BEFORE_9 = {**_WALK, 128: _Tuning(64, 64, 4, 2)}
_SUM = _Tuning(64, 128, 8, 4)
# With a decay, v goes through registers, and a second program works while the first one waits for it: 117
# in place of 122 µs at 64k tokens, 30 in place of 33 for four sequences of 4k (128, H200, 2026-12-01).
_SUM_WITH_DECAY = _Tuning(64, 64, 4, 4)
# Segment lengths are multiples of this, and so of any chunk.
_SEGMENT_UNIT = 128
# A sequence up to this length is one segment, which needs no states. Longer ones have shorter segments, as
# many as the GPU has multiprocessors: 1k tokens with 16 heads take 0.61 times as long forward and backward as
# with segments of this length at head size 64, and 0.56 times at 128 (H200, 2026-12-01).
_ONE_SEGMENT = 512
# Segments share a multiprocessor where each is at least as long as this. At 2k tokens and head size 64,
# segments of 128 would be slower than those of 256.
_SHORTEST_OF_SEVERAL = 256
# Limit of the second and the third axis of a grid. The first allows 2^31 - 1.
_MOST_PLACES = 65535
# A stride times the positions of a chunk, up to which 32 bits hold all distances from the first of them.
_NEAR = 2**31 - 2**16


@lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tuning(device: torch.device, d: int) -> _Tuning:
    tuning, early = _WALK[_block(d)], _WALK_BEFORE_9[_block(d)]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        if gpu.major < 9 and early.shared_memory(_block(d)) <= gpu.shared_memory_per_block_optin:
            return early
    return tuning


@lru_cache(maxsize=None)
def _walk_tuning(device: torch.device, d: int, d_v: int) -> _Tuning:
    """Return the tuning that fits the device. The interpreter has no limits."""
    block_d, tuning = _block(d), _tuning(device, d)
    tuning = replace(tuning, block_v=min(tuning.block_v, _block(d_v)))
    if device.type != "cuda":
        return tuning
    return tuning.within(torch.cuda.get_device_properties(device).shared_memory_per_block_optin, block_d)


# cu_seqlens of rows and keys, None if dense.
_Starts = tuple[Optional[torch.Tensor], Optional[torch.Tensor]]


class _Layout(NamedTuple):
    """The shape and strides of a tensor, on which a launch depends. The last stride is 1."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Sequences(NamedTuple):
    """Sequences on one device. packed: the number of packed sequences, of at most max_rows and max_keys; None
    if dense.
    """

    device: torch.device
    dtype: torch.dtype  # of all tensors
    packed: Optional[int]
    max_rows: int
    max_keys: int

    def transpose(self) -> "_Sequences":
        return self._replace(max_rows=self.max_keys, max_keys=self.max_rows)


def _segment_length(
    longest: int, positions: int, heads: int, d: int, multiprocessors: int, at_once: int
) -> int:
    """Return the positions of a segment. longest: those of the longest sequence. positions: those of all
    sequences. A multiprocessor has one segment of a head, or up to `at_once` if they are long.
    """
    one, several = (max(count * multiprocessors // heads, 1) for count in (1, at_once))
    length = max(_ceil_div(positions, several), min(_ceil_div(positions, one), _SHORTEST_OF_SEVERAL))
    # Above 128 states are larger than the keys and values of a short segment.
    if longest <= _ONE_SEGMENT or d > 128:
        length = max(length, _ONE_SEGMENT)
    return _ceil_div(length, _SEGMENT_UNIT) * _SEGMENT_UNIT


class _Segments:
    """How sequences are cut into segments, with rows laid out as q and keys as k.

    heads: those of the states. mask: that of the form, or of one of the two walks of a full form that decays.
    """

    def __init__(self, sequences: _Sequences, form: Form, q: _Layout, k: _Layout) -> None:
        self.device, self.dtype, self.form, self.packed = (
            sequences.device,
            sequences.dtype,
            form,
            sequences.packed is not None,
        )
        self.mask, self.decays = form.mask, form.decay is not None
        self.diagonal = (-1 if form.transposed else 1) if form.diagonal else 0
        self.heads = form.decay[-1] if self.decays else min(q.shape[-2], k.shape[-2])
        self.stride_of_slopes = self.heads if self.decays and len(form.decay) == 2 else 0
        self.batch = sequences.packed if self.packed else q.shape[0]
        rows, keys = (sequences.max_rows, sequences.max_keys) if self.packed else (q.shape[1], k.shape[1])
        all_rows, all_keys = (
            (q.shape[0], k.shape[0]) if self.packed else (self.batch * rows, self.batch * keys)
        )
        # By the head size of q and k, which all walks and states of a call have in common.
        length = _segment_length(
            max(rows, keys),
            max(all_rows, all_keys),
            max(q.shape[-2], self.heads),
            k.shape[-1],
            _multiprocessors(self.device),
            _tuning(self.device, k.shape[-1]).segments,
        )
        self.count = _ceil_div(rows + keys if form.diagonal else max(rows, keys), length)
        self.slots = (all_rows + all_keys) // length + self.batch if self.packed else self.batch * self.count
        self.all_rows = all_rows
        self.numbers = (rows, keys, self.count, length)

    def masked(self, mask: str) -> "_Segments":
        other = copy(self)
        other.mask = mask
        return other

    @property
    def empty(self) -> bool:
        return self.batch == 0 or self.count == 0

    def grid(self, parts: int, heads: int) -> tuple[tuple[int, int, int], bool]:
        """Return (parts, heads, batch) and False, or all on the first axis and True if another axis would be
        too short.
        """
        if max(heads, self.batch) > _MOST_PLACES:
            return (parts * heads * self.batch, 1, 1), True
        return (parts, heads, self.batch), False

    def whole(self, chunk: int, *columns: tuple[int, int]) -> bool:
        """Whether all positions of all chunks are rows and keys, and all columns of all tiles are there.
        columns: how many there are, and those of a tile.
        """
        rows, keys, *_ = self.numbers
        even = not self.packed and not self.diagonal and rows == keys and rows % chunk == 0
        return even and all(count % of_tile == 0 for count, of_tile in columns)

    def strides(self, x: _Layout) -> tuple[int, int, int]:
        """Return the strides of batch, position and head. Packed sequences have one batch."""
        return (0, *x.strides[:2]) if self.packed else x.strides[:3]


class _States:
    """Computes the state that each segment starts with, for keys and values laid out as k and v. initial,
    final: see `_scan`.
    """

    def __init__(
        self, segments: _Segments, k: _Layout, v: _Layout, initial: bool = False, final: bool = False
    ) -> None:
        mask, decays = segments.mask, segments.decays
        self._segments = segments
        self.initial, self.needed = initial, segments.count > 1 or mask == FULL or final or initial
        if not self.needed:
            return
        d, d_v, numbers, packed = k.shape[-1], v.shape[-1], segments.numbers, segments.packed
        self._shape = (segments.slots, segments.heads, d, d_v)
        tuning = _SUM_WITH_DECAY if decays and d_v <= 128 else _SUM
        block_d, block_v = min(_block(d), 128), min(_block(d_v), tuning.block_v)
        tiles = _ceil_div(d, block_d) * _ceil_div(d_v, block_v)
        grid, flat = segments.grid(segments.count * tiles, segments.heads)
        self._sum = _Launch(
            _sum_segments, grid,
            (*numbers, segments.heads, segments.stride_of_slopes, *segments.strides(k),
             *segments.strides(v)),
            (d, d_v, block_d, block_v, tuning.chunk, max(k.shape[-2] // segments.heads, 1), _MASKS[mask],
             segments.form.weighs_positions and segments.form.transposed,
             segments.form.row_factors == ROW and segments.form.transposed,
             max(segments.heads // k.shape[-2], 1), decays, segments.diagonal, packed, final, flat,
             segments.whole(tuning.chunk, (d, block_d), (d_v, block_v)), _near(tuning.chunk, k, v)),
            tuning.num_warps if block_d * block_v > 4096 else 4, tuning.num_stages,
        )  # fmt: skip
        self._scan = None
        if segments.count > 1 or final or initial:
            block = min(_block(d * d_v), 512)
            grid, flat = segments.grid(_ceil_div(d * d_v, block), segments.heads)
            self._scan = _Launch(
                _scan, grid, (*numbers, segments.heads, segments.stride_of_slopes),
                (d * d_v, block, _MASKS[mask], decays, segments.diagonal, packed, initial, final, flat),
                num_warps=4,
            )  # fmt: skip

    def __call__(
        self, k: torch.Tensor, v: torch.Tensor, starts: _Starts, given: Given = NOTHING,
        initial: Optional[torch.Tensor] = None, final: Optional[torch.Tensor] = None,
    ) -> Optional[torch.Tensor]:  # fmt: skip
        """Return the states, (slots, heads, d, d_v); None if all segments start from zero."""
        if not self.needed:
            return None
        sums = k.new_empty(self._shape, dtype=torch.float32)
        self._sum(k, v, sums, *given, *starts)
        if self._scan is not None:
            self._scan(sums, initial, final, given.decay_slopes, given.diagonal, *starts)
        return sums

    def after(
        self, initial: Optional[torch.Tensor], states: torch.Tensor, given: Given
    ) -> Optional[torch.Tensor]:
        """Return the states of dense sequences that start from `initial`, if `states` are those that start
        from zero, with a causal or anticausal mask.
        """
        if not self.needed or initial is None:
            return states if self.needed else None
        rows, keys, count, length = self._segments.numbers
        initial = initial[:, None]
        if given.decay_slopes is not None:
            begin = torch.arange(0, count * length, length, device=states.device)
            total = max(rows, keys)
            passed = begin if self._segments.mask == CAUSAL else total - (begin + length).clamp(max=total)
            exponents = -given.decay_slopes[..., None, :] * passed[:, None]  # (…, segments, heads)
            initial = initial * exponents.exp()[..., None, None]
        return (states.unflatten(0, (-1, count)) + initial).flatten(0, 1)


_WALKS = (CAUSAL, ANTICAUSAL)  # of the full form with a decay


class _TwoStates:
    """The states of a full form that decays: from the first segment on, and from the last one on."""

    def __init__(self, segments: _Segments, k: _Layout, v: _Layout, initial: bool = False) -> None:
        self.parts = tuple(_States(segments.masked(mask), k, v, initial) for mask in _WALKS)

    def __call__(
        self, k: torch.Tensor, v: torch.Tensor, starts: _Starts, given: Given,
        *initial: Optional[torch.Tensor],
    ) -> tuple[Optional[torch.Tensor], ...]:  # fmt: skip
        """initial: the states before the first segment and behind the last one."""
        return tuple(
            part(k, v, starts, given, start) for part, start in zip(self.parts, initial or (None, None))
        )


class _Walk:
    """Computes the output of rows laid out as q, with keys and values laid out as k and v. form: that of the
    segments or one with their mask. swapped: the states are those of (v, k). first, second: whether it is the
    first or the second walk of a full form that decays. The first one returns a float32 sum for the second.
    """

    def __init__(
        self,
        segments: _Segments,
        form: Form,
        q: _Layout,
        k: _Layout,
        v: _Layout,
        states: _States,
        swapped: bool = False,
        first: bool = False,
        second: bool = False,
    ) -> None:
        nheads, d, d_v, half = q.shape[-2], q.shape[-1], v.shape[-1], segments.dtype == torch.float16
        shared_q, shared_k = (max(segments.heads // x.shape[-2], 1) for x in (q, k))
        # A head of rows that serves several states has a place in the result for each.
        self._summed = 1 if first else shared_q
        self._to = form.out_dtype(segments.dtype)
        self._dtype = torch.float32 if first or shared_q > 1 else self._to
        self._saturates = form.output_saturates and not form.wide
        nheads *= shared_q
        self._shape = (*q.shape[:-2], nheads, d_v)
        tuning = _walk_tuning(segments.device, d, d_v)
        out_strides = (0 if segments.packed else q.shape[1] * nheads * d_v, nheads * d_v, d_v)
        out_like = _Layout(self._shape, (*out_strides, 1))
        # Registers are left for the distances of one stride; at 256 for none.
        alike = len({x.strides[-3] for x in (q, k, v, out_like)}) == 1
        near = alike and d <= 128 and _near(tuning.chunk, q)
        grid, flat = segments.grid(segments.count * _ceil_div(d_v, tuning.block_v), nheads)
        self._walk = _Launch(
            _walk, grid,
            (
                *segments.numbers, segments.batch, nheads, segments.all_rows, form.softmax_scale,
                form.factor, segments.stride_of_slopes,
                *segments.strides(q), *segments.strides(k), *segments.strides(v), *out_strides,
                *((1, d) if swapped else (d_v, 1)),
            ),
            (
                d, d_v, _block(d), tuning.block_v, tuning.chunk, nheads // segments.heads,
                max(k.shape[-2] // segments.heads, 1), shared_q, shared_k, _MASKS[segments.mask], second,
                segments.decays, second, form.transposed, _normalization(form),
                _ROW_FACTORS[form.row_factors], segments.diagonal, segments.packed,
                states.needed, states.initial, flat,
                # bfloat16 never saturates: share one kernel.
                half and form.weights_saturate,
                half and form.output_saturates and self._dtype == segments.dtype,
                segments.whole(tuning.chunk, (d, _block(d)), (d_v, tuning.block_v)),
                near,
            ),
            tuning.num_warps, tuning.num_stages,
        )  # fmt: skip

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: Optional[torch.Tensor],
        starts: _Starts, given: Given = NOTHING, partial: Optional[torch.Tensor] = None,
        out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:  # fmt: skip
        """out: see `attend`."""
        if out is None or self._summed > 1:
            out = q.new_empty(self._shape, dtype=self._dtype)
        self._walk(q, k, v, out, states, *given, partial, *starts)
        if self._summed == 1:
            return out
        out = out.unflatten(-2, (-1, self._summed)).sum(-2)
        return (saturate_(out, q.dtype) if self._saturates else out).to(self._to)


class _TwoWalks:
    """Computes the output of a full form that decays, with the arguments of `_Walk`."""

    def __init__(
        self, segments: _Segments, form: Form, q: _Layout, k: _Layout, v: _Layout, states: _TwoStates,
        swapped: bool = False,
    ) -> None:  # fmt: skip
        self._parts = tuple(
            _Walk(segments.masked(mask), form, q, k, v, states.parts[i], swapped, first=i == 0, second=i == 1)
            for i, mask in enumerate(_WALKS)
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: tuple, starts: _Starts, given: Given,
        out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:  # fmt: skip
        first, second = self._parts
        partial = first(q, k, v, states[0], starts, given)
        return second(q, k, v, states[1], starts, given, partial, out)


def _steps(segments: _Segments) -> tuple[type, type]:
    """Return the classes that compute the states and the output."""
    twice = segments.mask == FULL and segments.decays
    return (_TwoStates, _TwoWalks) if twice else (_States, _Walk)


# Triton's own versions of these two are too slow on the host.
def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _block(size: int) -> int:
    """Round a side of a tile up to a power of two from 16 on, as tensor cores require."""
    return max(1 << (size - 1).bit_length(), 16)


def _laid_out(x: torch.Tensor) -> tuple[torch.Tensor, _Layout]:
    """Return x with a last stride of 1, copied if need be, and its layout."""
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, _Layout(x.shape, strides)


def _near(chunk: int, *tensors: _Layout) -> bool:
    """Whether distances within a chunk fit 32 bits."""
    return all(x.strides[-3] < _NEAR // chunk for x in tensors)


# Calls that look the same share a plan. A plan of None means that there is nothing to compute.
_MOST_PLANS = 1024


@lru_cache(_MOST_PLANS)
def _forward_plan(
    sequences: _Sequences,
    form: Form,
    q: _Layout,
    k: _Layout,
    v: _Layout,
    initial: bool = False,
    final: bool = False,
) -> Optional[tuple[_States, _Walk]]:
    segments = _Segments(sequences, form, q, k)
    if segments.empty:
        return None
    find_states, walk = _steps(segments)
    states = find_states(segments, k, v, initial, *([final] if final else []))
    return states, walk(segments, form, q, k, v, states)


@lru_cache(_MOST_PLANS)
def _backward_plan(
    sequences: _Sequences,
    form: Form,
    dout: _Layout,
    q: _Layout,
    k: _Layout,
    v: _Layout,
    initial: bool = False,
) -> Optional[tuple[_States, _Walk, _States, _Walk, _Walk]]:
    """dk and dv use the same states, transposed for dk. dq uses the states of the output, transposed."""
    there = _Segments(sequences, form, q, k)
    if there.empty:
        return None
    back = _Segments(sequences.transpose(), form.of_dk(), k, q)
    find_states, walk = _steps(there)
    states, back_states = find_states(there, k, v, initial), find_states(back, q, dout, initial)
    dq = walk(there, form.of_dq(), dout, v, k, states, swapped=True)
    dk = walk(back, form.of_dk(), v, dout, q, back_states, swapped=True)
    return states, dq, back_states, dk, walk(back, form.of_dv(), k, q, dout, back_states)


def _sequences(q: torch.Tensor, cu_rows: Optional[torch.Tensor], max_rows: int, max_keys: int) -> _Sequences:
    return _Sequences(
        q.device, q.dtype, None if cu_rows is None else cu_rows.shape[0] - 1, max_rows, max_keys
    )


def _contiguous(given: Given) -> Given:
    if given is NOTHING:
        return given
    return Given(*[x if x is None else x.contiguous() for x in given])


def _starting(initial: tuple) -> tuple[bool, tuple]:
    """Return whether a state is given, and the states as the kernels take them. initial: the states before
    and behind the positions, either None for zeros; empty without any.
    """
    there = [x for x in initial if x is not None]
    if not there:
        return False, ()
    return True, tuple(torch.zeros_like(there[0]) if x is None else x.contiguous() for x in initial)


def attend(
    q, k, v, form, cu_rows, cu_keys, max_rows, max_keys, given=NOTHING, *initial: Optional[torch.Tensor],
    states: Optional[torch.Tensor] = None, out: Optional[torch.Tensor] = None,
) -> torch.Tensor:  # fmt: skip
    """See primitive.attend and primitive.attend_between. states: as `state_of` returns them. out: takes the
    result where it can; it has its shape and dtype, and is contiguous.
    """
    (q, like_q), (k, like_k), (v, like_v) = _laid_out(q), _laid_out(k), _laid_out(v)
    starting, initial = _starting(initial)
    sequences = _sequences(q, cu_rows, max_rows, max_keys)
    plan = _forward_plan(sequences, form, like_q, like_k, like_v, starting)
    if plan is None:
        return q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=form.out_dtype(q.dtype))
    find_states, walk = plan
    starts, given = (cu_rows, cu_keys), _contiguous(given)
    with torch.cuda.device_of(q):
        if states is None:
            states = find_states(k, v, starts, given, *initial)
        else:
            states = find_states.after(*(initial or (None,)), states, given)
        return walk(q, k, v, states, starts, given, out=out)


@lru_cache(_MOST_PLANS)
def _state_plan(
    sequences: _Sequences, form: Form, q: _Layout, k: _Layout, v: _Layout, late: bool
) -> Optional[_States]:
    segments = _Segments(sequences, form, q, k).masked(CAUSAL if late else ANTICAUSAL)
    return None if segments.empty else _States(segments, k, v, final=True)


def state_of(q, k, v, form, given, late) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """See primitive.state_of. The states that each segment starts with, from zero on, come second."""
    (k, like_k), (v, like_v), (_, like_q) = _laid_out(k), _laid_out(v), _laid_out(q)
    plan = _state_plan(_sequences(k, None, 0, 0), form, like_q, like_k, like_v, late)
    heads = form.decay[-1] if form.decay is not None else min(q.shape[-2], k.shape[-2])
    shape = (k.shape[0], heads, k.shape[-1], v.shape[-1])
    if plan is None:
        return k.new_zeros(shape, dtype=torch.float32), None
    final = k.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(k):
        return final, plan(k, v, (None, None), _contiguous(given), None, final)


def attend_with_state(
    q, k, v, form, state, cu_seqlens=None, given=NOTHING
) -> tuple[torch.Tensor, torch.Tensor]:
    """See primitive.attend_with_state."""
    (q, like_q), (k, like_k), (v, like_v) = _laid_out(q), _laid_out(k), _laid_out(v)
    # The length of the longest sequence is on the GPU, and a limit does as well.
    sequences, starts = _sequences(q, cu_seqlens, len(q), len(q)), (cu_seqlens, cu_seqlens)
    before, given = state is not None, _contiguous(given)
    plan = _forward_plan(sequences, form, like_q, like_k, like_v, initial=before, final=True)
    batch = q.shape[0] if cu_seqlens is None else sequences.packed
    shape = (batch, k.shape[-2], q.shape[-1], v.shape[-1])
    if plan is None:
        unchanged = state.clone() if before else q.new_zeros(shape, dtype=torch.float32)
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), unchanged
    find_states, walk = plan
    initial, final = state.contiguous() if before else None, q.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(q):
        states = find_states(k, v, starts, given, initial, final)
        return walk(q, k, v, states, starts, given), final


def gradients(
    dout, q, k, v, form, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given=NOTHING, there=(),
    back=(), states_back: Optional[torch.Tensor] = None, outs: tuple = (None, None, None),
) -> tuple:  # fmt: skip
    """See primitive.gradients and primitive.gradients_between. states_back: as `state_of` returns them. outs:
    take the results, as in `attend`.
    """
    (dout, like_dout), (q, like_q), (k, like_k), (v, like_v) = (
        _laid_out(dout),
        _laid_out(q),
        _laid_out(k),
        _laid_out(v),
    )
    (starts_there, there), (starts_back, back) = _starting(there), _starting(back)
    if starts_there != starts_back:  # one plan for both
        like = (there or back)[0]
        zeros = tuple(torch.zeros_like(like) for _ in there or back)
        there, back = (there, zeros) if starts_there else (zeros, back)
    plan = _backward_plan(
        _sequences(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k), form, like_dout, like_q, like_k, like_v,
        starts_there or starts_back,
    )  # fmt: skip
    if plan is None:
        return tuple(torch.zeros_like(x, dtype=form.out_dtype(x.dtype)) for x in (q, k, v))
    find_states, find_dq, find_back_states, find_dk, find_dv = plan
    starts, swapped = (cu_seqlens_q, cu_seqlens_k), (cu_seqlens_k, cu_seqlens_q)
    given = _contiguous(given)
    with torch.cuda.device_of(q):
        states = find_states(k, v, starts, given, *there)
        dq = find_dq(dout, v, k, states, starts, given, out=outs[0])
        del states
        if states_back is None:
            states = find_back_states(q, dout, swapped, given, *back)
        else:
            states = find_back_states.after(*(back or (None,)), states_back, given)
        dk = find_dk(v, dout, q, states, swapped, given, out=outs[1])
        return dq, dk, find_dv(k, q, dout, states, swapped, given, out=outs[2])


_INCREMENT_VERSION = getattr(torch.autograd.graph, "increment_version", None)  # not in every torch
# The entries of a tile of the state in `_token`.
_TOKEN_TILE = 4096


@lru_cache(_MOST_PLANS)
def _token_plan(
    q: _Layout, k: _Layout, v: _Layout, state: tuple, scale: float, factors: bool, decay: Optional[tuple],
    slots: bool,
) -> _Launch:  # fmt: skip
    (batch, nheads, d), (heads, d_v) = q.shape, v.shape[1:]
    block_d = _block(d)
    block_v = min(_block(d_v), max(_TOKEN_TILE // block_d, 16))
    tiles, flat = _ceil_div(d_v, block_v), max(heads, batch) > _MOST_PLACES
    stride_of_slopes = heads if decay is not None and len(decay) == 2 else 0
    return _Launch(
        _token, (tiles * heads * batch, 1, 1) if flat else (tiles, heads, batch),
        (heads, scale, stride_of_slopes, *q.strides[:2], *k.strides[:2], *v.strides[:2], *state),
        (d, d_v, block_d, block_v, nheads // heads, factors, decay is not None, slots, flat), num_warps=4,
    )  # fmt: skip


def step(q, k, v, state, scale, given=NOTHING, slots=None) -> torch.Tensor:
    """Add one token to each state, in place, and attend: see state.linear_attention_step. scale:
    softmax_scale times a factor that all rows share. slots: the states of the sequences, or None. Returns
    out.
    """
    (q, like_q), (k, like_k), (v, like_v) = _laid_out(q), _laid_out(k), _laid_out(v)
    out, given = q.new_empty(*q.shape[:-1], v.shape[-1]), _contiguous(given)
    if out.shape[0] == 0:
        return out
    decay = None if given.decay_slopes is None else tuple(given.decay_slopes.shape)
    launch = _token_plan(
        like_q, like_k, like_v, state.stride(), scale, given.row_factors is not None, decay, slots is not None
    )
    with torch.cuda.device_of(q):
        launch(q, k, v, state, out, given.row_factors, given.decay_slopes, slots)
    if _INCREMENT_VERSION is not None:  # as an operator in place does, so that autograd notices the change
        _INCREMENT_VERSION(state)
    return out
