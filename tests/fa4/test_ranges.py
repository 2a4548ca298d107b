"""The blocks that tiles visit under flash_attn.masks.HSTU and in a window with a diagonal, in Python's
integers: the kernels run the same functions of ranges.py.
"""

import random
from itertools import product

import numpy as np
import pytest
from drawn_masks import Case, Window, drawn, drawn_intervals, drawn_part, drawn_window, interval_ranges
from overlay_package import module

ranges = module("ranges")

CASES = 6000
TILES = ((128, 128), (192, 128), (64, 128), (64, 64), (128, 80), (32, 64), (16, 16), (192, 112), (80, 128))


def tiled(entries: np.ndarray, tile_m: int, tile_n: int) -> np.ndarray:
    """Whether any entry of each tile is set, (blocks of queries, blocks of keys)."""
    rows, keys = (-size % tile for size, tile in zip(entries.shape, (tile_m, tile_n)))
    padded = np.pad(entries, ((0, rows), (0, keys)))
    return padded.reshape(padded.shape[0] // tile_m, tile_m, -1, tile_n).any(axis=(1, 3))


def visits(blocks, name: str) -> tuple[list[int], list[int]]:
    """Return the blocks before and from `split` on."""
    assert all(first <= end for first, end in blocks.ranges), (name, blocks.ranges)
    order = [blocks.physical(index) for index in range(blocks.count)]
    assert len(set(order)) == len(order), (name, blocks.ranges)
    return order[: blocks.split], order[blocks.split :]


drawing = pytest.mark.parametrize("drawn", [drawn, drawn_part, drawn_window])


@pytest.mark.slow
@drawing
@pytest.mark.parametrize("part", range(4))
def test_tiles_visit_what_they_see(part, drawn):
    """Each tile visits the blocks with an entry that it sees and no other, and blocks without a mask are
    wholly visible. Forward and backward visit the same, which the deterministic order of dQ relies on."""
    extra = interior = 0
    for seed in range(part, CASES, 4):
        case = drawn(seed)
        if not case.seqlen_q or not case.seqlen_k:
            continue
        tile_m, tile_n = TILES[seed // 4 % len(TILES)]
        seen, sequence = case.visible(), case.sequence
        wanted, hidden = tiled(seen, tile_m, tile_n), tiled(~seen, tile_m, tile_n)
        forward, backward = np.zeros_like(wanted), np.zeros_like(wanted)
        for m in range(len(wanted)):
            plain, masked = visits(sequence.keys(m, tile_m, tile_n), (case, m))
            assert not hidden[m, plain].any(), (case, m)
            forward[m, plain + masked] = True
            interior += len(plain)
        for n in range(wanted.shape[1]):
            masked, plain = visits(sequence.queries(n, tile_m, tile_n), (case, n))
            assert not hidden[plain, n].any(), (case, n)
            backward[plain + masked, n] = True
            interior += len(plain)
            for m in plain + masked:
                turn = sequence.turn(n, m, tile_m, tile_n)
                assert turn == forward[m, :n].sum(), (case, m, n)
        assert (forward >= wanted).all(), case
        assert (backward >= wanted).all(), case
        assert (forward == backward).all(), case
        extra += (forward & ~wanted).sum()
    assert extra == 0
    assert interior > 1000


def test_blocks_without_a_mask_are_found():
    """Every block that is wholly visible, but for those of contextual rows and with a row behind the window,
    is left without a mask where the mask is causal with targets."""
    case = Case(2048, 2048, 20, 0, 0, 0, 1)
    hidden = tiled(~case.visible(), 128, 128)
    for m in range(16):
        plain, _ = visits(case.sequence.keys(m, 128, 128), m)
        assert sorted(plain) == list(np.flatnonzero(~hidden[m])), m
    for n in range(16):
        _, plain = visits(case.sequence.queries(n, 128, 128), n)
        assert sorted(plain) == list(np.flatnonzero(~hidden[:, n])), n


@pytest.mark.parametrize("drawn", [drawn, drawn_part])
@pytest.mark.parametrize("part", range(2))
def test_what_a_part_of_a_tile_skips(part, drawn):
    """A warp group skips the block that its tile visits first only if none of its rows sees a key of it."""
    skipped = kept = 0
    for seed in range(part, CASES // 2, 2):
        case = drawn(20_000 + seed)
        tile_m, rows, tile_n = ((128, 64, 64), (128, 64, 80), (32, 16, 16))[seed // 2 % 3]
        seen, sequence = case.visible(), case.sequence
        for m in range(-(-case.seqlen_q // tile_m)):
            blocks = sequence.keys(m, tile_m, tile_n)
            if blocks.count == 0:
                continue
            key = blocks.physical(blocks.count - 1) * tile_n
            for row in range(m * tile_m, min((m + 1) * tile_m, case.seqlen_q), rows):
                at = row + sequence.offset
                hidden = not seen[row : row + rows, key : key + tile_n].any()
                skips = bool(sequence.hides_from(key, at, at + rows - 1))
                assert hidden or not skips, (case, m, row)
                skipped, kept = skipped + skips, kept + (hidden and not skips)
    assert skipped > 300 and kept < skipped, (skipped, kept)


@drawing
@pytest.mark.parametrize("part", range(2))
def test_entries(part, drawn):
    """The intervals of a row and those of a key are the mask, and rows count their keys."""
    for seed in range(part, CASES // 4, 2):
        case = drawn(10_000 + seed, most=120)
        seen, sequence = case.visible(), case.sequence
        by_row, by_key = np.zeros_like(seen), np.zeros_like(seen)
        for row in range(case.seqlen_q):
            for first, end in sequence.of_row(row + sequence.offset):
                by_row[row, max(first, 0) : max(end, 0)] = True
            assert sequence.visible(row + sequence.offset) == seen[row].sum(), (case, row)
        for key in range(case.seqlen_k):
            for first, end in sequence.of_key(key):
                by_key[max(first - sequence.offset, 0) : max(end - sequence.offset, 0), key] = True
        assert (by_row == seen).all(), case
        assert (by_key == seen).all(), case


@pytest.mark.parametrize("left, right", [(None, None), (None, 0), (100, 0), (0, None), (70, 300)])
def test_blocks_in_a_window_without_a_mask_are_found(left, right):
    """Every block that is wholly visible, of rows that lie among the keys, before them and behind them."""
    for diagonal in (-300, 0, 128, 500, 900):
        case = Window(640, 768, diagonal, left, right)
        hidden = tiled(~case.visible(), 128, 64)
        for m in range(5):
            plain, _ = visits(case.sequence.keys(m, 128, 64), m)
            assert sorted(plain) == list(np.flatnonzero(~hidden[m])), (case, m)
        for n in range(12):
            _, plain = visits(case.sequence.queries(n, 128, 64), n)
            assert sorted(plain) == list(np.flatnonzero(~hidden[:, n])), (case, n)


@pytest.mark.parametrize("lengths", [(1, 1), (5, 2**29 - 1), (2**29 - 1, 5), (2**29 - 1, 2**29 - 1)])
@pytest.mark.parametrize("diagonal", [-(2**30), -(2**29), 0, 2**29 - 6, 2**30])
def test_sums_of_a_window_stay_in_32_bits(diagonal, lengths):
    sides = None, *map(np.int32, (0, 1, 2**30))
    for left, right in product(sides, sides):
        case = Window(*map(np.int32, (*lengths, diagonal)), left, right)
        wide = Window(*(x if x is None else int(x) for x in case)).sequence
        m_blocks, n_blocks = ({0, length // 512, (length - 1) // 128} for length in lengths)
        with np.errstate(over="raise"):
            for m, n in product(m_blocks, n_blocks):
                for name, block in (("keys", m), ("queries", n)):
                    found = getattr(case.sequence, name)(np.int32(block), 128, 128)
                    expected = getattr(wide, name)(block, 128, 128)
                    assert found.ranges == expected.ranges, (case, name, block)
                assert case.sequence.turn(np.int32(n), np.int32(m), 128, 128) == wide.turn(n, m, 128, 128)
                row, key = np.int32(m * 128 + 127), np.int32(n * 128)
                for seen, first in (
                    (case.sequence.of_row(row + case.diagonal), key),
                    (case.sequence.of_key(key), row - np.int32(127) + case.diagonal),
                ):
                    [x - first for x in seen[0]]  # the bits that the mask counts


def test_counts_are_clamped():
    """Only the device knows counts of CUDA tensors: too many must not lead out of the sequence."""
    sequence = Case(50, 50, 70, 10, 0, 0, 1).sequence
    assert (sequence.targets, sequence.contexts) == (50, 0)
    sequence = Case(50, 50, -3, 90, 0, 0, 1).sequence
    assert (sequence.targets, sequence.contexts) == (0, 50)


# ---- Intervals


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_tiles_under_intervals(part):
    visited, needed = 0, 0
    for seed in range(part, CASES // 2, 2):
        draw = random.Random(seed)
        seqlen_q, seqlen_k, k = draw.randint(1, 300), draw.randint(1, 400), draw.randint(1, 3)
        tile_m, tile_n = TILES[seed // 2 % len(TILES)]
        starts, ends = drawn_intervals(seed, seqlen_q, seqlen_k, k)
        key = np.arange(seqlen_k)
        seen = ((key >= starts[..., None]) & (key < ends[..., None])).any(1)
        sequence = interval_ranges(starts, ends, seqlen_k, tile_m, tile_n)
        wanted, hidden = tiled(seen, tile_m, tile_n), tiled(~seen, tile_m, tile_n)
        forward, backward = np.zeros_like(wanted), np.zeros_like(wanted)
        for m in range(len(wanted)):
            plain, masked = visits(sequence.keys(m, tile_m, tile_n), (seed, m))
            assert not hidden[m, plain].any(), (seed, m)
            forward[m, plain + masked] = True
            for n in range(wanted.shape[1]):
                shown = sequence.shows_all(m, n, tile_n)
                assert not (shown and hidden[m, n]), (seed, m, n)
                assert shown or n not in plain
        for n in range(wanted.shape[1]):
            masked, plain = visits(sequence.queries(n, tile_m, tile_n), (seed, n))
            assert not plain
            backward[masked, n] = True
        for row in range(seqlen_q):
            assert sequence.visible(row + sequence.offset) == seen[row].sum()
        assert (forward >= wanted).all() and (backward >= wanted).all(), seed
        if seed % 3 == 0:
            visited, needed = visited + forward.sum() + backward.sum(), needed + 2 * wanted.sum()
    assert visited < 1.2 * needed, "windows visit few hidden blocks"


def test_contents_that_leave_the_sequence_are_clamped():
    """The host does not read CUDA tensors."""
    starts, ends = np.array([[-5, 30]]), np.array([[4, 90]])
    sequence = interval_ranges(starts, ends, 40, 16, 16)
    assert sequence.of_row(39) == ((0, 4), (30, 40)) and sequence.visible(39) == 14
    assert visits(sequence.keys(0, 16, 16), "") == ([], [0, 1, 2])


def test_packed_sequences_have_room_in_a_table():
    """Slots of sequences of any lengths are apart and inside."""
    draw = random.Random(0)
    for _ in range(2000):
        tile, before = draw.choice([16, 64, 80, 192]), draw.choice([0, draw.randint(1, 300)])
        lengths = [draw.choice([0, 1, draw.randint(0, 500)]) for _ in range(draw.randint(1, 6))]
        taken, offset = [], before
        for b, n in enumerate(lengths):
            first = ranges.first_slot(offset, b, n, tile, True)
            taken += range(first, first + -(-n // tile))
            offset += n
        assert len(set(taken)) == len(taken)
        assert all(slot < ranges.slots(len(lengths), offset, tile, True) for slot in taken)
