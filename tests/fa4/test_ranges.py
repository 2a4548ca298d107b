"""The blocks that tiles visit under flash_attn.masks.HSTU, in Python's integers: the kernels run the same
functions of ranges.py.

The reference is the definition by comparison of positions, of generative-recommenders with groups.
"""

import random
from typing import NamedTuple

import numpy as np
import pytest

from overlay_package import module

HSTUKind = module("marker").HSTUKind
ranges = module("ranges")

CASES = 6000
TILES = ((128, 128), (64, 128), (64, 64), (128, 80), (32, 64), (16, 16), (192, 112), (80, 128))


class Case(NamedTuple):
    seqlen_q: int
    seqlen_k: int
    targets: int
    contexts: int
    window: int
    full: int
    group: int

    @property
    def kind(self) -> tuple:
        """A kernel that is compiled without a part runs calls that lack it. One compiled with counts by
        sequence meets counts of 0 too."""
        return HSTUKind(
            "sequence" if self.targets or self.seqlen_k % 2 else None,
            "sequence" if self.contexts or self.seqlen_k % 3 else None,
            self.window > 0, self.window > 0 and self.full > 0, self.group > 1,
        )  # fmt: skip

    @property
    def sequence(self):
        numbers = dict(zip(HSTUKind._fields, self[2:]))
        return ranges.HSTURanges.of(ranges.Ints, self.kind, self.seqlen_q, self.seqlen_k, numbers)

    def visible(self) -> np.ndarray:
        """(seqlen_q, seqlen_k)"""
        n, C, W = self.seqlen_k, self.contexts, self.window
        H = n - self.targets
        i = np.arange(n)
        p = np.clip(i - C + 1, 0, H - C + 1) if C else np.minimum(i, H)
        Q = H - C + 1 if C else H
        row, key = p[:, None], p[None]
        distant = (row - key > W) & ~((self.full > 0) & (row >= Q - self.full)) if W else False
        seen = ((row > key) | (i[:, None] == i)) & ~distant | ((C > 0) & (row == 0) & (key < Q))
        # A target sees those of its group up to itself.
        group = np.where(i < H, -1, (i - H) // self.group)
        is_target = i >= H
        among = is_target[:, None] & is_target
        seen = np.where(among, (group[:, None] == group) & (i[:, None] >= i), seen)
        out = np.zeros((self.seqlen_q, n), bool)
        rows = min(self.seqlen_q, n)
        if rows:
            out[self.seqlen_q - rows :] = seen[n - rows :]
        return out


def drawn(seed: int, most: int = 700) -> Case:
    draw = random.Random(seed)
    n = draw.choice([draw.randint(0, 40), draw.randint(1, 300), draw.randint(1, most)])
    targets = draw.choice([0, min(n, draw.randint(1, 20)), draw.randint(0, n)])
    contexts = draw.choice([0, min(n - targets, draw.randint(1, 10)), draw.randint(0, n - targets)])
    window = draw.choice([0, draw.randint(1, 20), draw.randint(1, max(n, 1) + 5)])
    full = draw.choice([0, draw.randint(1, max(n // 2, 1))]) if window else 0
    queries = draw.choice([n, n, draw.randint(1, max(n, 1)), n + draw.randint(0, 40)])
    group = draw.choice([1, draw.randint(2, 9), draw.randint(10, 200)])
    return Case(queries, n, targets, contexts, window, full, group)


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


@pytest.mark.parametrize("part", range(4))
def test_tiles_visit_what_they_see(part):
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
            plain, masked = visits(sequence.keys(m * tile_m, (m + 1) * tile_m, tile_n), (case, m))
            assert not hidden[m, plain].any(), (case, m)
            forward[m, plain + masked] = True
            interior += len(plain)
        for n in range(wanted.shape[1]):
            masked, plain = visits(sequence.queries(n * tile_n, (n + 1) * tile_n, tile_m), (case, n))
            assert not hidden[plain, n].any(), (case, n)
            backward[plain + masked, n] = True
            interior += len(plain)
            for m in plain + masked:
                turn = sequence.turn(n, m * tile_m, (m + 1) * tile_m, tile_n)
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
        plain, _ = visits(case.sequence.keys(m * 128, (m + 1) * 128, 128), m)
        assert sorted(plain) == list(np.flatnonzero(~hidden[m])), m
    for n in range(16):
        _, plain = visits(case.sequence.queries(n * 128, (n + 1) * 128, 128), n)
        assert sorted(plain) == list(np.flatnonzero(~hidden[:, n])), n


@pytest.mark.parametrize("part", range(2))
def test_entries(part):
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


def test_counts_are_clamped():
    """Only the device knows counts of CUDA tensors: too many must not lead out of the sequence."""
    sequence = Case(50, 50, 70, 10, 0, 0, 1).sequence
    assert (sequence.targets, sequence.contexts) == (50, 0)
    sequence = Case(50, 50, -3, 90, 0, 0, 1).sequence
    assert (sequence.targets, sequence.contexts) == (0, 50)
