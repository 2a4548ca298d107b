"""The grid of a batch of packed sequences, in Python's integers: the kernels run the same function."""

import random

import pytest
from overlay_package import module

grid = module("grid")


def where(condition, a, b):
    return a if condition else b


def launched(lengths, heads, tile, section, last, first, longest=0):
    """Yield (block, head, sequence) of the CTAs that have a tile, in the order of the launch."""
    blocks, sections = -(-(longest or max(lengths)) // tile), -(-heads // section)
    for z in range(len(lengths) * sections):
        for y in range(blocks):
            for x in range(section):
                block, head, batch = grid.place(where, x, y, z, section, sections, blocks, last, first)
                if head < heads and block * tile < lengths[batch]:
                    yield block, head, batch


@pytest.mark.parametrize("last, first", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("seed", range(20))
def test_each_tile_is_launched_once(seed, last, first):
    draw = random.Random(seed)
    lengths = [draw.choice((0, 1, draw.randrange(700))) for _ in range(draw.randrange(1, 8))] + [1]
    heads, tile = draw.randrange(1, 9), draw.choice((64, 80, 128, 192))
    section, longest = draw.randrange(1, heads + 1), max(lengths) + draw.randrange(300)
    tiles = list(launched(lengths, heads, tile, section, last, first, longest))
    assert sorted(tiles) == [
        (block, head, batch)
        for block in range(max(lengths) // tile + 1)
        for head in range(heads)
        for batch, length in enumerate(lengths)
        if block * tile < length
    ]


def test_the_longest_tiles_come_first():
    """And a head's neighbours before its next block, so that L2 holds what they share."""

    def order(last, first):
        return [block for block, *_ in launched([500], 1, 128, 1, last, first)]

    assert order(False, False) == [0, 1, 2, 3]
    assert order(True, False) == [3, 2, 1, 0]
    assert order(True, True) == [0, 3, 2, 1]
    assert list(launched([200], 3, 128, 2, True, False)) == [
        (1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 1, 0), (1, 2, 0), (0, 2, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows, batch, heads, longest, tile, serves",
    [
        (4 * 500, 4, 2, 500, 128, True),  # 16 tiles; upstream launches 19
        (4 * 500, 4, 2, 640, 128, True),  # 20
        (4 * 500, 4, 2, 641, 128, False),  # 24
        (1700, 4, 2, 600, 128, False),  # 20; upstream launches 17
        (2000, 1, 2, 2000, 128, True),
        (2000, 16, 2, 1900, 128, False),
        (65535 * 64, 65535, 1, 64, 64, True),
        (65536 * 64, 65536, 1, 64, 64, False),
        (32768 * 64, 32768, 2, 64, 64, False),
        (64 * 65535, 1, 1, 64 * 65535, 64, True),
        (64 * 65536, 1, 1, 64 * 65536, 64, False),
    ],
)
def test_which_batches_have_the_grid(rows, batch, heads, longest, tile, serves):
    """Few more tiles than upstream launches, and no more sequences or blocks than a grid has room for."""
    assert grid.serves(rows, batch, heads, longest, tile) is serves
