"""Test flash_attn.masks on the Hopper kernels with several tiles a sequence.

tests/attention/test_hstu_masks.py runs on them too, with small ones; test_ranges.py has the blocks without a
GPU.
"""

from __future__ import annotations

from itertools import product

import flash_attn
import pytest
import torch
from flash_attn.masks import HSTU, Intervals
from flash_attn.nosoftmax.intervals import HSTUSequence

from measure import compare, compare_output, compare_results, gradients, integers, packed, qkv, randn
from oracle import FUNCTIONS
from package import Package, cumulative, missing

MASKS = {
    "targets": dict(num_targets=(20, 0, 150, 77)),
    "contexts": dict(num_contexts=(8, 0, 130, 0)),
    "targets, contexts": dict(num_targets=(1, 0, 150, 7), num_contexts=(8, 0, 131, 70)),
    "window": dict(num_targets=(20, 0, 7, 9), num_contexts=(8, 0, 3, 0), max_attn_len=100),
    "short window": dict(num_targets=(200, 0, 7, 9), max_attn_len=3),
    "whole rows": dict(
        num_targets=(20, 0, 40, 0), num_contexts=(8, 0, 3, 0), max_attn_len=60, min_full_attn_seq_len=70
    ),
    "groups": dict(num_targets=(300, 0, 281, 60), num_contexts=(8, 0, 0, 5), target_group_size=13),
    "everything": dict(
        num_targets=(290, 0, 150, 77), num_contexts=(8, 0, 131, 0), max_attn_len=129,
        min_full_attn_seq_len=30, target_group_size=140,
    ),
}  # fmt: skip
LENGTHS = [700, 0, 281, 77]
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@pytest.fixture(scope="session")
def attention() -> Package:
    if why := missing("cuda", "fa4"):
        pytest.skip(why)
    package = Package("cuda", "fa4")
    package.dtype = torch.bfloat16
    return package


def hstu(attention, mask: dict, sequence: int | None = None) -> HSTU:
    """Return the mask, of all sequences or with the numbers of one."""
    return HSTU(**{
        name: x if isinstance(x, int) else integers(attention, *x) if sequence is None else x[sequence]
        for name, x in mask.items()
    })  # fmt: skip


def semi_local(n: int, first: int = 40, local: int = 100) -> tuple:
    """The first keys and the last ones up to itself: (starts, ends), (n, 2)."""
    row = torch.arange(n)
    starts = torch.stack([torch.zeros_like(row), (row - local + 1).clamp(min=first)], 1)
    return starts, torch.maximum(torch.stack([(row + 1).clamp(max=first), row + 1], 1), starts)


def apart(n: int) -> tuple:
    """Three intervals of any length, of which some are not used; some rows see nothing."""
    cuts = torch.randint(0, n + 1, (n, 6), generator=torch.Generator().manual_seed(n)).sort(-1).values
    starts, ends = cuts[:, ::2].clone(), cuts[:, 1::2].clone()
    ends[::3], ends[1::5, 1] = starts[::3], starts[1::5, 1]
    return starts, ends


