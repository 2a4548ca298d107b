"""Find the keys that a query sees under causal masks and windows, aligned at the bottom right, or within
given intervals, and assign by masks.

A mask is an int32 tensor with all bits set where a number stays and none where it is replaced. A bitwise AND
gives exactly 0 even for NaN (NaN times 0 would be NaN), and takes a tenth of the time of masked_fill_ on the
CPU.
"""

from dataclasses import dataclass
from typing import Optional

import torch

from ...intervals import HSTUSequence

_AS_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def is_negative(x: torch.Tensor) -> torch.Tensor:
    """Return the mask that keeps where the int32 x is negative, by spreading its sign bit."""
    return x >> 31


def keep_where(x: torch.Tensor, mask: torch.Tensor, otherwise: float = 0.0) -> None:
    """Assign `otherwise` to the float32 or float64 tensor x where the mask, broadcastable to x, is 0."""
    integer = _AS_INTEGER[x.dtype]
    mask = mask.to(integer)
    bits = x.view(integer).bitwise_and_(mask)
    if otherwise != 0.0:
        bits.bitwise_or_(~mask & torch.tensor(otherwise, dtype=x.dtype, device="cpu").view(integer))


@dataclass(frozen=True)
class Window:
    """How far a query sees to the left and right of its own position, in keys; None is without limit."""

    left: Optional[int] = None
    right: Optional[int] = None

    @classmethod
    def of(cls, left: int, right: int) -> "Window":
        """Make a window of integer arguments, where -1 is no limit."""
        return cls(left if left >= 0 else None, right if right >= 0 else None)

    @property
    def is_limited(self) -> bool:
        return self.left is not None or self.right is not None


