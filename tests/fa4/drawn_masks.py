"""Draw masks of flash_attn.masks, and windows with a diagonal, for the tests of ranges.py and of the tile
loops, with their definition.

The reference is the definition by comparison of positions, of generative-recommenders with groups.
"""

import random
from typing import NamedTuple

import numpy as np
from overlay_package import module

HSTUKind = module("marker").HSTUKind
ranges = module("ranges")


class Case(NamedTuple):
    seqlen_q: int
    seqlen_k: int
    targets: int
    contexts: int
    window: int
    full: int
    group: int
    diagonal: int | None = None

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
        numbers = dict(zip(HSTUKind._fields, self[2:-1]))
        lengths = self.seqlen_q, self.seqlen_k
        return ranges.HSTURanges.of(ranges.Ints, self.kind, *lengths, numbers, self.diagonal)

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
        first = n - self.seqlen_q if self.diagonal is None else self.diagonal
        before = min(max(-first, 0), self.seqlen_q)  # rows before position 0 see nothing
        out[before:] = seen[first + before :][: self.seqlen_q - before]
        return out


class Window(NamedTuple):
    """A window of `left` and `right` keys, None without limit."""

    seqlen_q: int
    seqlen_k: int
    diagonal: int
    left: int | None
    right: int | None

    @property
    def sequence(self):
        return ranges.WindowRanges(ranges.Ints, *self)

    def visible(self) -> np.ndarray:
        """(seqlen_q, seqlen_k)"""
        distance = np.arange(self.seqlen_k) - (np.arange(self.seqlen_q)[:, None] + self.diagonal)
        seen = np.ones_like(distance, bool)
        if self.left is not None:
            seen &= distance >= -self.left
        if self.right is not None:
            seen &= distance <= self.right
        return seen


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


def drawn_part(seed: int, most: int = 700) -> Case:
    """A mask with a diagonal: some of its rows, or rows before position 0."""
    case, draw = drawn(seed, most), random.Random(-seed)
    queries = draw.choice([case.seqlen_q, draw.randint(0, case.seqlen_k)])
    diagonal = draw.randint(-draw.choice([0, 30]), max(case.seqlen_k - queries, 0))
    return case._replace(seqlen_q=min(queries, case.seqlen_k - diagonal), diagonal=diagonal)


def drawn_window(seed: int, most: int = 700) -> Window:
    """A window whose queries lie before, among or behind the keys, or far away."""
    draw = random.Random(seed)
    seqlen_q, seqlen_k = (draw.choice([draw.randint(0, 40), draw.randint(1, most)]) for _ in "qk")
    diagonal = draw.choice([
        draw.randint(-seqlen_q - 20, seqlen_k + 20), seqlen_k - seqlen_q, -(2**30), 2**30,
    ])  # fmt: skip
    sides = (draw.choice([None, 0, draw.randint(0, 30), draw.randint(0, most), 2**30]) for _ in "lr")
    return Window(seqlen_q, seqlen_k, diagonal, *sides)


def drawn_intervals(seed: int, seqlen_q: int, seqlen_k: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals that ascend and are apart, (seqlen_q, k). Some are not used, and some rows see nothing; in a
    third of the cases they move along with the rows, as windows do."""
    draw = np.random.default_rng(seed)
    if seed % 3:
        cuts = np.sort(draw.integers(0, seqlen_k + 1, (seqlen_q, 2 * k)), axis=1)
        starts, ends = cuts[:, ::2].copy(), cuts[:, 1::2].copy()
    else:
        row = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        last = np.clip(row + 1, 0, seqlen_k)
        width = int(draw.integers(1, seqlen_k + 1))
        starts = np.concatenate([np.maximum(last - width, 0)] * k, 1)
        ends = np.concatenate([last] * k, 1)
        ends[:, :-1] = starts[:, :-1]
    unused = draw.random(starts.shape) < draw.choice([0.0, 0.1, 0.7])
    ends[unused] = starts[unused]
    return starts, ends


def interval_ranges(starts: np.ndarray, ends: np.ndarray, seqlen_k: int, tile_m: int, tile_n: int):
    """What hulls.py finds, in NumPy."""
    seqlen_q, k = starts.shape
    far = 2**30
    found = []
    for first in range(0, seqlen_q, tile_m):
        s = np.maximum(starts[first : first + tile_m], 0)
        e = np.minimum(ends[first : first + tile_m], seqlen_k)
        used = s < e
        bounds = zip(
            np.where(used, s, far).min(0), np.where(used, e, 0).max(0), s.max(0), np.where(used, e, 0).min(0)
        )
        found.append([ranges.Hull(*map(int, bound)) for bound in bounds])

    def visits(n_block: int) -> tuple[int, int]:
        key = n_block * tile_n
        meets = [
            m for m, hulls in enumerate(found)
            if any(max(h.first, key) < min(h.end, key + tile_n) for h in hulls)
        ]  # fmt: skip
        return (meets[0], meets[-1] + 1) if meets else (0, 0)

    return ranges.IntervalRanges(
        ranges.Ints, seqlen_q, seqlen_k,
        lambda query: [(int(starts[query, i]), int(ends[query, i])) for i in range(k)],
        lambda m_block: found[m_block], visits,
    )  # fmt: skip
