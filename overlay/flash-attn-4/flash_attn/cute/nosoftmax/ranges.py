"""Say which blocks of a sequence a tile visits under a mask of flash_attn.masks, and which entries it
shows.

Under HSTU every bound is a few integer operations on numbers of the sequence, so each warp of a kernel finds
its blocks by itself: nothing is built per batch. A query row r has position i = r + seqlen_k - seqlen_q, and
keys are named by their position j. The docstring of flash_attn.masks says what a position sees; with C
contextual keys, the history up to H, targets after it, a window W and F whole rows it is

    by row     contextual: [0, H);  history: [lo(i), i + 1);  target: [lo(H), H) and its group up to itself
    by key     history: [0, C), [max(j, C), end(j)) and with F [max(H - F, j, C), n);  target: its group from
               itself on

where lo(i) is the first key in the window of i, and end(j) is n if the window of the targets reaches j, else
where the window of the rows leaves j behind. Under Intervals the bounds of a tile are those of its rows,
which hulls.py finds.

A call may give its diagonal, the position of query 0. Then its causal mask or window is one of these masks
too: position i sees the keys [i - left, i + right + 1) of the sequence.

`m` is the machine that computes: `Ints` for Python's numbers, as the tests use it, or registers.Registers for
those of a kernel. It has ``min``, ``max`` and ``where(condition, a, b)``. Divisions are of numbers that are
not negative.
"""

from collections.abc import Iterable
from typing import Any, Callable, NamedTuple

from .marker import HSTUKind

Range = tuple  # (first, end), half-open; empty if end <= first


class Ints:
    """Python's numbers."""

    min, max = staticmethod(min), staticmethod(max)

    @staticmethod
    def where(condition: bool, a: int, b: int) -> int:
        return a if condition else b


class Blocks(NamedTuple):
    """The blocks that a tile visits, in the order of an index from 0 to count - 1. `split` is the index
    between those that need the mask and those that every row of the tile sees whole; which of them come first
    is up to the loop.
    """

    m: Any
    ranges: tuple  # of blocks, apart from each other, in the order in which they are visited
    split_at: int  # the number of ranges before `split`

    def _up_to(self, ranges: int) -> Any:
        total = 0
        for first, end in self.ranges[:ranges]:
            total = total + (end - first)
        return total

    @property
    def count(self) -> Any:
        return self._up_to(len(self.ranges))

    @property
    def split(self) -> Any:
        return self._up_to(self.split_at)

    def physical(self, index: Any) -> Any:
        """Return the block at `index`."""
        shifts, before = [], 0
        for first, end in self.ranges:
            shifts.append((before + (end - first), first - before))
            before = before + (end - first)
        _, shift = shifts[-1]
        for end, earlier in reversed(shifts[:-1]):
            shift = self.m.where(index < end, earlier, shift)
        return index + shift


def hides_from(key: Any, last: Any) -> Any:
    """Whether causal rows up to position `last` see no key from `key` on."""
    return key > last