@dataclass(frozen=True)
class Visibility:
    """The keys that each query of one sequence sees. Query i is aligned with key i + offset; diagonal: the
    offset, None for seqlen_k - seqlen_q.

    Every query sees one contiguous range, and the ranges of successive queries move by one: the keys seen by
    any query of a block are again a range, and so are those seen by all of them. Queries that see no key come
    before all others, and keys that no query sees before and after all others.
    """

    seqlen_q: int
    seqlen_k: int
    window: Window
    diagonal: Optional[int]

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q if self.diagonal is None else self.diagonal

    @property
    def unseen_keys(self) -> Optional[torch.Tensor]:
        """The keys between others that no query sees, bool (seqlen_k,); None if there are none."""
        return None

    @property
    def blind_queries(self) -> Optional[torch.Tensor]:
        """The queries from first_seeing on that see no key, bool (seqlen_q,); None if there are none."""
        return None

    @property
    def first_seeing(self) -> int:
        """The first query that sees a key, if there are keys. Windows of earlier queries end before key 0."""
        return 0 if self.window.right is None else max(0, -self.offset - self.window.right)

    @property
    def stop_seeing(self) -> int:
        """One more than the last query that sees a key, if there are keys. Windows of later ones begin behind
        the last key."""
        left = self.window.left
        return self.seqlen_q if left is None else min(self.seqlen_q, self.seqlen_k + left - self.offset)

    def _bounds(self, first_row: int, last_row: int) -> tuple[int, int]:
        """Keys from the left limit of first_row up to (not including) the right limit of last_row."""
        left, right = self.window.left, self.window.right
        start = 0 if left is None else max(0, first_row + self.offset - left)
        stop = self.seqlen_k if right is None else min(self.seqlen_k, last_row + self.offset + right + 1)
        return start, max(start, stop)

    def seen_by_any(self, rows: range) -> range:
        """The keys that at least one of the queries sees. No other keys are read."""
        return range(*self._bounds(rows[0], rows[-1])) if rows else range(0)

    def ranges(self, rows: range) -> list[range]:
        """Ranges of keys, ascending and apart, which hold all keys that at least one of the queries sees."""
        seen = self.seen_by_any(rows)
        return [seen] if seen else []

    def seen_by_all(self, rows: range) -> range:
        return range(*self._bounds(rows[-1], rows[0]))

    def counts(self, rows: range) -> torch.Tensor:
        """The number of keys that each of the queries sees, int32, (len(rows), 1)."""
        aligned, _ = self._positions(rows, range(0))
        left, right = self.window.left, self.window.right
        start = torch.zeros_like(aligned) if left is None else (aligned - left).clamp(min=0)
        stop = torch.full_like(aligned, self.seqlen_k)
        if right is not None:
            stop = torch.minimum(stop, aligned + right + 1)
        return (stop - start).clamp(min=0)

    def fill_hidden(self, block: torch.Tensor, rows: range, keys: range, value: float) -> None:
        """Assign value to the entries of block (..., len(rows), len(keys)) that the query does not see."""
        common = self.seen_by_all(rows)
        edges = [
            range(keys.start, min(common.start, keys.stop)),
            range(max(common.stop, keys.start), keys.stop),
        ]
        if not common:
            edges = [keys]
        for edge in edges:
            if edge:
                part = block[..., edge.start - keys.start : edge.stop - keys.start]
                keep_where(part, self._visible(rows, edge), value)

    def _visible(self, rows: range, keys: range) -> torch.Tensor:
        """Return the mask of the keys inside the window of each query, (len(rows), len(keys))."""
        aligned, key = self._positions(rows, keys)
        mask = torch.full((len(rows), len(keys)), -1, dtype=torch.int32, device="cpu")
        if self.window.left is not None:
            mask &= is_negative(aligned - (self.window.left + 1) - key)
        if self.window.right is not None:
            mask &= is_negative(key - (aligned + (self.window.right + 1)))
        return mask

    def _positions(self, rows: range, keys: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys that the queries are aligned with, (len(rows), 1), and the keys, (len(keys),), in
        int32."""
        aligned = torch.arange(rows.start, rows.stop, dtype=torch.int32, device="cpu")[:, None] + self.offset
        return aligned, torch.arange(keys.start, keys.stop, dtype=torch.int32, device="cpu")

    def distances(self, rows: range, keys: range, dtype: torch.dtype) -> torch.Tensor:
        """|i + offset - j|, the distance that ALiBi weighs, (len(rows), len(keys))."""
        aligned, key = self._positions(rows, keys)
        return (aligned - key).abs_().to(dtype)


@dataclass(frozen=True)
class _Listed(Visibility):
    """Queries that each see a few half-open intervals of keys.

    starts, ends: int32 (seqlen_q, k); an interval with start >= end is not used. window is not limited.
    """

    starts: torch.Tensor
    ends: torch.Tensor

    def seen_by_any(self, rows: range) -> range:
        ranges = self.ranges(rows)
        return range(ranges[0].start, ranges[-1].stop) if ranges else range(0)

    def counts(self, rows: range) -> torch.Tensor:
        starts, ends = self._of(rows)
        return (ends - starts).clamp(min=0).sum(dim=1, keepdim=True, dtype=torch.int32)

    def _visible(self, rows: range, keys: range) -> torch.Tensor:
        _, key = self._positions(rows, keys)
        mask = torch.zeros(len(rows), len(keys), dtype=torch.int32, device="cpu")
        for start, end in zip(*(x.unsqueeze(-1).unbind(1) for x in self._of(rows))):
            mask |= is_negative(start - 1 - key) & is_negative(key - end)
        return mask

    def _of(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return self.starts[rows.start : rows.stop], self.ends[rows.start : rows.stop]


@dataclass(frozen=True)
class Intervals(_Listed):
    """Intervals whose bounds are read from them, for each block anew."""

    @property
    def unseen_keys(self) -> Optional[torch.Tensor]:
        used = self.starts < self.ends
        change = torch.zeros(self.seqlen_k + 1, dtype=torch.int32, device="cpu")
        for edges, by in ((self.starts, 1), (self.ends, -1)):
            edges = edges[used].long()
            change.index_add_(0, edges, torch.full(edges.shape, by, dtype=torch.int32, device="cpu"))
        unseen = change.cumsum(0)[:-1] == 0
        return unseen if unseen.any() else None

    @property
    def blind_queries(self) -> Optional[torch.Tensor]:
        blind = ~(self.starts < self.ends).any(dim=1)
        return blind if blind.any() else None

    def ranges(self, rows: range) -> list[range]:
        starts, ends = self._of(rows)
        used = starts < ends
        firsts = starts.where(used, self.seqlen_k).amin(dim=0).tolist()
        stops = ends.where(used, 0).amax(dim=0).tolist()
        found: list[range] = []
        for first, stop in sorted(zip(firsts, stops)):
            if found and first <= found[-1].stop:
                found[-1] = range(found[-1].start, max(found[-1].stop, stop))
            elif first < stop:
                found.append(range(first, stop))
        return found

    def fill_hidden(self, block: torch.Tensor, rows: range, keys: range, value: float) -> None:
        starts, ends = self._of(rows)
        inside = (starts <= keys.start) & (ends >= keys.stop)
        if not inside.any(dim=1).all():
            keep_where(block, self._visible(rows, keys), value)


@dataclass(frozen=True)
class HSTU(_Listed):
    """Intervals that are those of `sequence`, which gives the bounds of a block without reading them. They
    hold no key that none of the queries sees, and only queries before position 0 see nothing.
    """

    sequence: HSTUSequence

    @property
    def first_seeing(self) -> int:
        return max(0, -self.offset)

    def ranges(self, rows: range) -> list[range]:
        return self.sequence.seen_by_any(rows)

    def fill_hidden(self, block: torch.Tensor, rows: range, keys: range, value: float) -> None:
        seen = self.sequence.seen_by_all(rows)
        if not (seen.start <= keys.start and keys.stop <= seen.stop):
            keep_where(block, self._visible(rows, keys), value)
