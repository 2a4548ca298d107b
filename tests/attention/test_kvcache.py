"""Test decoding from a key-value cache: appending in place, rotary positions, left padding, slots, pages,
splits.
"""

from __future__ import annotations

import pytest
import torch

from caches import CAPACITY, LENGTHS, caches, check, rotary, step
from measure import assert_same, compare_output, integers, poison_allocator, qkv, slopes


@pytest.mark.parametrize(
    "options",
    [dict(), dict(causal=True), dict(window_size=(7, 2)), dict(causal=True, window_size=(5, -1))],
    ids=str,
)
@pytest.mark.parametrize("seqlen", [1, 3])
def test_append(attention, seqlen, options):
    """New keys go to the end of each sequence, in place, and are visible at once."""
    q, *new = step(attention, seqlen)
    check(attention, q, *caches(attention), *new, cache_seqlens=integers(attention, *LENGTHS), **options)


@pytest.mark.parametrize("seqlen", [1, 3])
def test_read_only(attention, seqlen):
    """Without new keys the caches stay as they are and only cache_seqlens keys are read."""
    q, _, _ = step(attention, seqlen)
    check(attention, q, *caches(attention), cache_seqlens=integers(attention, *LENGTHS), causal=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(window_size=(7, 2))], ids=str)
def test_rotary(attention, interleaved, options):
    """Keys rotate by their position. Queries rotate by theirs if causal or local, else all by the cache's
    length.
    """
    q, *new = step(attention, 3)
    turn = dict(rotary(attention), rotary_interleaved=interleaved)
    check(
        attention, q, *caches(attention), *new, cache_seqlens=integers(attention, *LENGTHS), **turn, **options
    )


@pytest.mark.parametrize(
    "options", [dict(causal=True), dict(activation="sigmoid", sigmoid_bias="-log n")], ids=str
)
def test_left_padding(attention, options):
    """A sequence begins at cache_leftpad; positions still count from the start of the cache."""
    q, *new = step(attention, 2)
    arguments = dict(cache_seqlens=integers(attention, *LENGTHS), cache_leftpad=integers(attention, 3, 0, 20))
    check(attention, q, *caches(attention), *new, **arguments, **rotary(attention), **options)


def test_batch_index(attention):
    """Sequences may use any slots of a larger cache, and the other slots stay unchanged."""
    q, *new = step(attention, 2)
    arguments = dict(
        cache_seqlens=integers(attention, *LENGTHS), cache_batch_idx=integers(attention, 4, 0, 2), causal=True
    )
    check(attention, q, *caches(attention, slots=5), *new, **arguments)


@pytest.mark.parametrize("append", [False, True])
def test_paged(attention, append):
    """Pages of 256 keys may have any order, and appending may cross from one page into the next."""
    q, *new = step(attention, 3)
    table = integers(attention, 5, 0, 3, 1, 2, 6).view(3, 2)
    arguments = dict(cache_seqlens=integers(attention, 254, 0, 400), block_table=table, causal=True)
    turn = rotary(attention, positions=512) if append else {}
    check(
        attention, q, *caches(attention, slots=7, capacity=256), *(new if append else ()), **arguments, **turn
    )


FUNCTIONS = [
    dict(softcap=2.0),
    dict(activation="silu"),
    dict(activation="relu2", normalization="1/visible"),
    dict(normalization="1/n"),
    dict(activation="sigmoid", sigmoid_bias="-log n"),
]


@pytest.mark.parametrize("options", FUNCTIONS, ids=str)
def test_functions(attention, options):
    """n is each sequence's length with its new keys, not the capacity of the cache."""
    q, *new = step(attention, 2)
    check(
        attention,
        q,
        *caches(attention),
        *new,
        cache_seqlens=integers(attention, *LENGTHS),
        causal=True,
        **options,
    )


