"""Run the loops of the Hopper kernels under a mask, or in a window with a diagonal, in PyTorch, tile by tile,
against the masked matrix: which blocks are loaded, in which order, where the mask is applied, and what is
written where nothing is visited.
"""

import pytest
import torch
from drawn_masks import drawn, drawn_intervals, drawn_part, drawn_window, interval_ranges
from overlay_package import module

ranges = module("ranges")
NAN = float("nan")


def shown(intervals_of, positions, others) -> torch.Tensor:
    """Whether each of the positions shows each of the others, (len(positions), len(others))."""
    return torch.tensor([
        [any(first <= x < end for first, end in found) for x in others]
        for found in map(intervals_of, positions)
    ]).reshape(len(positions), len(others))  # fmt: skip


def tile(x: torch.Tensor, block: int, size: int) -> torch.Tensor:
    """Rows of a block. Those behind the end are 0, as TMA loads them."""
    rows = x[block * size : (block + 1) * size]
    return torch.nn.functional.pad(rows, (0, 0, 0, size - len(rows)))


def forward(sequence, q, k, v, tile_m, tile_n):
    """Return the output and the blocks of keys that each block of queries loads."""
    out, loaded = torch.full((len(q), v.shape[1]), NAN, dtype=q.dtype), []
    for m in range(-(-len(q) // tile_m)):
        blocks, acc = sequence.keys(m, tile_m, tile_n), 0.0
        loaded.append([])
        for index in reversed(range(max(blocks.count, 1))):  # one block is loaded in any case
            n = blocks.physical(index)
            loaded[-1].append(n)
            weights = torch.nn.functional.silu(tile(q, m, tile_m) @ tile(k, n, tile_n).T)
            first = index == max(blocks.count, 1) - 1
            if first or index >= blocks.split:
                rows = [m * tile_m + i + sequence.offset for i in range(tile_m)]
                keys = range(n * tile_n, (n + 1) * tile_n)
                weights = torch.where(shown(sequence.of_row, rows, keys), weights, 0.0)
            acc = acc + weights @ tile(v, n, tile_n)
        if blocks.count <= 0:
            acc = torch.zeros_like(acc)
        out[m * tile_m : (m + 1) * tile_m] = acc[: len(q) - m * tile_m]
    return out, loaded


def backward(sequence, q, k, v, dout, tile_m, tile_n, by_key: bool):
    """Return dq, dk and dv. Tiles of keys take their turns at dq in order. by_key: whether keys say who sees
    them."""
    m_blocks, n_blocks = -(-len(q) // tile_m), -(-len(k) // tile_n)
    dq = torch.zeros(m_blocks * tile_m, q.shape[1], dtype=q.dtype)
    dk, dv = torch.full_like(k, NAN), torch.full_like(v, NAN)
    turns = [0] * m_blocks
    for n in range(n_blocks):
        k_, v_ = tile(k, n, tile_n), tile(v, n, tile_n)
        blocks = sequence.queries(n, tile_m, tile_n)
        sum_k, sum_v = torch.zeros_like(k_), torch.zeros_like(v_)
        for index in range(blocks.count):
            m = blocks.physical(index)
            q_, dout_ = tile(q, m, tile_m), tile(dout, m, tile_m)
            s = (q_ @ k_.T).requires_grad_()
            with torch.enable_grad():
                p = torch.nn.functional.silu(s)
            ds = torch.autograd.grad(p, s, dout_ @ v_.T)[0]
            p = p.detach()
            if index < blocks.split:
                rows = [m * tile_m + i + sequence.offset for i in range(tile_m)]
                keys = range(n * tile_n, (n + 1) * tile_n)
                visible = (
                    shown(sequence.of_key, keys, rows).T if by_key else shown(sequence.of_row, rows, keys)
                )
                p, ds = torch.where(visible, p, 0.0), torch.where(visible, ds, 0.0)
            sum_v += p.T @ dout_
            sum_k += ds.T @ q_
            if by_key:
                assert turns[m] == sequence.turn(n, m, tile_m, tile_n), "the kernel would wait for ever"
            turns[m] += 1
            dq[m * tile_m : (m + 1) * tile_m] += ds @ k_
        dk[n * tile_n : (n + 1) * tile_n] = sum_k[: len(k) - n * tile_n]
        dv[n * tile_n : (n + 1) * tile_n] = sum_v[: len(k) - n * tile_n]
    return dq[: len(q)], dk, dv


def check(sequence, seen: torch.Tensor, tile_m: int, tile_n: int, seed: int, by_key: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, dout = torch.randn(2, len(seen), 4, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, seen.shape[1], 4, dtype=torch.float64, generator=generator)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.where(seen, torch.nn.functional.silu(leaves[0] @ leaves[1].T), 0.0) @ leaves[2]
    wanted = torch.autograd.grad(expected, leaves, dout)
    out, loaded = forward(sequence, q, k, v, tile_m, tile_n)
    torch.testing.assert_close(out, expected.detach())
    for actual, gradient in zip(backward(sequence, q, k, v, dout, tile_m, tile_n, by_key), wanted):
        torch.testing.assert_close(actual, gradient)
    # NaN in the blocks that a block of queries does not load changes nothing for it.
    for m, blocks in enumerate(loaded):
        bad = torch.full_like(k, NAN), torch.full_like(v, NAN)
        for n in blocks:
            for x, source in zip(bad, (k, v)):
                x[n * tile_n : (n + 1) * tile_n] = source[n * tile_n : (n + 1) * tile_n]
        rows = slice(m * tile_m, (m + 1) * tile_m)
        torch.testing.assert_close(forward(sequence, q, *bad, tile_m, tile_n)[0][rows], out[rows])


def cases(drawn) -> list:
    """Return 40 cases with queries and keys, which are not many."""
    some = (drawn(seed, most=90) for seed in range(200))
    return [case for case in some if 0 < min(case[:2]) <= max(case[:2]) < 120][:40]


@pytest.mark.parametrize("case", cases(drawn) + cases(drawn_part) + cases(drawn_window), ids=str)
def test_hstu_and_windows(case):
    for seed, (tile_m, tile_n) in enumerate(((16, 16), (16, 24), (32, 16))):
        check(case.sequence, torch.from_numpy(case.visible()), tile_m, tile_n, seed, by_key=True)


@pytest.mark.parametrize("seed", range(20))
def test_intervals(seed):
    seqlen_q, seqlen_k, k = 20 + 3 * seed, 30 + 2 * seed, 1 + seed % 3
    starts, ends = drawn_intervals(seed, seqlen_q, seqlen_k, k)
    key = torch.arange(seqlen_k)
    s, e = (torch.from_numpy(x)[..., None] for x in (starts, ends))
    seen = ((key >= s) & (key < e)).any(1)
    sequence = interval_ranges(starts, ends, seqlen_k, 16, 16)
    check(sequence, seen, 16, 16, seed, by_key=False)