def as_hstu(n: int) -> tuple:
    return HSTUSequence(n, n, n // 3, 8 if n > 90 else 0, 129, 30, 13).intervals()


INTERVALS = {"semi-local": semi_local, "apart": apart, "HSTU": as_hstu}
intervals = pytest.mark.parametrize("rows", INTERVALS.values(), ids=INTERVALS)


def written_out(attention, rows, lengths_q=None) -> Intervals:
    """Return the intervals of packed sequences: of their last rows, if lengths_q says how many."""
    pairs = [
        [x[n - q :] for x in rows(n)] for n, q in zip(LENGTHS, LENGTHS if lengths_q is None else lengths_q)
    ]
    return Intervals(*(torch.cat(x).int().to(attention.device) for x in zip(*pairs)))


def check(attention, tensors, lengths_q, mask, **options) -> None:
    """Compare a packed call with the oracle."""
    lengths = dict(lengths_q=lengths_q, lengths_k=LENGTHS)
    dout = randn(*tensors[0].shape[:-1], tensors[2].shape[-1], seed=99).to(tensors[0])
    results = gradients(lambda *x: attention.varlen(*x, **lengths, mask=mask, **options), *tensors, dout=dout)
    compare_results(results, *tensors, dout, "varlen", **lengths, mask=mask, **options)


@masks
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed(attention, head_dim, mask):
    tensors = packed(attention, LENGTHS, LENGTHS, head_dim=head_dim)
    check(attention, tensors, LENGTHS, hstu(attention, mask), activation="silu", normalization=1 / 700)


@masks
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_last_rows(attention, head_dim, mask):
    """Delta-q: rows aligned at the bottom right, with grouped heads."""
    lengths_q = [150, 0, 281, 9]
    tensors = packed(attention, lengths_q, LENGTHS, nheads=4, nheads_k=2, head_dim=head_dim)
    check(attention, tensors, lengths_q, hstu(attention, mask), activation="silu", normalization="1/n")


@pytest.mark.parametrize("name, sequence", product(MASKS, (0, 2, 3)))
def test_batch(attention, name, sequence):
    """Numbers for all sequences. Rows before position 0 see nothing."""
    n = LENGTHS[sequence]
    mask = hstu(attention, MASKS[name], sequence)
    for seqlen_q, head_dim in ((n, 64), (n // 3, 128), (n + 90, 128)):
        tensors = qkv(attention, 2, seqlen_q, n, head_dim=head_dim)
        compare(attention, *tensors, mask=mask, activation="silu", normalization="1/visible")


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("name", ["targets, contexts", "everything"])
def test_functions(attention, name, activation, head_dim):
    tensors = packed(attention, LENGTHS, LENGTHS, nheads=4, nheads_k=2, head_dim=head_dim)
    mask = hstu(attention, MASKS[name])
    check(attention, tensors, LENGTHS, mask, activation=activation, normalization="1/visible")


@pytest.mark.parametrize("normalization", [None, "1/n", "1/sqrt(n)", "1/visible", 0.01, "sequence", "row"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_normalizations(attention, head_dim, normalization):
    tensors = packed(attention, LENGTHS, LENGTHS, head_dim=head_dim)
    shape = {"sequence": len(LENGTHS), "row": sum(LENGTHS)}.get(normalization)
    if shape is not None:
        normalization = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(attention.device)
    mask = hstu(attention, MASKS["everything"])
    check(attention, tensors, LENGTHS, mask, activation="silu", normalization=normalization)


@masks
@pytest.mark.parametrize("nheads_k", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic(attention, head_dim, nheads_k, mask):
    """Key tiles add to dq in order, although each row meets others of them: runs are equal bit for bit."""
    tensors = packed(attention, LENGTHS, LENGTHS, nheads=4, nheads_k=nheads_k, head_dim=head_dim)
    options = dict(activation="silu", deterministic=True, mask=hstu(attention, mask))
    lengths = dict(lengths_q=LENGTHS, lengths_k=LENGTHS)
    runs = [gradients(lambda *x: attention.varlen(*x, **lengths, **options), *tensors) for _ in range(3)]
    compare_results(runs[0], *tensors, randn(*tensors[0].shape, seed=99).to(tensors[0]), "varlen", **lengths,
                    **options)  # fmt: skip
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@pytest.mark.parametrize("sequence", [0, 2])
def test_deterministic_batch(attention, sequence):
    n, mask = LENGTHS[sequence], hstu(attention, MASKS["everything"], sequence)
    tensors = qkv(attention, 3, n, n, nheads=4, head_dim=128)
    options = dict(activation="silu", deterministic=True, mask=mask)
    compare(attention, *tensors, **options)
    runs = [gradients(lambda *x: attention.dense(*x, **options), *tensors) for _ in range(3)]
    assert all(all(map(torch.equal, runs[0], run)) for run in runs[1:])


@pytest.mark.parametrize("page_size", [16, 64, 128])
@masks
def test_pages(attention, mask, page_size):
    pages = -(-700 // page_size)
    order = torch.randperm(4 * pages, generator=torch.Generator().manual_seed(0))
    lengths_k, lengths_q = LENGTHS, [70, 0, 281, 1]
    q = randn(sum(lengths_q), 4, 128, seed=0, like=attention)
    k, v = (randn(4 * pages, page_size, 2, 128, seed=i, like=attention) for i in (1, 2))
    compare_output(
        attention, q, k, v, method="varlen", lengths_q=lengths_q, lengths_k=lengths_k,
        seqused_k=integers(attention, *lengths_k),
        block_table=integers(attention, *order.tolist()).view(4, pages),
        mask=hstu(attention, mask), activation="silu",
    )  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, dict(max_attn_len=100), dict(max_attn_len=60, min_full_attn_seq_len=70), dict(target_group_size=13),
], ids=str)  # fmt: skip
def test_hidden_blocks_are_not_read(attention, options):
    """A NaN in a tile of keys that a tile of queries does not visit changes nothing for it: here the targets
    of one sequence, which no row of the history sees, more than two tiles behind the history."""
    n, targets = 1200, 800
    q, k, v = qkv(attention, 1, n, n, nheads=2, head_dim=64)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, 700:] = bad_v[:, 700:] = float("nan")
    given = dict(mask=HSTU(num_targets=targets, **options), activation="silu")
    good = attention.dense(q, k, v, **given)[:, : n - targets]
    assert torch.equal(attention.dense(q, bad_k, bad_v, **given)[:, : n - targets], good)


def test_too_many_targets_stay_in_the_sequence(attention):
    """The host does not read counts: the device clamps them."""
    tensors = packed(attention, LENGTHS, LENGTHS, head_dim=64)
    lengths = dict(lengths_q=LENGTHS, lengths_k=LENGTHS)
    run = lambda *counts: gradients(  # noqa: E731
        lambda *x: attention.varlen(
            *x, **lengths, deterministic=True, mask=HSTU(*(integers(attention, *c) for c in counts))
        ),
        *tensors,
    )
    clamped = run((700, 0, 281, 0), (0, 0, 0, 77))
    assert all(map(torch.equal, run((10**9, 5, 282, -3), (4, 1, 2, 10**9)), clamped))


def test_another_number_compiles_nothing_and_repeats_the_launch(attention):
    from flash_attn.cute import interface

    tensors = packed(attention, LENGTHS, LENGTHS, head_dim=64)
    counts = integers(attention, 20, 0, 30, 7)
    check(attention, tensors, LENGTHS, HSTU(counts, max_attn_len=100), activation="silu")
    compiled = len(interface._flash_attn_fwd.compile_cache.cache)
    for window in (50, 50, 100, 7):
        check(attention, tensors, LENGTHS, HSTU(counts + window % 3, max_attn_len=window), activation="silu")
    assert len(interface._flash_attn_fwd.compile_cache.cache) == compiled


def test_compiled_and_captured(attention):
    """torch.compile takes the operators, and a CUDA graph repeats a call with other counts."""
    q, k, v = packed(attention, LENGTHS, LENGTHS, head_dim=64)
    offsets, counts = cumulative(LENGTHS, "cuda"), integers(attention, 20, 0, 30, 7)

    def attend(q, k, v, counts):
        return flash_attn.flash_attn_varlen_func(
            q, k, v, offsets, offsets, 700, 700, use_softmax=False, activation="silu", backend="fa4",
            mask=HSTU(counts, max_attn_len=90),
        )  # fmt: skip

    eager = gradients(lambda *x: attend(*x, counts), q, k, v)
    actual = gradients(lambda *x: torch.compile(attend, fullgraph=True)(*x, counts), q, k, v)
    assert torch.equal(actual[0], eager[0])
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, k, v, counts)
        counts.copy_(integers(attention, 3, 0, 281, 0))
        graph.replay()
        assert torch.equal(out, attend(q, k, v, counts))


# ---- Intervals


@intervals
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_intervals(attention, head_dim, rows):
    tensors = packed(attention, LENGTHS, LENGTHS, nheads=4, nheads_k=2, head_dim=head_dim)
    mask = written_out(attention, rows)
    check(attention, tensors, LENGTHS, mask, activation="silu", normalization="1/visible")


@intervals
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_intervals_of_the_last_rows(attention, activation, rows):
    lengths_q = [150, 0, 281, 9]
    tensors = packed(attention, lengths_q, LENGTHS, head_dim=64)
    mask = written_out(attention, rows, lengths_q)
    check(attention, tensors, lengths_q, mask, activation=activation, normalization="1/n")


@intervals
def test_intervals_of_a_batch(attention, rows):
    """Beside a decay too, whose distances are those of indices."""
    pair = [torch.stack([x, x.flip(0)]) for x in rows(500)]
    mask = Intervals(*(x.int().to(attention.device) for x in pair))
    tensors = qkv(attention, 2, 500, 500, nheads=2, head_dim=128)
    slopes = torch.tensor([0.02, 0.1], device=attention.device)
    for options in ({}, {"decay_slopes": slopes}):
        compare(attention, *tensors, mask=mask, activation="silu", **options)


@intervals
@pytest.mark.parametrize("nheads_k", [1, 4])
def test_intervals_in_order(attention, nheads_k, rows):
    tensors = packed(attention, LENGTHS, LENGTHS, nheads=4, nheads_k=nheads_k, head_dim=64)
    options = dict(activation="silu", mask=written_out(attention, rows))
    check(attention, tensors, LENGTHS, deterministic=True, **options)
    lengths = dict(lengths_q=LENGTHS, lengths_k=LENGTHS, deterministic=True)
    runs = [gradients(lambda *x: attention.varlen(*x, **lengths, **options), *tensors) for _ in range(3)]
    assert all(all(map(torch.equal, runs[0], run)) for run in runs[1:])


@intervals
def test_intervals_over_pages(attention, rows):
    lengths_q = [70, 0, 281, 1]
    order = torch.randperm(44, generator=torch.Generator().manual_seed(0))
    q = randn(sum(lengths_q), 4, 128, seed=0, like=attention)
    k, v = (randn(44, 64, 2, 128, seed=i, like=attention) for i in (1, 2))
    compare_output(
        attention, q, k, v, method="varlen", lengths_q=lengths_q, lengths_k=LENGTHS,
        seqused_k=integers(attention, *LENGTHS), block_table=integers(attention, *order.tolist()).view(4, 11),
        mask=written_out(attention, rows, lengths_q), activation="silu",
    )  # fmt: skip


def test_intervals_that_leave_the_sequence_are_cut(attention):
    """The host does not read them."""
    tensors = packed(attention, LENGTHS, LENGTHS, head_dim=64)
    mask = written_out(attention, semi_local)
    wide = Intervals(mask.starts - 10**6 * (mask.starts == 0), mask.ends)
    lengths = dict(lengths_q=LENGTHS, lengths_k=LENGTHS, deterministic=True)
    runs = [gradients(lambda *x: attention.varlen(*x, **lengths, mask=m), *tensors) for m in (mask, wide)]
    assert all(map(torch.equal, *runs))