@pytest.mark.parametrize("seqlen", [1, 3])
def test_alibi(attention, seqlen):
    """Distances count from the end of each sequence. For one query causal stays on, because the bias needs
    it.
    """
    q, *new = step(attention, seqlen)
    arguments = dict(
        cache_seqlens=integers(attention, *LENGTHS),
        alibi_slopes=slopes(attention, 3, 4, size=0.1),
        causal=True,
    )
    check(attention, q, *caches(attention), *new, **arguments)


@pytest.mark.parametrize("place", ["the same rows", "a larger cache", "cache_batch_idx", "pages"])
@pytest.mark.parametrize("use_softmax", [True, False])
def test_int_cache_seqlens(attention, place, use_softmax):
    """An int is the length of each sequence, however many rows or pages the cache has."""
    q, _, _ = step(attention)
    options = {
        "cache_batch_idx": dict(cache_batch_idx=integers(attention, 4, 0, 2)),
        "pages": dict(block_table=integers(attention, 5, 0, 3, 1, 2, 6).view(3, 2)),
    }.get(place, {})
    k_cache, v_cache = caches(
        attention, 3 if place == "the same rows" else 7, 256 if place == "pages" else CAPACITY
    )
    lengths = 17, integers(attention, 17, 17, 17)
    outputs = (
        attention.kvcache(q, k_cache, v_cache, cache_seqlens=n, use_softmax=use_softmax, **options)
        for n in lengths
    )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5, 8, 64, 128])
@pytest.mark.parametrize("options", [dict(), dict(causal=True)], ids=str)
def test_splits_add_up(attention, num_splits, options):
    """Parts over disjoint keys merge by addition. Parts without keys add 0, whatever their memory held
    before.
    """
    k_cache, v_cache = (x[:, :, :, :8] for x in caches(attention, capacity=520))
    q = step(attention, 2)[0][..., :8].contiguous()
    poison_allocator(attention.device)
    arguments = dict(cache_seqlens=integers(attention, 300, 1, 17), num_splits=num_splits)
    compare_output(attention, q, k_cache, v_cache, method="kvcache", **arguments, **options)


@pytest.mark.parametrize("num_splits", [2, 8])
@pytest.mark.parametrize("window_size", [(20, 5), (0, 0)])
def test_splits_that_a_window_empties(attention, num_splits, window_size):
    """Splits add up even if most parts lie outside the window of every query."""
    k_cache, v_cache = caches(attention, capacity=520)
    arguments = dict(
        cache_seqlens=integers(attention, 500, 3, 250), num_splits=num_splits, window_size=window_size
    )
    compare_output(attention, step(attention, 2)[0], k_cache, v_cache, method="kvcache", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("seqlen_q, seqlen_k, nheads", [(3, 1024, 12), (64, 2048, 4), (16, 20000, 2)])
def test_dense_that_a_kernel_would_split(attention, seqlen_q, seqlen_k, nheads):
    """A dense forward of few queries over many keys may split the keys too; the result equals that of one
    split.
    """
    q, k, v = qkv(attention, 1, seqlen_q, seqlen_k, nheads=nheads, head_dim=64)
    compare_output(attention, q, k, v, method="dense")
    one = attention.kvcache(q, k, v, cache_seqlens=integers(attention, seqlen_k), num_splits=1)
    assert_same("out", attention.dense(q, k, v), one)


def test_decoding_equals_the_full_forward(attention):
    """Token by token from the cache gives each row of one causal forward."""
    q, k, v = qkv(attention, 2, 12, 12, nheads=4, nheads_k=2)
    k_cache, v_cache = (torch.zeros(2, 16, 2, 8, dtype=q.dtype, device=q.device) for _ in range(2))
    options = dict(activation="relu", normalization="1/visible")
    full = attention.dense(q, k, v, causal=True, **options)
    for t in range(12):
        token, *new = (x[:, t : t + 1] for x in (q, k, v))
        lengths = integers(attention, t, t)
        row = attention.kvcache(token, k_cache, v_cache, *new, cache_seqlens=lengths, causal=True, **options)
        assert_same(f"row {t}", row, full[:, t : t + 1])