class HSTURanges(NamedTuple):
    """One sequence under HSTU. kind says, when a kernel is compiled, which parts the mask has; the others are
    not read. diagonal: the position of query 0, None for seqlen_k - seqlen_q. No position is above seqlen_k.
    """

    m: Any
    kind: HSTUKind
    seqlen_q: Any
    seqlen_k: Any
    targets: Any
    contexts: Any
    window: Any
    full: Any
    group: Any
    diagonal: Any = None

    @classmethod
    def of(
        cls, m: Any, kind: HSTUKind, seqlen_q: Any, seqlen_k: Any, numbers: dict, diagonal: Any = None
    ) -> "HSTURanges":
        """Return the ranges of a sequence. numbers: those of the fields after seqlen_k that the mask has.

        Counts are clamped to what the sequence holds: only the device may know them.
        """
        numbers = {**dict.fromkeys(HSTUKind._fields, 0), **numbers}
        if kind.targets:
            numbers["targets"] = m.max(m.min(numbers["targets"], seqlen_k), 0)
        if kind.contexts:
            numbers["contexts"] = m.max(m.min(numbers["contexts"], seqlen_k - numbers["targets"]), 0)
        return cls(m, kind, seqlen_q, seqlen_k, **numbers, diagonal=diagonal)

    @property
    def offset(self) -> Any:
        """The position of query 0."""
        return self.seqlen_k - self.seqlen_q if self.diagonal is None else self.diagonal

    @property
    def rows_end(self) -> Any:
        """The position behind the last query, at most seqlen_k."""
        if self.diagonal is None:
            return self.seqlen_k
        return self.m.min(self.diagonal + self.seqlen_q, self.seqlen_k)

    @property
    def history_end(self) -> Any:
        return self.seqlen_k - self.targets

    @property
    def _anchor(self) -> Any:
        """The index of the last contextual key, whose distances all of them have."""
        return self.m.max(self.contexts - 1, 0) if self.kind.contexts else 0

    # ---- Entries ----

    def _in_window(self, at: Any) -> Any:
        """Return the first key in the window of a row at position `at`, at most history_end."""
        start = self.m.max(at - self.window, self.contexts)
        return self.m.where(at <= self.window + self._anchor, 0, start)

    def _group_start(self, position: Any) -> Any:
        """Return where the group of a target begins; history_end for positions before it."""
        behind = self.m.max(position - self.history_end, 0)
        if self.kind.group:
            behind = behind // self.group * self.group
        return self.history_end + behind

    def _group_end(self, position: Any) -> Any:
        behind = self.m.max(position - self.history_end, 0)
        last = behind // self.group * self.group + self.group if self.kind.group else behind + 1
        return self.m.min(self.history_end + last, self.seqlen_k)

    def of_row(self, position: Any) -> tuple[Range, ...]:
        """Return the keys that a row sees: of contextual keys and history, and if there may be any, of
        targets."""
        m, end = self.m, self.history_end
        start = 0
        if self.kind.window:
            at = m.min(position, end)
            start = self._in_window(at)
            if self.kind.full:
                start = m.where(at >= end - self.full, 0, start)
        stop = m.min(position + 1, end)
        if self.kind.contexts:
            stop = m.where(position < self.contexts, m.where(position < 0, 0, end), stop)
        if not self.kind.targets:
            return ((start, stop),)
        return (start, stop), (self._group_start(position), m.where(position >= end, position + 1, 0))

    def of_key(self, position: Any) -> tuple[Range, ...]:
        """Return the positions of the rows that see a key. A row behind the sequence may be among them."""
        m, end, n = self.m, self.history_end, self.seqlen_k
        in_history = not self.kind.targets or position < end
        start = m.max(position, self.contexts)
        stop = self._last_reached(position)
        ranges = []
        if self.kind.contexts:
            ranges.append((0, m.where(in_history, self.contexts, 0)))
        ranges.append(
            (
                m.where(in_history, start, position),
                m.where(in_history, stop, self._group_end(position) if self.kind.targets else n),
            )
        )
        if self.kind.full:
            ranges.append((m.max(end - self.full, start), m.where(in_history, n, 0)))
        return tuple(ranges)

    def _last_reached(self, key: Any) -> Any:
        """Return the end of the rows whose window reaches a key of the history, or n if that of the targets
        does."""
        if not self.kind.window:
            return self.seqlen_k
        farthest = self.m.max(key, self._anchor) + self.window
        return self.m.where(farthest >= self.history_end, self.seqlen_k, farthest + 1)

    def visible(self, position: Any) -> Any:
        """Return the number of keys that a row sees."""
        return sum(self.m.max(end - first, 0) for first, end in self.of_row(position))

    def hides_from(self, key: Any, first: Any, last: Any) -> Any:
        """Whether rows at positions first to last see no key from `key` on; False if that is not clear."""
        hidden = hides_from(key, last)
        return hidden & (first >= self.contexts) if self.kind.contexts else hidden

    # ---- Blocks of keys for a tile of queries ----

    def _key_blocks(self, first: Any, stop: Any, tile_n: int) -> tuple[Range, Range]:
        """Return the blocks of keys that hold an entry that one of the rows [first, stop) sees: of contextual
        keys and history, and of targets from there on.

        The windows of successive rows overlap, and so do groups, so no key between is hidden from all.
        """
        m, end, contexts = self.m, self.history_end, self.contexts
        first = m.max(first + self.offset, 0)
        stop = m.max(m.min(stop + self.offset, self.rows_end), 0)
        start = 0
        if self.kind.window:
            start = self._in_window(m.min(first, end))
            if self.kind.full:
                start = m.where(stop > end - self.full, 0, start)
            if self.kind.contexts:
                start = m.where(first < contexts, 0, start)
        last = m.min(stop, end)
        if self.kind.contexts:
            last = m.where(first < contexts, end, last)
        history = _blocks(m, start, m.where(first < stop, last, 0), tile_n)
        if not self.kind.targets:
            return history, (history[1], history[1])
        begin, behind = _blocks(m, self._group_start(first), m.where(stop > end, stop, 0), tile_n)
        begin = m.max(begin, history[1])
        return history, (begin, m.max(begin, behind))

    def _seen_by_all(self, first: Any, stop: Any) -> Range:
        """Return contextual keys and history that each of the rows [first, stop) sees."""
        m, end, contexts = self.m, self.history_end, self.contexts
        first, stop = first + self.offset, m.min(stop + self.offset, self.rows_end)
        behind_contexts = m.max(first, contexts)
        start = 0
        if self.kind.window:
            # The last row with a window sees least.
            last = m.min(stop, end - self.full) - 1 if self.kind.full else stop - 1
            start = m.where(last >= behind_contexts, self._in_window(m.min(last, end)), 0)
        until = m.where(behind_contexts < m.min(stop, end), behind_contexts + 1, end)
        return start, m.where(first < 0, 0, until)

    def keys(self, m_block: Any, tile_m: int, tile_n: int) -> Blocks:
        """Return the blocks of `tile_n` keys that a block of `tile_m` query rows visits. The ones before
        `split` need no mask."""
        m, first, stop = self.m, m_block * tile_m, (m_block + 1) * tile_m
        (begin, end), targets = self._key_blocks(first, stop, tile_n)
        seen, unseen = self._seen_by_all(first, stop)
        inner, outer = _wholly_in(m, seen, unseen, (begin, end), tile_n)
        ranges = [(inner, outer), (outer, end)]
        if self.kind.window:  # else the interior begins with the first key
            ranges.insert(1, (begin, inner))
        if self.kind.targets:
            ranges.append(targets)
        return Blocks(m, tuple(ranges), split_at=1)

    def turn(self, n_block: Any, m_block: Any, tile_m: int, tile_n: int) -> Any:
        """Return how many blocks of keys before n_block visit m_block: when it is the turn of n_block to add
        to the sums of these rows, if blocks do so in order."""
        return _before(self.m, n_block, self._key_blocks(m_block * tile_m, (m_block + 1) * tile_m, tile_n))

    # ---- Blocks of queries for a tile of keys ----

    def queries(self, n_block: Any, tile_m: int, tile_n: int) -> Blocks:
        """Return the blocks of `tile_m` query rows that a block of `tile_n` keys visits. The ones from
        `split` on need no mask, those behind the last query aside."""
        m, end, n, contexts = self.m, self.history_end, self.seqlen_k, self.contexts
        first, stop = n_block * tile_n, m.min((n_block + 1) * tile_n, n)
        in_history = not self.kind.targets or first < end
        whole = not self.kind.targets or stop <= end  # the tile has no target
        start = m.max(first, contexts)
        seen_from = m.max(stop - 1, contexts)  # the first row behind the contexts that sees all keys

        until = self._last_reached(m.min(stop, end) - 1)
        if self.kind.targets:
            start = m.where(in_history, start, first)
            until = m.where(in_history, until, self._group_end(stop - 1))
        diagonal = _query_blocks(self, start, m.where(first < stop, until, 0), tile_m)
        inner, outer = _inside(
            self, seen_from, m.where(whole, self._last_reached(first), 0), diagonal, tile_m
        )
        masked, interior = [(diagonal[0], inner)], [(inner, outer)]
        if self.kind.window:  # else every row after the diagonal sees all
            masked.append((outer, diagonal[1]))
        if self.kind.contexts:
            before = _query_blocks(self, 0, m.where(in_history, contexts, 0), tile_m)
            masked, interior, diagonal = _behind(m, before[1], masked, interior, diagonal)
            masked.insert(0, before)
        if self.kind.full:
            tail = m.max(end - self.full, m.max(first, contexts))
            tail_begin, tail_end = _query_blocks(self, tail, m.where(in_history, n, 0), tile_m)
            tail_begin = m.max(tail_begin, diagonal[1])
            tail_end = m.max(tail_begin, tail_end)
            from_row = m.max(end - self.full, seen_from)
            inner, outer = _inside(self, from_row, m.where(whole, n, 0), (tail_begin, tail_end), tile_m)
            masked.append((tail_begin, inner))
            interior.append((inner, outer))
        return Blocks(m, (*masked, *interior), split_at=len(masked))


