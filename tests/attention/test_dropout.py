"""Test dropout of weights that may be negative or zero: neither the sign nor a zero can encode the mask."""

from __future__ import annotations

import pytest
import torch

from dropping import P, compare_dropped
from measure import qkv, randn, slopes
from oracle import FUNCTIONS


@pytest.mark.parametrize("causal", [False, True])
def test_signed_scores(attention, causal):
    """Dropped weights are 0 whatever their sign, in the backward too, and the others are scaled by 1 / (1 -
    p).
    """
    compare_dropped(attention, *qkv(attention, 2, 33, 41), causal=causal)


def test_all_scores_negative(attention):
    """A kernel that reads the mask from the sign of P would drop everything here."""
    q, k, v = qkv(attention, 2, 33, 41)
    compare_dropped(attention, q.abs(), -k.abs(), v)


@pytest.mark.parametrize("activation", [name for name in FUNCTIONS if name != "identity"])
def test_functions(attention, activation):
    """Weights that f made zero do not count as dropped."""
    compare_dropped(attention, *qkv(attention, 2, 33, 41), activation=activation)


@pytest.mark.parametrize("normalization", ["1/n", "1/visible", "1/sqrt(n)"])
def test_normalization_does_not_count_drops(attention, normalization):
    """1/visible counts the keys that the attention mask leaves visible, dropped or not."""
    compare_dropped(attention, *qkv(attention, 2, 33, 41), causal=True, normalization=normalization)


def test_window_alibi_and_groups(attention):
    q, k, v = qkv(attention, 2, 33, 41, nheads=4, nheads_k=2)
    compare_dropped(attention, q, k, v, window_size=(9, 4), alibi_slopes=slopes(attention, 4))


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(activation="silu", normalization="1/n")], ids=str
)
def test_packed_sequences(attention, options):
    """Sequences of unequal lengths, one of them empty, each have their own mask."""
    lengths = dict(lengths_q=[33, 0, 40, 33], lengths_k=[41, 7, 20, 41])
    sizes = ((106, 4), (109, 2), (109, 2))
    tensors = (randn(*size, 8, seed=i, like=attention) for i, size in enumerate(sizes))
    keep = compare_dropped(attention, *tensors, **lengths, **options)
    assert not torch.equal(keep[0, :, :33], keep[3, :, :33])


def test_zero_query_with_dropout(attention):
    """A query whose scores are all 0 gets its gradient from the kept keys alone."""
    q, k, v = qkv(attention, 2, 33, 41)
    q[:, 3] = 0
    compare_dropped(attention, q, k, v)


def test_forward_and_backward_agree_across_blocks(attention):
    """dV = r (Z∘P)ᵀ dO uses the mask of the forward, for more queries and keys than one block holds."""
    compare_dropped(attention, *qkv(attention, 1, 300, 521, nheads=2, head_dim=16), dropout_p=0.5)


def test_fraction_kept(attention):
    """The kept fraction is within 1 % of 1 - p, and uniform over rows and keys."""
    q, k, v = qkv(attention, 1, 256, 256, nheads=2, head_dim=8)
    _, keep = attention.dropped(q, k, v, P, 3)
    assert abs(keep.double().mean().item() - (1 - P)) < 0.01
    for dim in (2, 3):
        assert (keep.double().mean(dim) - (1 - P)).abs().max() < 0.12  # five standard deviations of 256 draws


def test_rows_and_keys_are_independent(attention):
    """No two queries, keys, heads or sequences share a mask, or have opposite masks, more than by chance."""
    q, k, v = qkv(attention, 2, 256, 256, nheads=2, head_dim=8)
    _, keep = attention.dropped(q, k, v, 0.5, 3)
    signs = keep.flatten(0, 1).cpu().double() * 2 - 1
    for vectors in (signs.flatten(0, 1), signs.transpose(1, 2).flatten(0, 1)):
        correlation = vectors @ vectors.T / 256 - torch.eye(1024, dtype=torch.float64)
        assert correlation.abs().max() < 0.45  # seven standard deviations


def test_mask_does_not_depend_on_softmax(attention):
    """The mask depends on the seed and the position, with softmax and without."""
    q, k, v = qkv(attention, 2, 130, 140)
    with_softmax, without = (attention.dropped(q, k, v, P, 5, use_softmax=on)[1] for on in (True, False))
    assert torch.equal(with_softmax, without)


def test_seed_decides(attention):
    """The same seed gives the same output bit for bit, another seed another output."""
    q, k, v = qkv(attention, 2, 33, 41)
    first, again, other = (attention.dropped(q, k, v, P, seed) for seed in (7, 7, 8))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_keep_mask_is_plus_or_minus_one(attention, device):
    """S_dmask is a keep mask of q's dtype: +1 kept, -1 dropped, 0 outside the sequence."""
    q, k, v = qkv(attention, 2, 33, 41)
    _, lse, mask = attention.dense(q, k, v, dropout_p=P, return_attn_probs=True)
    assert lse.shape == (0,) and lse.dtype == torch.float32
    assert mask.shape == (2, 2, 128, 128) and mask.dtype == q.dtype
    assert (mask[:, :, :33, :41].abs() == 1).all()
    if device == "cpu":  # the CUDA kernels leave entries outside undefined, with softmax and without
        assert not mask[:, :, 33:].any() and not mask[:, :, :, 41:].any()
