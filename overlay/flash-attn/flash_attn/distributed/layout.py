"""Say which tokens of a sequence, or of packed sequences, lie on which rank. Plain integers, no tensors."""

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

LAYOUTS = ("contiguous", "zigzag")


class Part(NamedTuple):
    """Tokens of one rank that lie one after the other: of each sequence a range, which may be empty.

    at: the index of the first one among the rank's tokens. starts, lengths: the range of each sequence,
    counted from its own first token.
    """

    at: int
    starts: tuple
    lengths: tuple

    @property
    def size(self) -> int:
        return sum(self.lengths)

    @property
    def rows(self) -> slice:
        """The place of the part among the rank's tokens."""
        return slice(self.at, self.at + self.size)


class Piece(NamedTuple):
    """The tokens from start to stop of one sequence, and their place among the rank's tokens."""

    sequence: int
    start: int
    stop: int
    rows: slice


class Layout:
    """The tokens of each rank.

    offsets: the cumulative lengths of the sequences, (0, …, total). kind: "contiguous" cuts the tokens of all
    sequences, one after the other, into `world` equal pieces; a sequence may begin on one rank and end on a
    later one. "zigzag" cuts each sequence into 2 * world pieces, and gives rank r the pieces r and
    2 * world - 1 - r of each, first all of the former and then all of the latter. With a causal mask every
    rank then has the same work. Lengths that do not divide make pieces that differ by one token.
    """

    def __init__(self, world: int, kind: str, offsets: tuple) -> None:
        self.world, self.offsets = world, offsets
        self.kind = kind if world > 1 else "contiguous"
        self.parts = [self._parts_of(rank) for rank in range(world)]
        self.sizes = [sum(part.size for part in parts) for parts in self.parts]

    @property
    def total(self) -> int:
        return self.offsets[-1]

    @cached_property
    def lengths(self) -> tuple:
        return tuple(stop - start for start, stop in zip(self.offsets, self.offsets[1:]))

    def _parts_of(self, rank: int) -> tuple:
        if self.kind == "contiguous":
            first, last = _cut(self.total, self.world, rank)
            starts = [min(max(first - x, 0), n) for x, n in zip(self.offsets, self.lengths)]
            stops = [min(max(last - x, 0), n) for x, n in zip(self.offsets, self.lengths)]
            return (Part(0, tuple(starts), _differences(starts, stops)),)
        parts, at = [], 0
        for chunk in (rank, 2 * self.world - 1 - rank):
            ends = [_cut(n, 2 * self.world, chunk) for n in self.lengths]
            starts, stops = [start for start, _ in ends], [stop for _, stop in ends]
            parts.append(Part(at, tuple(starts), _differences(starts, stops)))
            at += parts[-1].size
        return tuple(parts)

    def pieces(self, rank: int) -> list:
        """The pieces of a rank that are not empty, in the order of its tokens."""
        found = []
        for part in self.parts[rank]:
            begins = accumulate(part.lengths, initial=part.at)
            for b, (start, length, at) in enumerate(zip(part.starts, part.lengths, begins)):
                if length:
                    found.append(Piece(b, start, start + length, slice(at, at + length)))
        return found

    def tokens(self, rank: int) -> list:
        """The ranges of a rank's tokens among the tokens of all sequences, in the rank's order."""
        return [
            range(self.offsets[piece.sequence] + piece.start, self.offsets[piece.sequence] + piece.stop)
            for piece in self.pieces(rank)
        ]


def _cut(total: int, pieces: int, index: int) -> tuple:
    return total * index // pieces, total * (index + 1) // pieces


def _differences(starts: list, stops: list) -> tuple:
    return tuple(stop - start for start, stop in zip(starts, stops))