class WindowRanges(NamedTuple):
    """One sequence whose query 0 is at position `diagonal`, before, among or behind the keys. left, right:
    how many keys a row sees on each side of its position, None without limit. No sum leaves int32 if the
    lengths are below 2^29 and left, right and the diagonal at most 2^30 in size.
    """

    m: Any
    seqlen_q: Any
    seqlen_k: Any
    diagonal: Any
    left: Any
    right: Any

    @property
    def offset(self) -> Any:
        """The position of query 0."""
        return self.diagonal

    @property
    def rows_end(self) -> Any:
        """The position behind the last query."""
        return self.diagonal + self.seqlen_q

    # ---- Entries ----

    def _around(self, at: Any, before: Any, behind: Any, first: Any, end: Any) -> Range:
        """Return the places of [first, end) from `before` places before `at` to `behind` behind it."""
        start = first if before is None else self.m.max(at - before, first)
        stop = end if behind is None else at + 1 + self.m.min(behind, end - 1 - at)
        return start, stop

    def _of_row(self, position: Any) -> Range:
        return self._around(position, self.left, self.right, 0, self.seqlen_k)

    def _of_key(self, position: Any) -> Range:
        return self._around(position, self.right, self.left, self.diagonal, self.rows_end)

    def of_row(self, position: Any) -> tuple[Range, ...]:
        """Return the keys that a row sees."""
        return (self._of_row(position),)

    def of_key(self, position: Any) -> tuple[Range, ...]:
        """Return the positions of the rows that see a key."""
        return (self._of_key(position),)

    def visible(self, position: Any) -> Any:
        """Return the number of keys that a row sees."""
        first, end = self._of_row(position)
        return self.m.max(end - first, 0)

    # ---- Blocks ----

    def _rows(self, m_block: Any, tile_m: int) -> tuple[Any, Any]:
        """Return the positions of the first and the last query of a block."""
        m, first = self.m, m_block * tile_m
        return first + self.diagonal, m.min(first + tile_m, self.seqlen_q) - 1 + self.diagonal

    def _key_blocks(self, m_block: Any, tile_m: int, tile_n: int) -> Range:
        """Return the blocks of keys that hold an entry that a row of the block sees. Windows of successive
        rows overlap, so no key between is hidden from all."""
        first, last = self._rows(m_block, tile_m)
        return _blocks(self.m, self._of_row(first)[0], self._of_row(last)[1], tile_n)

    def keys(self, m_block: Any, tile_m: int, tile_n: int) -> Blocks:
        """Do the same as HSTURanges.keys."""
        begin, end = self._key_blocks(m_block, tile_m, tile_n)
        first, last = self._rows(m_block, tile_m)
        seen, unseen = self._of_row(last)[0], self._of_row(first)[1]
        inner, outer = _wholly_in(self.m, seen, unseen, (begin, end), tile_n)
        ranges = [(inner, outer), (outer, end)]
        if self.left is not None:  # else the interior begins with the first key
            ranges.insert(1, (begin, inner))
        return Blocks(self.m, tuple(ranges), split_at=1)

    def turn(self, n_block: Any, m_block: Any, tile_m: int, tile_n: int) -> Any:
        """Do the same as HSTURanges.turn."""
        return _before(self.m, n_block, [self._key_blocks(m_block, tile_m, tile_n)])

    def queries(self, n_block: Any, tile_m: int, tile_n: int) -> Blocks:
        """Do the same as HSTURanges.queries."""
        first = n_block * tile_n
        last = self.m.min(first + tile_n, self.seqlen_k) - 1
        (start, until), (seen_from, stop) = self._of_key(first), self._of_key(last)
        begin, end = _query_blocks(self, start, stop, tile_m)
        inner, outer = _inside(self, seen_from, until, (begin, end), tile_m)
        masked = [(begin, inner)]
        if self.left is not None:  # else every row after the diagonal sees all
            masked.append((outer, end))
        return Blocks(self.m, (*masked, (inner, outer)), split_at=len(masked))


