"""The grid of a batch of packed sequences that says where a tile lies: (heads, blocks, sequences).

Upstream numbers the tiles of all sequences one after another, and each tile searches for its sequence. Here
each sequence has as many blocks as the longest one, so that nothing is searched. Where lengths differ much,
too many of these blocks are empty, and upstream's numbers are taken. Nothing here needs the compiler.
"""

from typing import Any, Callable

MOST_BLOCKS = 65535  # in the second and third dimension of a grid


def serves(rows: int, batch: int, heads: int, longest: int, tile: int) -> bool:
    """Whether the grid has at most 9/8 of the tiles that upstream launches, who knows no lengths either.

    rows: of the packed tensor. longest: of a sequence. Rows are those of tiles, several for a query if
    pack_gqa is on.
    """
    blocks = -(-longest // tile)
    upstreams = (rows + batch * (tile - 1)) // tile
    return batch * heads <= MOST_BLOCKS and blocks <= MOST_BLOCKS and 8 * batch * blocks <= 9 * upstreams


def place(
    where: Callable, x: Any, y: Any, z: Any, section: Any, sections: Any, blocks: Any, last: bool, first: bool
) -> tuple:
    """Return (block, head, sequence) of CTA (x, y, z).

    section: how many heads come before the next block, so that what they share stays in L2. sections: how
    many there are; the last one may reach past the heads. last: the last block is the longest and begins.
    first: but the first one is longer still, as its contextual rows see the whole history.
    """
    sequence, number = divmod(z, sections)
    block = y
    if first:
        block = where(y == 0, 0, blocks - y)
    elif last:
        block = blocks - 1 - y
    return block, x + number * section, sequence