class Hull(NamedTuple):
    """Of one of the k intervals of the rows of a block: where the first one begins and the last one ends, of
    those that are not empty, and what all rows have of it. Within the sequence; empty if end <= first.
    """

    first: Any
    end: Any
    inner_first: Any
    inner_end: Any


class IntervalRanges(NamedTuple):
    """One sequence under flash_attn.masks.Intervals.

    of_query: query -> its k intervals. hulls: block of queries -> k Hulls. visits: block of keys -> the range
    of blocks of queries of which any sees any of it.
    """

    m: Any
    seqlen_q: Any
    seqlen_k: Any
    of_query: Callable
    hulls: Callable
    visits: Callable

    @property
    def offset(self) -> Any:
        """The position of query 0."""
        return self.seqlen_k - self.seqlen_q

    def of_row(self, position: Any) -> tuple[Range, ...]:
        """Return the keys that a row sees. Rows behind the last query see what it does."""
        m = self.m
        query = m.max(m.min(position - self.offset, self.seqlen_q - 1), 0)
        return tuple(clamped(m, first, end, self.seqlen_k) for first, end in self.of_query(query))

    def visible(self, position: Any) -> Any:
        """Return the number of keys that a row sees."""
        return sum(self.m.max(end - first, 0) for first, end in self.of_row(position))

    def keys(self, m_block: Any, tile_m: int, tile_n: int) -> Blocks:
        """Do the same as HSTURanges.keys."""
        m, hulls = self.m, self.hulls(m_block)
        masked, interior, before, begin = [], [], 0, None
        begins = []
        for hull in reversed(hulls):
            # An interval of a row may lie before an earlier one of another row: begin where both do.
            first = m.where(hull.first < hull.end, hull.first, self.seqlen_k)
            begin = first if begin is None else m.min(begin, first)
            begins.insert(0, begin)
        for hull, first in zip(hulls, begins):
            begin, end = _blocks(m, first, m.where(hull.first < hull.end, hull.end, 0), tile_n)
            begin, end = m.max(begin, before), m.max(end, before)
            before = end
            inner = m.min(m.max((hull.inner_first + (tile_n - 1)) // tile_n, begin), end)
            outer = m.max(m.min(m.max(hull.inner_end, 0) // tile_n, end), inner)
            interior.append((inner, outer))
            masked += [(begin, inner), (outer, end)]
        return Blocks(m, (*interior, *masked), split_at=len(interior))

    def queries(self, n_block: Any, tile_m: int, tile_n: int) -> Blocks:
        """Do the same as HSTURanges.queries. All blocks need the mask, which finds the interior ones."""
        return Blocks(self.m, (self.visits(n_block),), split_at=1)

    def turn(self, n_block: Any, m_block: Any, tile_m: int, tile_n: int) -> Any:
        """Do the same as HSTURanges.turn: with sums in order every block of keys visits all queries
        (hulls.py)."""
        return n_block

    def shows_all(self, m_block: Any, n_block: Any, tile_n: int) -> Any:
        """Whether every row of m_block sees every key of n_block: 1 or 0."""
        m, shown = self.m, 0
        first, stop = n_block * tile_n, m.min((n_block + 1) * tile_n, self.seqlen_k)
        for hull in self.hulls(m_block):
            shown = m.where(hull.inner_first <= first, m.where(stop <= hull.inner_end, 1, shown), shown)
        return shown


# ---- Tables of hulls.py ----


def first_slot(offset: Any, batch_idx: Any, seqlen: Any, tile: int, packed: bool) -> Any:
    """Return where the blocks of a sequence begin in a table. Packed sequences have room for one more block
    each, because no host knows their lengths.
    """
    if packed:
        return (offset + batch_idx * tile) // tile
    return batch_idx * ((seqlen + (tile - 1)) // tile)


def slots(batch: int, seqlen: int, tile: int, packed: bool) -> int:
    """Return how many blocks a table has room for. seqlen: of each sequence, or of all if packed."""
    return seqlen // tile + batch + 1 if packed else batch * -(-seqlen // tile)


def clamped(m: Any, first: Any, end: Any, seqlen_k: Any) -> Range:
    """Cut an interval to the keys of its sequence. Only the device may know it."""
    return m.max(first, 0), m.min(end, seqlen_k)


def _blocks(m: Any, first: Any, stop: Any, tile: int) -> Range:
    """Return the blocks that hold an index of [first, stop), first >= 0; (0, 0) if there is none."""
    there = first < stop
    return (m.where(there, first // tile, 0), m.where(there, (m.max(stop, 0) + (tile - 1)) // tile, 0))


def _wholly_in(m: Any, first: Any, stop: Any, blocks: Range, tile: int) -> Range:
    """Return the blocks among `blocks` that lie in [first, stop)."""
    begin, end = blocks
    inner = m.min(m.max((m.max(first, 0) + (tile - 1)) // tile, begin), end)
    return inner, m.max(m.min(m.max(stop, 0) // tile, end), inner)


def _before(m: Any, block: Any, ranges: Iterable[Range]) -> Any:
    """Return how many blocks of the ranges come before `block`."""
    count = 0
    for begin, end in ranges:
        count = count + m.max(m.min(block, end) - begin, 0)
    return count


def _query_blocks(ranges: Any, first: Any, stop: Any, tile_m: int) -> Range:
    """Return the blocks of query rows of positions [first, stop); (0, 0) if there are none."""
    m = ranges.m
    return _blocks(m, m.max(first - ranges.offset, 0), m.min(stop - ranges.offset, ranges.seqlen_q), tile_m)


def _inside(ranges: Any, first: Any, stop: Any, blocks: Range, tile_m: int) -> Range:
    """Return the blocks among `blocks` that lie in the positions [first, stop), or none at their end. The
    last one may reach behind the last query: rows there count for nothing."""
    m, (begin, end) = ranges.m, blocks
    inner = (m.max(first - ranges.offset, 0) + (tile_m - 1)) // tile_m
    outer = m.max(stop - ranges.offset, 0) // tile_m
    outer = m.min(m.where(stop >= ranges.rows_end, end, outer), end)
    inner = m.max(inner, begin)
    inner = m.where(inner < outer, inner, end)
    return inner, m.max(outer, inner)


def _behind(m: Any, block: Any, *parts: Any) -> tuple:
    """Cut blocks before `block` off ranges and lists of ranges."""
    return tuple(
        [_behind(m, block, x)[0] for x in part]
        if isinstance(part, list)
        else (m.max(part[0], block), m.max(part[1], block))
        for part in parts
    )
